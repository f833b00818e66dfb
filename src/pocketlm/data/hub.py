"""Rows of datasets on the Hugging Face Hub, downloaded or streamed.

What belongs here: the only place that knows the ``datasets`` library. Imports ``errors``,
``tokenizers``.

Design: a dataset is its rows of text by split, under our three names of splits, and one string that identifies its
version: the builder's hash, which is that of the commit. Whatever fails in between becomes one sentence.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pocketlm.errors import CorpusError, MissingExtraError
from pocketlm.tokenizers import cache_without_network

SPLIT_WORDS = {
    "train": "train",
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    "test": "test",
}
"""What others call a split -> what we call it."""


Texts = Callable[[], Iterator[str]]


@dataclass(frozen=True)
class Dataset:
    """Texts of rows by split."""

    identity: str
    splits: Mapping[str, Texts]


def load(name: str, *, subset: str | None, revision: str | None, streaming: bool, field: str) -> Dataset:
    """Open a dataset. Raises CorpusError, MissingExtraError; its readers raise CorpusError too.

    A dataset whose only split has a name of its own trains on it; null in a row counts as empty.
    """
    try:
        import datasets
    except ImportError:
        raise MissingExtraError("datasets", "data", f"the dataset '{name}'") from None
    try:
        with cache_without_network():
            builder = datasets.load_dataset_builder(name, subset, revision=revision)
            if not streaming:
                builder.download_and_prepare()
            theirs: Mapping[str, Any] = builder.as_streaming_dataset() if streaming else builder.as_dataset()
    except Exception as e:  # whatever fails here is the network, the name, the subset or the disk
        raise _unreachable(name, e) from None
    ours = {SPLIT_WORDS[split]: rows for split, rows in theirs.items() if split in SPLIT_WORDS}
    if "train" not in ours:
        if len(theirs) != 1:
            raise CorpusError(f"the dataset '{name}' has no train split, only {', '.join(theirs) or 'nothing'}")
        ours = {"train": next(iter(theirs.values()))}
    identity = f"{name} {builder.config.name} {builder.hash}"
    return Dataset(identity, {split: _texts(name, rows, field) for split, rows in ours.items()})


def _texts(name: str, rows: Any, field: str) -> Texts:
    def read() -> Iterator[str]:
        remaining = iter(rows)
        while True:
            try:
                row = next(remaining, None)
            except Exception as e:  # a stream can break at any row
                raise _unreachable(name, e) from None
            if row is None:
                return
            text = row.get(field, "") or ""
            if field not in row or not isinstance(text, str):
                raise CorpusError(
                    f"the dataset '{name}' has no text in '{field}', only the columns {', '.join(row)}: "
                    "name the right one with --data.text_field"
                )
            yield text

    return read


def _unreachable(name: str, error: Exception) -> CorpusError:
    problem = " ".join(str(error).split())
    return CorpusError(
        f"the dataset '{name}' could not be read from the Hub ({type(error).__name__}: {problem:.200}): check the "
        "name, --data.hub_subset and the network, or give --data.path a local file or folder "
        "or --data.mirror a folder with copies"
    )
