"""The token cache: every corpus is tokenised once, into files that are verified and memory-mapped.

What belongs here: the format on disk, writing it so that it can be resumed, and reading it. Imports ``errors``,
``files``, ``tokenizers``, ``data.corpora``, ``data.encoding``.

Design: a split is one stream ``sep d0 sep d1 ... sep dn sep``, so that every token but the first has one before it.
It lies in shards of whole documents, 16 million tokens each (32 MB at 2 bytes), which is also what an interrupted
build may lose: each finished shard is entered in ``building.json``, which becomes ``manifest.json`` when all are there.

::

    <cache>/<corpus>-<key>/          key: hash of text, tokenizer, format and settings
        train-00000.bin              ids, little-endian, uint16 or uint32
        train-docs-00000.bin         index of each document's first token, within the shard, int64
        manifest.json                counts and sha256 of every file; written last
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, islice
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
from filelock import FileLock
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pocketlm.data.corpora import Corpus
from pocketlm.data.encoding import encoded
from pocketlm.errors import CorpusError
from pocketlm.files import flush_folder, lies_within, stranger, write_atomically, write_durably
from pocketlm.tokenizers import Ids, Tokenizer

FORMAT = 1
MANIFEST, BUILDING = "manifest.json", "building.json"
SHARD_TOKENS = 2**24
VERIFIED_BYTES = 2**28
"""Up to this size a cache is verified whole when it is opened; beyond, each shard when it is first read."""
_log = logging.getLogger(__name__)

Progress = Callable[[str, int], None]
"""Called with a split's name and its tokens so far."""


@dataclass(frozen=True)
class Shard:
    """A file of ids that is verified and mapped when it is first read."""

    path: Path
    n_tokens: int
    dtype: str
    sha256: str

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return self.n_tokens * np.dtype(self.dtype).itemsize

    @cached_property
    def tokens(self) -> Ids:
        """(n_tokens,) ids. Raises CorpusError when the file is not what was written."""
        if not _is_intact(self.path, self.size, self.sha256):
            raise CorpusError(f"{_damaged(self.path)}; delete the folder, and it is built again")
        return np.memmap(self.path, dtype=self.dtype, mode="r", shape=(self.n_tokens,))


@dataclass(frozen=True)
class TokenSplit:
    """One split's stream of ``n_stored`` ids, separators included, and what its text amounts to."""

    name: str
    shards: tuple[Shard, ...]
    starts: npt.NDArray[np.int64]
    """(n_documents,) index of each document's first token; its separator is one before, and one closes the stream."""
    separator_id: int
    n_bytes: int
    """Of the text in UTF-8."""
    n_words: int
    """Separated by whitespace."""
    n_lines: int
    """Line ends."""

    @cached_property
    def _edges(self) -> npt.NDArray[np.int64]:
        return np.array([0, *accumulate(shard.n_tokens for shard in self.shards)], dtype=np.int64)

    @property
    def n_stored(self) -> int:
        """Ids in the stream, separators included."""
        return int(self._edges[-1])

    @property
    def n_documents(self) -> int:
        """Documents."""
        return len(self.starts)

    @property
    def n_tokens(self) -> int:
        """Ids of text, without separators."""
        return self.n_stored - self.n_documents - 1

    def read(self, start: int, stop: int) -> Ids:
        """(stop - start,) ids of the stream. Raises CorpusError when a shard is damaged."""
        assert 0 <= start < stop <= self.n_stored, f"[{start}, {stop}) of {self.n_stored}"
        first, last = np.searchsorted(self._edges, (start, stop - 1), side="right") - 1
        parts = [
            self.shards[i].tokens[max(0, start - self._edges[i]) : stop - self._edges[i]]
            for i in range(int(first), int(last) + 1)
        ]
        return np.asarray(parts[0]) if len(parts) == 1 else np.concatenate(parts)

    def take(self, indices: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """(n,) indices -> (n,) their ids. Raises CorpusError when a shard is damaged."""
        ids = np.empty(len(indices), dtype=np.int64)
        where = np.searchsorted(self._edges, indices, side="right") - 1
        for i in np.unique(where):
            here = where == i
            ids[here] = self.shards[i].tokens[indices[here] - self._edges[i]]
        return ids


@dataclass(frozen=True)
class TokenCache:
    """A corpus as tokens."""

    folder: Path
    splits: dict[str, TokenSplit]
    fingerprint: str
    """Another one when text, tokenizer or format changed."""


def prepare(
    corpus: Corpus,
    tokenizer: Tokenizer,
    cache_dir: Path,
    *,
    progress: Progress | None = None,
    shard_tokens: int = SHARD_TOKENS,
) -> TokenCache:
    """Open the cache of this text and tokenizer, or build it, or finish building it.

    A damaged cache is built again with one line of warning; of several processes one builds and the others wait.
    Raises CorpusError, and TokenizerError for text the tokenizer cannot encode.
    """
    settings = [FORMAT, corpus.fingerprint(), tokenizer.fingerprint, shard_tokens]
    key = hashlib.sha256(json.dumps(settings).encode()).hexdigest()
    folder = cache_dir / f"{re.sub(r'[^A-Za-z0-9._-]+', '-', corpus.name)}-{key[:16]}"
    for place in (cache_dir, folder):
        if why := stranger(place):
            raise CorpusError(
                f"the token cache '{place}' is not trusted, because {why}: choose a place of your own with "
                "--data.cache_dir"
            )
    try:
        with suppress(CorpusError):
            return _open(folder, key)
        cache_dir.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):
            if (folder / MANIFEST).exists():
                try:
                    return _open(folder, key)
                except CorpusError as e:
                    _log.warning("%s; the text is tokenised again", e)
                    shutil.rmtree(folder)
            _build(corpus, tokenizer, folder, key, shard_tokens, progress)
            return _open(folder, key)
    except OSError as e:
        raise CorpusError(
            f"the token cache '{folder}' cannot be written or read: {e.strerror or e}; choose another place with "
            "--data.cache_dir"
        ) from None


