"""Documents of one file: plain text, jsonl, parquet.

What belongs here: decoding, and where a document begins. Imports ``errors``.

Design: plain text is decoded in pieces of 1 MiB and only ever cut, so a file's documents joined are the file's
text and nothing is lost or counted twice; no document is longer than about 16 million characters, which bounds memory
for files of any size. A byte order mark is dropped and ``\\r\\n`` and ``\\r`` become ``\\n``. Rows of jsonl and
parquet are one document each, verbatim. Documents without a visible character are left out.
"""

from __future__ import annotations

import codecs
import io
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

from pocketlm.errors import CorpusError, MissingExtraError

Keyed = tuple[str, str]
"""(what decides the split of a document, its text)."""
PIECE_BYTES = 2**20
LONGEST = 2**24
"""Characters in the longest document."""
JSONL_SUFFIXES = (".jsonl", ".ndjson")
_TITLE = re.compile(r" = [^=\s].* = \n?")


def read_documents(path: Path, *, key: str, unit: str, field: str, invalid: str) -> Iterator[Keyed]:
    """Documents of a file of any kind, by its suffix. Raises CorpusError, MissingExtraError.

    ``key`` names the file; documents of one file get keys of their own, unless the file is the document.
    ``unit`` is file, paragraph, line or article; ``field`` names the text of a row; ``invalid`` is refuse or replace.
    """
    if path.suffix in JSONL_SUFFIXES:
        texts = _jsonl(path, field, invalid)
    elif path.suffix == ".parquet":
        texts = _parquet(path, field)
    else:
        texts = cut(read_text(path, invalid), unit)
        if unit == "file":
            yield from ((key, text) for text in texts)
            return
    yield from ((f"{key}#{i}", text) for i, text in enumerate(texts) if text.strip())


def is_binary(path: Path) -> bool:
    """Whether the first 8 KiB hold a NUL byte, which text does not. Raises CorpusError when unreadable."""
    with _opened(path) as file:
        return b"\0" in file.read(8192)


def read_text(path: Path, invalid: str) -> Iterator[str]:
    """Decoded pieces of a text file. Raises CorpusError with the offset of the first byte that is not UTF-8."""
    decoder = codecs.getincrementaldecoder("utf-8")("strict" if invalid == "refuse" else "replace")
    newlines = io.IncrementalNewlineDecoder(None, translate=True)
    offset, first = 0, True
    with _opened(path) as file:
        while True:
            data = file.read(PIECE_BYTES)
            try:
                text = decoder.decode(data, final=not data)
            except UnicodeDecodeError as e:
                at = offset - (len(e.object) - len(data)) + e.start
                raise _not_utf8(path, f"byte {at} (0x{e.object[e.start]:02x})") from None
            if first:
                text, first = text.removeprefix("\ufeff"), not text
            offset += len(data)
            yield newlines.decode(text, final=not data)
            if not data:
                return


def cut(pieces: Iterable[str], unit: str) -> Iterator[str]:
    """Text in pieces -> documents. Joined they are the text, unless it is blank altogether.

    Blank lines belong to the document before them, at the start of a text to the one after.
    """
    begins = _BEGINS[unit]
    blocks = _blocks(pieces)
    parts = blocks if unit == "file" else chain.from_iterable(map(io.StringIO, blocks))
    document: list[str] = []
    length, blank, before = 0, True, ""
    part = next(parts, "")
    while part:
        after = next(parts, "")
        if not blank and (length + len(part) > LONGEST or begins(before, part, after)):
            yield "".join(document)
            document, length, blank = [], 0, True
        document.append(part)
        length, blank = length + len(part), blank and not part.strip()
        before, part = part, after
    if not blank:
        yield "".join(document)


def _never(before: str, line: str, after: str) -> bool:
    return False


def _line(before: str, line: str, after: str) -> bool:
    return bool(line.strip())


def _paragraph(before: str, line: str, after: str) -> bool:
    return bool(line.strip()) and not before.strip()


def _article(before: str, line: str, after: str) -> bool:
    """A top-level WikiText title stands between blank lines; lines of the same form inside a text do not."""
    return _TITLE.fullmatch(line) is not None and not before.strip() and not after.strip()


_BEGINS: Mapping[str, Callable[[str, str, str], bool]] = {
    "file": _never,
    "line": _line,
    "paragraph": _paragraph,
    "article": _article,
}


def _blocks(pieces: Iterable[str]) -> Iterator[str]:
    """The same text, every piece of it ending a line, unless a line is longer than ``LONGEST``."""
    rest = ""
    for piece in pieces:
        rest += piece
        end = rest.rfind("\n") + 1 or (len(rest) if len(rest) >= LONGEST else 0)
        if end:
            yield rest[:end]
            rest = rest[end:]
    if rest:
        yield rest


def _jsonl(path: Path, field: str, invalid: str) -> Iterator[str]:
    errors = "strict" if invalid == "refuse" else "replace"
    with _opened(path) as file:
        for number, line in enumerate(file, 1):
            where = f"line {number} of '{path}'"
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8", errors)
            except UnicodeDecodeError as e:
                raise _not_utf8(path, f"byte {e.start} of line {number}") from None
            if not text.strip():
                continue
            try:
                row = json.loads(text)
            except (ValueError, RecursionError) as e:
                raise CorpusError(f"{where} is not JSON: {e}") from None
            yield _field(row, field, where, path, invalid)


def _field(row: Any, field: str, where: str, path: Path, invalid: str) -> str:
    """The text of a JSON row; null counts as empty."""
    if not isinstance(row, dict):
        raise CorpusError(f"{where} holds no JSON object with a text, but {row!r:.60}")
    if field not in row:
        raise _no_field(where, field, row)
    text = row[field] or ""
    if not isinstance(text, str):
        raise CorpusError(f"{where}: '{field}' holds no text, but {text!r:.60}: name another with --data.text_field")
    if not text.isascii() and any("\ud800" <= c <= "\udfff" for c in text):
        if invalid == "refuse":
            raise _not_utf8(path, f"half a surrogate pair in line {where.split()[1]}")
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def _parquet(path: Path, field: str) -> Iterator[str]:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise MissingExtraError("pyarrow", "data", f"reading '{path}'") from None
    try:
        with pq.ParquetFile(path) as file:
            schema = file.schema_arrow
            if field not in schema.names:
                raise _no_field(f"'{path}'", field, schema.names)
            kind = schema.field(field).type
            if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
                raise CorpusError(
                    f"'{path}': the column '{field}' holds {kind}, not text: name another with --data.text_field"
                )
            batches = file.iter_batches(columns=[field], batch_size=1024)
            yield from (text or "" for text in chain.from_iterable(batch.column(0).to_pylist() for batch in batches))
    except (pa.ArrowException, OSError, UnicodeDecodeError) as e:
        raise CorpusError(f"'{path}' cannot be read as parquet: {' '.join(str(e).split()):.200}") from None


def _opened(path: Path) -> io.BufferedReader:
    try:
        return path.open("rb")
    except OSError as e:
        raise CorpusError(f"'{path}' cannot be read: {e.strerror or e}") from None


def _not_utf8(path: Path, where: str) -> CorpusError:
    return CorpusError(
        f"'{path}' is not UTF-8 text at {where}: convert it, or pass --data.invalid_utf8 replace to put U+FFFD there"
    )


def _no_field(where: str, field: str, seen: Iterable[str]) -> CorpusError:
    names = ", ".join(map(str, seen))
    return CorpusError(f"{where} has no '{field}', only {names or 'nothing'}: name the text with --data.text_field")
