"""The order of an epoch: which targets stand in which row of which micro-batch.

What belongs here: pure functions from lengths to plans, no tokens and no tensors. Imports nothing of pocketlm.

Design: a plan is three arrays - spans of targets, spans grouped into rows, rows grouped into batches - and depends on
nothing but its arguments, so a position in the data is two numbers and resuming costs nothing. Whatever the mode,
every token of the stream but the first is a target exactly once. Packing is best-fit decreasing with the free space
of rows as a bit mask: 100 thousand documents in 0.04 s.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Plan:
    """Spans, rows and batches of one epoch, in the order in which they are used."""

    spans: Ints
    """(n_spans, 2) half-open ranges of targets; the inputs of [a, b) are [a - 1, b - 1)."""
    rows: Ints
    """(n_rows + 1,) row r holds spans[rows[r]:rows[r + 1]] one after the other."""
    batches: Ints
    """(n_batches + 1,) batch i holds rows batches[i]:batches[i + 1]."""
    widths: Ints
    """(n_batches,) T of each batch."""

    @property
    def n_batches(self) -> int:
        """Micro-batches in the epoch."""
        return len(self.widths)

    def n_targets(self, i: int) -> int:
        """Targets of batch ``i``."""
        first, end = self.rows[self.batches[i]], self.rows[self.batches[i + 1]]
        return int(np.diff(self.spans[first:end]).sum())

    @cached_property
    def useful_share(self) -> float:
        """Targets / cells."""
        return float(np.diff(self.spans).sum() / (np.diff(self.batches) * self.widths).sum())


def stream(n_stored: int, width: int, batch_size: int, random: np.random.Generator | None) -> Plan:
    """Windows of ``width`` targets over the whole stream. ``random`` moves their edges and shuffles them."""
    phase = int(random.integers(width)) if random else 0
    edges = np.unique(np.r_[1, np.arange(1 + phase, n_stored, width), n_stored])
    spans = np.stack([edges[:-1], edges[1:]], axis=1)
    return _one_span_a_row(spans if random is None else random.permutation(spans), width, batch_size)


def pad(pieces: Ints, width: int, batch_size: int, random: np.random.Generator | None) -> Plan:
    """Every piece in a row of its own, padded to ``width``."""
    return _one_span_a_row(pieces if random is None else random.permutation(pieces), width, batch_size)


def bucket(pieces: Ints, width: int, batch_size: int, random: np.random.Generator | None) -> Plan:
    """Pieces of like length together: as many rows as fit ``batch_size * width`` cells, T the longest of them."""
    pieces = _longest_first(pieces, random)
    lengths = np.diff(pieces)[:, 0].tolist()
    edges = [0]
    while edges[-1] < len(lengths):
        edges.append(min(len(lengths), edges[-1] + batch_size * width // lengths[edges[-1]]))
    order = np.arange(len(edges) - 1) if random is None else random.permutation(len(edges) - 1)
    sizes = np.diff(edges)[order]
    firsts = np.array(edges[:-1])[order]
    spans = pieces[ranges(firsts, sizes)]
    return Plan(spans, np.arange(len(spans) + 1), _edges(sizes), np.array(lengths)[firsts])


def pack(pieces: Ints, width: int, batch_size: int, random: np.random.Generator | None) -> Plan:
    """Whole pieces side by side in rows of ``width``, best-fit decreasing."""
    pieces = _longest_first(pieces, random)
    row = np.array(best_fit(np.diff(pieces)[:, 0].tolist(), width))
    n_rows = int(row.max()) + 1
    if random is not None:
        row = random.permutation(n_rows)[row]
    rows = _edges(np.bincount(row, minlength=n_rows))
    return Plan(pieces[np.argsort(row, kind="stable")], rows, *_equal_batches(n_rows, width, batch_size))


def best_fit(lengths: list[int], width: int) -> list[int]:
    """The row of every length, each put into the fullest row that has room for it.

    Bit s of ``free`` says that some row has exactly s cells left, so the fullest is the lowest bit from the length up.
    """
    rows_by_space: list[list[int]] = [[] for _ in range(width + 1)]
    free, n_rows, chosen = 0, 0, []
    for length in lengths:
        assert 0 < length <= width, f"a piece of {length} in rows of {width}"
        fitting = free >> length
        if fitting:
            space = length + (fitting & -fitting).bit_length() - 1
            row = rows_by_space[space].pop()
            if not rows_by_space[space]:
                free ^= 1 << space
        else:
            space, row = width, n_rows
            n_rows += 1
        if space > length:
            rows_by_space[space - length].append(row)
            free |= 1 << (space - length)
        chosen.append(row)
    return chosen


def pieces_of_documents(starts: Ints, n_stored: int, width: int) -> Ints:
    """(n_documents,) first tokens -> (n_pieces, 2) spans of at most ``width`` targets that cross no document's edge.

    A document's targets are its tokens and the separator after it, predicted from the separator before it.
    """
    ends = np.append(starts[1:], n_stored)
    counts = -((starts - ends) // width)
    firsts = np.repeat(starts, counts) + width * ranges(np.zeros_like(counts), counts)
    return np.stack([firsts, np.minimum(firsts + width, np.repeat(ends, counts))], axis=1)


def ranges(firsts: Ints, counts: Ints) -> Ints:
    """``firsts[i] .. firsts[i] + counts[i] - 1`` for every i, one after the other."""
    before = np.cumsum(counts) - counts
    return np.repeat(firsts - before, counts) + np.arange(int(counts.sum()))


def _longest_first(pieces: Ints, random: np.random.Generator | None) -> Ints:
    """Sorted by falling length, ties in random order."""
    pieces = pieces if random is None else random.permutation(pieces)
    return pieces[np.argsort(-np.diff(pieces)[:, 0], kind="stable")]


def _one_span_a_row(spans: Ints, width: int, batch_size: int) -> Plan:
    return Plan(spans, np.arange(len(spans) + 1), *_equal_batches(len(spans), width, batch_size))


def _equal_batches(n_rows: int, width: int, batch_size: int) -> tuple[Ints, Ints]:
    """Batches of ``batch_size`` rows, the last one smaller, and their widths."""
    edges = np.append(np.arange(0, n_rows, batch_size), n_rows)
    return edges, np.full(len(edges) - 1, width)


def _edges(sizes: Ints) -> Ints:
    return np.concatenate([[0], np.cumsum(sizes)])
