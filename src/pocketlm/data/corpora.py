"""Where text comes from: a name, a path or a Hub dataset becomes a ``Corpus`` with a train and a validation split.

What belongs here: names, folders, splits, fingerprints. Imports ``errors``, ``config``,
``data.sources``, ``data.hub``.

Design: one rule holds text out, whatever its source. With at least 10 documents each goes by the hash of its key
(the file's relative path, or its place in a file), so that adding text moves no document to the other side;
a text with fewer is cut at ``int(n * (1 - val_fraction))`` of its n characters, nanoGPT's split, and its tail
validates. Splits that a corpus brings along are kept.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import re
import sysconfig
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from pocketlm.config import DataConfig
from pocketlm.data import hub
from pocketlm.data.sources import JSONL_SUFFIXES, Keyed, cut, is_binary, read_documents
from pocketlm.errors import CorpusError
from pocketlm.files import PICKLE_ADVICE, is_pickle

Documents = Callable[[], Iterator[Keyed]]
Texts = Callable[[], Iterator[str]]
NAMES = ("stdlib", "shakespeare", "wikitext-2")
FEWEST_TO_DEAL = 10
"""With fewer documents the text is cut instead of dealt by document."""
HASHED_BYTES = 2**30
"""Up to this much text its content is the fingerprint; beyond, names, sizes and times of files."""
_FORMAT = 1
_SPLIT_FILE = re.compile(
    rf"(?:wiki\.)?({'|'.join(hub.SPLIT_WORDS)})[._-](?:.*[._-])?(?:txt|tokens|raw|jsonl|ndjson|parquet)"
)
_WIKITEXT = re.compile(r"wiki\.(train|valid|test)\.(tokens|raw)")
_NOT_LIBRARY = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "_bundled"}
_NOT_LIBRARY |= {"encodings", "pydoc_data"}
"""Tests, other people's packages, and what a program wrote: tables of characters, help texts as quoted lines."""


@dataclass(frozen=True)
class Corpus:
    """Text in named splits. ``splits`` always has train and validation."""

    name: str
    description: str
    """One line for logs and reports."""
    _readers: Mapping[str, Texts]
    _fingerprint: str

    @property
    def splits(self) -> tuple[str, ...]:
        """Names of the splits, train and validation first."""
        return tuple(self._readers)

    def documents(self, split: str) -> Iterator[str]:
        """Documents that are not blank, in the same order every time, read as they are asked for.

        Raises CorpusError for text that cannot be read or decoded.
        """
        return self._readers[split]()

    def fingerprint(self) -> str:
        """Another one when the text changed, or a setting that shapes documents."""
        return self._fingerprint


@dataclass(frozen=True)
class _Files:
    """Files of one split, relative to a folder, in order."""

    folder: Path
    names: Sequence[str]

    def documents(self, config: DataConfig, unit: str) -> Documents:
        def read() -> Iterator[Keyed]:
            field, invalid = config.text_field, config.invalid_utf8
            for name in self.names:
                yield from read_documents(self.folder / name, key=name, unit=unit, field=field, invalid=invalid)

        return read

    def sizes(self) -> dict[str, int]:
        return {name: (self.folder / name).stat().st_size for name in self.names}


def open_corpus(config: DataConfig, *, mirror: Path | None) -> Corpus:
    """The corpus that ``config.path`` names. A path that exists wins over a name; ``mirror`` over the Hub.

    Raises CorpusError, MissingExtraError.
    """
    name, path = config.path, Path(config.path)
    if os.path.exists(name):  # unlike Path.exists, quiet about names that no file can have
        return _open_path(path.name or path.resolve().name, path, config)
    if name == "stdlib":
        return _open_stdlib(config)
    if name in NAMES and mirror is not None and (mirror / name).exists():
        return _open_path(name, mirror / name, config)
    if name in NAMES or re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", name):
        return _open_hub(name, config)
    siblings: list[str] = []
    with suppress(OSError, ValueError):
        siblings = os.listdir(path.parent)
    close = difflib.get_close_matches(path.name, [*siblings, *NAMES], n=1)
    hint = f": use a file, a folder, {', '.join(NAMES)} or user/name"
    if close:
        hint = f", did you mean '{path.with_name(close[0]) if close[0] in siblings else close[0]}'?"
    raise CorpusError(f"there is no text '{name}'{hint}")


