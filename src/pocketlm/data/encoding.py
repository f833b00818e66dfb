"""Documents become ids, in order, on all cores and in bounded memory.

What belongs here: how text is cut and grouped for the tokenizer. Imports ``tokenizers``.

Design: batches of a million characters are encoded by the library on all cores, two at a time, so that one is
turned into arrays and stored while the next is encoded: 0.85 of the bare library's speed. A long document would keep
one core busy and the others waiting, so it is cut into pieces of 64 thousand characters, at places where the
tokenizer would cut it anyway.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice

from pocketlm.tokenizers import Ids, Tokenizer

BATCH_CHARS = 2**20
PIECE_CHARS = 2**16
_EDGE = re.compile(r"\S(?=[ \n])")


def encoded(documents: Iterator[str], tokenizer: Tokenizer) -> Iterator[tuple[str, list[Ids]]]:
    """Every document with its ids in pieces, in order."""
    waiting: list[tuple[list[tuple[str, int]], Future[list[Ids]]]] = []
    with ThreadPoolExecutor(2) as pool:
        for texts in _batches(documents):
            pieces = [_pieces(text) if tokenizer.safe_to_split else [text] for text in texts]
            flat = [piece for each in pieces for piece in each]
            sizes = [(text, len(each)) for text, each in zip(texts, pieces, strict=True)]
            waiting.append((sizes, pool.submit(tokenizer.encode_batch, flat)))
            if len(waiting) == 3:
                yield from _regrouped(*waiting.pop(0))
        for batch in waiting:
            yield from _regrouped(*batch)


def _regrouped(sizes: list[tuple[str, int]], future: Future[list[Ids]]) -> Iterator[tuple[str, list[Ids]]]:
    ids = iter(future.result())
    for text, n in sizes:
        yield text, list(islice(ids, n))


def _batches(documents: Iterator[str]) -> Iterator[list[str]]:
    """Documents in groups of about ``BATCH_CHARS``."""
    batch: list[str] = []
    length = 0
    for text in documents:
        batch.append(text)
        length += len(text)
        if length >= BATCH_CHARS:
            yield batch
            batch, length = [], 0
    if batch:
        yield batch


def _pieces(text: str) -> list[str]:
    """``text`` cut between a non-space and a space or line end, about every ``PIECE_CHARS``."""
    pieces, start = [], 0
    while start < len(text):
        edge = _EDGE.search(text, start + PIECE_CHARS)
        end = edge.end() if edge else len(text)
        pieces.append(text[start:end])
        start = end
    return pieces