# ---------------------------------------------------------------- what a manifest may say

_Number = Annotated[int, Field(ge=0, lt=2**48)]
_Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class _Checked(BaseModel):
    """A manifest is a file like any other: types, ranges and names are checked before they are used."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


class _Entry(_Checked):
    tokens: Annotated[_Number, Field(ge=1)]
    documents: _Number
    bytes: _Number
    words: _Number
    lines: _Number
    closes: bool
    sha256: _Digest
    docs_sha256: _Digest


class _Made(_Checked):
    name: str
    fingerprint: str
    vocab_size: _Number
    separator_id: _Number


class _Manifest(_Checked):
    format: Literal[1]
    fingerprint: str
    corpus: dict[str, str]
    tokenizer: _Made
    dtype: Literal["<u2", "<u4"]
    splits: dict[Annotated[str, Field(pattern=r"^\w+$")], list[_Entry]]


# ---------------------------------------------------------------- opening


def _open(folder: Path, key: str) -> TokenCache:
    """The cache in ``folder``. Raises CorpusError when it is damaged."""
    manifest = _manifest(folder / MANIFEST, key)
    if manifest is None:
        raise CorpusError(_damaged(folder / MANIFEST))
    dtype, separator_id = manifest["dtype"], manifest["tokenizer"]["separator_id"]
    splits = {name: _split(folder, name, entries, dtype, separator_id) for name, entries in manifest["splits"].items()}
    shards = [shard for split in splits.values() for shard in split.shards]
    small = sum(shard.size for shard in shards) <= VERIFIED_BYTES
    for shard in shards:
        if not _is_intact(shard.path, shard.size, shard.sha256 if small else None):
            raise CorpusError(_damaged(shard.path))
    return TokenCache(folder, splits, key)


def _manifest(path: Path, key: str) -> dict[str, Any] | None:
    """A manifest of this key, or nothing."""
    try:
        if not lies_within(path, path.parent):
            return None
        manifest = _Manifest.model_validate_json(path.read_bytes())
    except (OSError, ValidationError):
        return None
    return manifest.model_dump() if manifest.fingerprint == key else None


def _split(folder: Path, name: str, entries: list[dict[str, Any]], dtype: str, separator_id: int) -> TokenSplit:
    shards = tuple(
        Shard(folder / _file(name, i), entry["tokens"], dtype, entry["sha256"]) for i, entry in enumerate(entries)
    )
    starts, offset = [], 0
    for i, (shard, entry) in enumerate(zip(shards, entries, strict=True)):
        path = folder / _file(f"{name}-docs", i)
        if not _is_intact(path, 8 * entry["documents"], entry["docs_sha256"]):
            raise CorpusError(_damaged(path))
        inside = np.fromfile(path, dtype="<i8")
        if len(inside) and not (inside[0] > 0 and (np.diff(inside) > 0).all() and inside[-1] < shard.n_tokens):
            raise CorpusError(_damaged(path))
        starts.append(inside + offset)
        offset += shard.n_tokens
    n_bytes, n_words, n_lines = (sum(entry[count] for entry in entries) for count in ("bytes", "words", "lines"))
    return TokenSplit(name, shards, np.concatenate(starts), separator_id, n_bytes, n_words, n_lines)


def _is_intact(path: Path, size: int, sha256: str | None) -> bool:
    """Whether a file has this size and, where it is given, this digest."""
    try:
        same_size = lies_within(path, path.parent) and path.stat().st_size == size
        if not same_size or sha256 is None:
            return same_size
        with path.open("rb") as file:
            digest = hashlib.sha256()
            while block := file.read(2**20):
                digest.update(block)
        return digest.hexdigest() == sha256
    except FileNotFoundError:
        return False


def _damaged(path: Path) -> str:
    return f"the token cache '{path.parent}' is damaged: {path.name} is not what was written"


# ---------------------------------------------------------------- building


def _build(
    corpus: Corpus, tokenizer: Tokenizer, folder: Path, key: str, shard_tokens: int, progress: Progress | None
) -> None:
    """Write what is missing of every split, then the manifest."""
    folder.mkdir(parents=True, exist_ok=True)
    manifest = _manifest(folder / BUILDING, key) or {
        "format": FORMAT,
        "fingerprint": key,
        "corpus": {"name": corpus.name, "description": corpus.description, "fingerprint": corpus.fingerprint()},
        "tokenizer": {
            "name": tokenizer.name,
            "fingerprint": tokenizer.fingerprint,
            "vocab_size": tokenizer.vocab_size,
            "separator_id": tokenizer.separator_id,
        },
        "dtype": np.dtype(tokenizer.dtype).newbyteorder("<").str,
        "splits": {split: [] for split in corpus.splits},
    }
    for split in corpus.splits:
        entries = manifest["splits"][split]
        if entries and entries[-1]["closes"]:
            continue
        done = sum(entry["documents"] for entry in entries)
        total = sum(entry["tokens"] for entry in entries)
        documents = islice(corpus.documents(split), done, None)
        for shard in _shards(encoded(documents, tokenizer), tokenizer, shard_tokens):
            entries.append(shard.write(folder, split, len(entries), manifest["dtype"]))
            total += len(shard.ids)
            write_atomically(folder / BUILDING, json.dumps(manifest, indent=1))
            if progress:
                progress(split, total)
    for left in folder.glob(f"{BUILDING}.partial-*"):  # by a process that was killed
        left.unlink(missing_ok=True)
    (folder / BUILDING).replace(folder / MANIFEST)
    flush_folder(folder)


@dataclass(frozen=True)
class _NewShard:
    """Whole documents of one split, about to be written."""

    ids: Ids
    starts: npt.NDArray[np.int64]
    texts: tuple[int, int, int]
    """Bytes, words, lines."""
    closes: bool
    """Whether it ends the split."""

    def write(self, folder: Path, split: str, index: int, dtype: str) -> dict[str, Any]:
        """Write both files and flush them; returns their entry in the manifest."""
        n_bytes, n_words, n_lines = self.texts
        return {
            "tokens": len(self.ids),
            "documents": len(self.starts),
            "bytes": n_bytes,
            "words": n_words,
            "lines": n_lines,
            "closes": self.closes,
            "sha256": _write(folder / _file(split, index), self.ids.astype(dtype, copy=False)),
            "docs_sha256": _write(folder / _file(f"{split}-docs", index), self.starts.astype("<i8", copy=False)),
        }


def _shards(documents: Iterator[tuple[str, list[Ids]]], tokenizer: Tokenizer, shard_tokens: int) -> Iterator[_NewShard]:
    """Gather documents, a separator before each, until a shard is full. Where it ends depends on nothing else,
    so a resumed build writes the bytes of an uninterrupted one."""
    separator = np.array([tokenizer.separator_id], dtype=tokenizer.dtype)
    parts: list[Ids] = []
    starts: list[int] = []
    length, counts = 0, np.zeros(3, dtype=np.int64)

    def shard(closes: bool) -> _NewShard:
        ids = np.concatenate([*parts, *[separator] * closes])
        n_bytes, n_words, n_lines = map(int, counts)
        return _NewShard(ids, np.array(starts, dtype=np.int64), (n_bytes, n_words, n_lines), closes)

    for text, pieces in documents:
        starts.append(length + 1)
        parts += [separator, *pieces]
        length += 1 + sum(map(len, pieces))
        counts += (len(text.encode()), len(text.split()), text.count("\n"))
        if length >= shard_tokens:
            yield shard(closes=False)
            parts, starts, length = [], [], 0
            counts[:] = 0
    yield shard(closes=True)


# ---------------------------------------------------------------- files


def _file(name: str, index: int) -> str:
    return f"{name}-{index:05d}.bin"


def _write(path: Path, values: npt.NDArray[Any]) -> str:
    """Write and flush; returns the sha256."""
    data = values.tobytes()
    write_durably(path, data)
    return hashlib.sha256(data).hexdigest()