# ---------------------------------------------------------------- files and folders


def _open_path(name: str, path: Path, config: DataConfig) -> Corpus:
    if path.is_file():
        if is_pickle(path):
            raise CorpusError(f"'{path}' {PICKLE_ADVICE}")
        if path.suffix not in (*JSONL_SUFFIXES, ".parquet") and is_binary(path):
            raise CorpusError(f"'{path}' holds NUL bytes, so it is no text file")
        return _of_files(name, {"train": _Files(path.parent, [path.name])}, config, where=str(path))
    if not path.is_dir():
        raise CorpusError(f"'{path}' is neither a plain file nor a folder")
    names = _text_files(path)
    own: dict[str, list[str]] = {}
    for each in names:
        if found := _SPLIT_FILE.fullmatch(each):
            own.setdefault(hub.SPLIT_WORDS[found[1]], []).append(each)
    if "train" not in own or len(own) == 1:
        own = {"train": names}
    return _of_files(name, {split: _Files(path, files) for split, files in own.items()}, config, where=str(path))


def _open_stdlib(config: DataConfig) -> Corpus:
    """Python's own standard library: about 11 MB of source without its tests, on every machine."""
    folder = Path(sysconfig.get_path("stdlib"))
    names = [n for n in _text_files(folder, _NOT_LIBRARY, ".py") if not n.startswith("config-")]
    if not names:
        raise CorpusError(f"Python's standard library is not at '{folder}' as files: give another --data.path")
    return _of_files("stdlib", {"train": _Files(folder, names)}, config, where="Python's standard library")


def _text_files(folder: Path, skipped: Iterable[str] = (), suffix: str = "") -> list[str]:
    """Relative names of readable, not hidden text files under ``folder``, sorted."""
    found = []
    for root, folders, files in os.walk(folder):
        folders[:] = [f for f in folders if not f.startswith(".") and f not in skipped]
        paths = [Path(root, f) for f in files if not f.startswith(".") and f.endswith(suffix)]
        found += [p for p in paths if p.is_file() and (p.suffix == ".parquet" or not is_binary(p))]
    return sorted(p.relative_to(folder).as_posix() for p in found)


def _of_files(name: str, splits: Mapping[str, _Files], config: DataConfig, *, where: str) -> Corpus:
    files = [n for each in splits.values() for n in each.names]
    unit: str = config.document
    if unit == "auto":
        unit = "article" if files and all(_WIKITEXT.fullmatch(n) for n in files) else "file"
    try:
        sizes = {n: size for each in splits.values() for n, size in each.sizes().items()}
        text = _text_identity(splits, sum(sizes.values()))
    except OSError as e:
        raise CorpusError(f"'{where}' cannot be read: {e.strerror or e}") from None
    readers = _held_out({split: each.documents(config, unit) for split, each in splits.items()}, config, where)
    shown = where if where.startswith("Python") else name
    description = f"{shown}: {len(files):,} file{'s' * (len(files) > 1)}, {_megabytes(sum(sizes.values()))}"
    return Corpus(name, description, readers, _digest([_FORMAT, text, unit, _shaping(config)]))


def _text_identity(splits: Mapping[str, _Files], total: int) -> list[list[Any]]:
    """[split, name, sha256 or size and time] of every file."""
    identity: list[list[Any]] = []
    for split, files in splits.items():
        for name in files.names:
            path = files.folder / name
            if total <= HASHED_BYTES:
                with path.open("rb") as file:
                    digest = hashlib.sha256()
                    while block := file.read(2**20):
                        digest.update(block)
                identity.append([split, name, digest.hexdigest()])
            else:
                status = path.stat()
                identity.append([split, name, status.st_size, status.st_mtime_ns])
    return identity


def _shaping(config: DataConfig) -> dict[str, Any]:
    """The settings that decide which text ends up in which document of which split."""
    return config.model_dump(include={"max_documents", "text_field", "val_fraction", "invalid_utf8"})


# ---------------------------------------------------------------- splits


