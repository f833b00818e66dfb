"""Micro-batches of a split, each with the position after it.

What belongs here: the one place where inputs are shifted to targets. Imports ``errors``, ``config``, ``data.batching``,
``data.shards``.

Design: the loader has no state. An epoch's order is a pure function of (seed, epoch), so ``batches(position)``
continues anywhere at once: nothing is replayed, and the position that comes with a batch is all that a checkpoint
has to keep. A batch of 8 x 512 is gathered in 0.2 ms, so there are no worker processes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from pocketlm.config import IGNORE
from pocketlm.data import batching
from pocketlm.data.batching import Plan
from pocketlm.data.shards import TokenSplit
from pocketlm.errors import ConfigError, CorpusError


@dataclass(frozen=True)
class Batch:
    """A micro-batch. Rows are padded on the right: with separators in inputs, with IGNORE in targets."""

    inputs: Tensor
    """(B, T) int64"""
    targets: Tensor
    """(B, T) int64: the token after each input, or IGNORE."""
    document_ids: Tensor | None
    """(B, T) int32 where rows hold several documents: its number in the row; padding counts as one more."""
    n_targets: int
    """Cells that are scored."""

    def to(self, device: torch.device) -> Batch:
        """The same batch on ``device``."""
        documents = None if self.document_ids is None else self.document_ids.to(device, non_blocking=True)
        inputs, targets = (t.to(device, non_blocking=True) for t in (self.inputs, self.targets))
        return Batch(inputs, targets, documents, self.n_targets)

    def cut(self, pieces: int) -> list[Batch]:
        """The same rows in up to ``pieces`` smaller batches."""
        documents = [None] * pieces if self.document_ids is None else self.document_ids.chunk(pieces)
        parts = zip(self.inputs.chunk(pieces), self.targets.chunk(pieces), documents, strict=False)
        return [Batch(i, t, d, int((t != IGNORE).sum())) for i, t, d in parts]


@dataclass(frozen=True)
class Position:
    """The next micro-batch: its epoch and its place there. JSON-ready through ``dataclasses.asdict``."""

    epoch: int = 0
    index: int = 0


class Loader:
    """Endless micro-batches of a split. Raises CorpusError when it is shorter than one window."""

    def __init__(
        self,
        split: TokenSplit,
        *,
        mode: Literal["stream", "pack", "bucket", "pad"],
        block_size: int,
        batch_size: int,
        seed: int,
        shuffle: bool = True,
    ) -> None:
        if split.n_stored < block_size + 1:
            raise CorpusError(
                f"the {split.name} split has {split.n_stored:,} tokens, fewer than one window of {block_size:,} and "
                "the token after it: give more text, or a smaller --training.window"
            )
        self._split = split
        self._mode = mode
        self._block_size = block_size
        self._batch_size = batch_size
        self._seed = seed
        self._shuffle = shuffle
        self._plan = lru_cache(maxsize=2)(self._make_plan)

    def windows(
        self, start: Position, micro_batches: int, *, rank: int = 0, world: int = 1
    ) -> Iterator[tuple[list[Batch], int, Position]]:
        """Accumulation windows from ``start`` on: (micro-batches, targets of the whole window, position after it).

        Of ``world`` processes, ``rank`` gets micro-batches rank, rank + world, ... of every window, so the order of the
        data does not depend on their number. Raises ConfigError when ``micro_batches`` cannot be shared out evenly.
        """
        if micro_batches % world:
            raise ConfigError(
                f"training.grad_accum {micro_batches} cannot be shared out evenly among {world} processes: "
                f"use a multiple of {world}"
            )
        position = start
        while True:
            window: list[Batch] = []
            n_targets = 0
            for i in range(micro_batches):
                plan = self._plan(position.epoch)
                n_targets += plan.n_targets(position.index)
                if i % world == rank:
                    window.append(self._gather(plan, position.index))
                last = position.index + 1 == plan.n_batches
                position = Position(position.epoch + 1) if last else Position(position.epoch, position.index + 1)
            yield window, n_targets, position

    def batches(self, start: Position) -> Iterator[tuple[Batch, Position]]:
        """Micro-batches from ``start`` on, epoch after epoch, each with the position after it."""
        for (batch,), _, position in self.windows(start, 1):
            yield batch, position

    def batches_in_epoch(self, epoch: int) -> int:
        """Micro-batches of that epoch; in mode stream their number may differ by one between epochs."""
        return self._plan(epoch).n_batches

    def useful_share(self, epoch: int = 0) -> float:
        """Real targets / (B x T) cells of an epoch; what is missing to 1 is padding."""
        return self._plan(epoch).useful_share

    def _make_plan(self, epoch: int) -> Plan:
        random = np.random.Generator(np.random.PCG64([self._seed, epoch])) if self._shuffle else None
        width, n_stored = self._block_size, self._split.n_stored
        if self._mode == "stream":
            return batching.stream(n_stored, width, self._batch_size, random)
        make = {"pack": batching.pack, "bucket": batching.bucket, "pad": batching.pad}[self._mode]
        pieces = batching.pieces_of_documents(self._split.starts, n_stored, width)
        return make(pieces, width, self._batch_size, random)

    def _gather(self, plan: Plan, i: int) -> Batch:
        """Batch ``i`` of ``plan``. Spans of a row follow each other from its first cell on."""
        first_row, end_row, width = int(plan.batches[i]), int(plan.batches[i + 1]), int(plan.widths[i])
        edges = plan.rows[first_row : end_row + 1]
        spans = plan.spans[edges[0] : edges[-1]]
        lengths = spans[:, 1] - spans[:, 0]
        row_of_span = np.repeat(np.arange(end_row - first_row), np.diff(edges))
        filled = np.cumsum(lengths) - lengths
        column_of_span = filled - filled[edges[:-1] - edges[0]][row_of_span]
        cells = batching.ranges(row_of_span * width + column_of_span, lengths)
        tokens = batching.ranges(spans[:, 0], lengths)

        shape = (end_row - first_row, width)
        inputs = np.full(shape, self._split.separator_id, dtype=np.int64)
        targets = np.full(shape, IGNORE, dtype=np.int64)
        inputs.flat[cells] = self._split.take(tokens - 1)
        targets.flat[cells] = self._split.take(tokens)
        documents = None
        if self._mode == "pack":
            number = np.arange(len(spans)) - (edges[:-1] - edges[0])[row_of_span]
            ids = np.repeat(np.diff(edges).astype(np.int32)[:, None], width, axis=1)
            ids.flat[cells] = np.repeat(number, lengths)
            documents = torch.from_numpy(ids)
        return Batch(torch.from_numpy(inputs), torch.from_numpy(targets), documents, len(tokens))