def _held_out(splits: Mapping[str, Documents], config: DataConfig, where: str) -> dict[str, Texts]:
    """Readers of texts by split, with a validation split in any case. Raises CorpusError when there is no text."""
    limited = {split: _limited(documents, config.max_documents) for split, documents in splits.items()}
    for split, documents in limited.items():
        if next(documents(), None) is None:
            what = "text to train on" if split == "train" else f"text in its {split} split"
            raise CorpusError(f"'{where}' holds no {what}: it is empty, or blank")
    own = {split: _texts(documents) for split, documents in limited.items()}
    if "validation" not in own:
        own = {**_deal(limited["train"], config.val_fraction, where), **{s: r for s, r in own.items() if s != "train"}}
    return {split: own[split] for split in ("train", "validation", "test") if split in own}


def _deal(documents: Documents, fraction: float, where: str) -> dict[str, Texts]:
    """Train and validation from one stream of documents; see the module's docstring for the rule."""
    keys, sides, characters = 0, set(), 0
    last = None
    for key, text in documents():
        keys, last = keys + (key != last), key
        sides.add(_is_held_out(key, fraction))
        characters += len(text)
        if keys >= FEWEST_TO_DEAL and len(sides) == 2:
            return {
                "train": _texts(documents, lambda key: not _is_held_out(key, fraction)),
                "validation": _texts(documents, lambda key: _is_held_out(key, fraction)),
            }
    edge = int(characters * (1 - fraction))
    if not 0 < edge < characters:
        raise CorpusError(
            f"'{where}' has {characters:,} characters, of which {edge:,} would be left to train on and "
            f"{characters - edge:,} to validate: give more text, or change --data.val_fraction {fraction}"
        )
    return {"train": _between(documents, 0, edge), "validation": _between(documents, edge, characters)}


def _is_held_out(key: str, fraction: float) -> bool:
    digest = hashlib.blake2b(key.encode(errors="surrogateescape"), digest_size=8).digest()
    return int.from_bytes(digest, "big") < fraction * 2**64


def _limited(documents: Documents, most: int | None) -> Documents:
    return lambda: islice(documents(), most)


def _texts(documents: Documents, wanted: Callable[[str], bool] = lambda key: True) -> Texts:
    return lambda: (text for key, text in documents() if wanted(key))


def _between(documents: Documents, start: int, end: int) -> Texts:
    """Characters ``start`` to ``end`` of all documents in a row."""

    def read() -> Iterator[str]:
        at = 0
        for _, text in documents():
            part = text[max(0, start - at) : max(0, end - at)]
            at += len(text)
            if part:
                yield part
            if at >= end:
                return

    return read


# ---------------------------------------------------------------- the Hub


_HUB: Mapping[str, Any] = {
    "shakespeare": {"name": "karpathy/tiny_shakespeare", "subset": None, "revision": "refs/convert/parquet"},
    "wikitext-2": {"name": "Salesforce/wikitext", "subset": "wikitext-2-v1", "revision": None},
}


def _open_hub(name: str, config: DataConfig) -> Corpus:
    """A dataset through the ``datasets`` library: one document a row, but for the two known by name."""
    request = _HUB.get(name, {"name": name, "subset": config.hub_subset, "revision": None})
    dataset = hub.load(**request, streaming=config.streaming, field=config.text_field)
    unit = "article" if config.document == "auto" else config.document
    splits: dict[str, Documents]
    if name == "shakespeare":  # published there in three parts of one text
        pieces = [text for split in ("train", "validation", "test") for text in dataset.splits[split]()]
        splits = {"train": lambda: ((name, text) for text in cut(pieces, "file"))}
    elif name == "wikitext-2":  # one row a line, blank ones emptied
        splits = {s: _wikitext(rows, unit) for s, rows in dataset.splits.items()}
    else:
        splits = {s: _rows(rows) for s, rows in dataset.splits.items()}
    description = f"{name}: {', '.join(splits)} from the Hub{', streamed' * config.streaming}"
    identity = _digest([_FORMAT, dataset.identity, unit, _shaping(config)])
    return Corpus(name, description, _held_out(splits, config, name), identity)


def _rows(rows: Texts) -> Documents:
    return lambda: ((f"#{i}", text) for i, text in enumerate(rows()) if text.strip())


def _wikitext(rows: Texts, unit: str) -> Documents:
    return lambda: ((f"#{i}", text) for i, text in enumerate(cut((row or " \n" for row in rows()), unit)))


def _digest(values: Any) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.1f} MB" if size >= 100_000 else f"{size:,} bytes"
