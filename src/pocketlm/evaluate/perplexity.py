"""Loss, perplexity per token and per word, and bits per byte of a whole split.

What belongs here: which windows are scored, and the sums. Imports ``data``, ``model``.

Design: every token of the text is scored exactly once, with at least ``context - stride`` tokens before it
(fewer at the start). Separators are context, never scored, so the sum of losses is that of
the text's bytes and words and may be divided by their number: the same model reads 29, 37 or
600 on WikiText-2 by protocol, so the protocol is part of the result.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch

from pocketlm.config import IGNORE
from pocketlm.data.shards import TokenSplit
from pocketlm.model.transformer import Transformer


@dataclass(frozen=True)
class Evaluation:
    """Sums over a split, and what they mean."""

    split: str
    nats: float
    """Sum of negative log-likelihoods."""
    n_tokens: int
    n_words: int
    """Whitespace-separated words, and a line end each: WikiText's own count."""
    n_bytes: int
    context: int
    stride: int
    within_documents: bool
    """Whether context ends at a document's start, as in training by documents."""

    @property
    def loss(self) -> float:
        """Mean loss in nats a token."""
        return self.nats / self.n_tokens

    @property
    def perplexity(self) -> float:
        """Per token of this tokenizer; not comparable between tokenizers."""
        return _exp(self.loss)

    @property
    def word_perplexity(self) -> float:
        """Per word, the line end counted as one (Merity et al., 2017)."""
        return _exp(self.nats / self.n_words)

    @property
    def bits_per_byte(self) -> float:
        """Per byte of the UTF-8 text; comparable between tokenizers."""
        return self.nats / math.log(2) / self.n_bytes

    def protocol(self) -> str:
        """How it was measured, in one sentence."""
        windows = "without overlap" if self.stride == self.context else f"every {self.stride} tokens"
        where = "inside each document" if self.within_documents else "over the whole text"
        return (
            f"{self.n_tokens:,} tokens scored once each, windows of {self.context} {windows} {where}; "
            f"{self.n_words:,} words (line ends counted), {self.n_bytes:,} bytes"
        )

    def to_dict(self) -> dict[str, Any]:
        """Numbers and protocol, JSON-ready."""
        return {
            "loss": self.loss,
            "perplexity": self.perplexity,
            "word_perplexity": self.word_perplexity,
            "bits_per_byte": self.bits_per_byte,
            **asdict(self),
            "protocol": self.protocol(),
        }


def evaluate(
    model: Transformer,
    split: TokenSplit,
    *,
    name: str,
    context: int,
    stride: int,
    batch_size: int,
    within_documents: bool,
    device: torch.device,
    check: Callable[[], None] = lambda: None,
) -> Evaluation:
    """Score every text token of ``split``. Leaves the model in the mode it was in.

    ``batch_size`` bounds the tokens held at once to ``batch_size * context``. ``check`` is called before every batch
    and may raise to end it.
    """
    spans = [(0, split.n_stored)]
    if within_documents:
        starts = split.starts
        ends = np.append(starts[1:], split.n_stored)
        spans = [(int(a) - 1, int(b)) for a, b in zip(starts, ends, strict=True)]
    windows = sorted(_windows(spans, context, stride), key=lambda w: w[0] - w[2])
    nats, scored = 0.0, 0
    training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            for batch in _batches(windows, batch_size * context):
                check()
                inputs, targets = _rows(split, batch)
                scored += int((targets != IGNORE).sum())
                nats += float(model.loss(inputs.to(device), targets.to(device)))
    finally:
        model.train(training)
    return Evaluation(
        split=name,
        nats=nats,
        n_tokens=scored,
        n_words=split.n_words + split.n_lines,
        n_bytes=split.n_bytes,
        context=context,
        stride=stride,
        within_documents=within_documents,
    )


def sum_up(parts: Sequence[Evaluation]) -> Evaluation:
    """Several splits measured by one protocol as one."""
    first = parts[0]
    return replace(
        first,
        split=" + ".join(part.split for part in parts),
        nats=sum(part.nats for part in parts),
        n_tokens=sum(part.n_tokens for part in parts),
        n_words=sum(part.n_words for part in parts),
        n_bytes=sum(part.n_bytes for part in parts),
    )


Window = tuple[int, int, int]
"""(first input, first scored target, past the last target) as token indices."""


def _windows(spans: list[tuple[int, int]], context: int, stride: int) -> Iterator[Window]:
    """Cover targets ``[a + 1, b)`` of every span exactly once."""
    for a, b in spans:
        scored = a + 1
        while scored < b:
            end = min(b, scored + (context if scored == a + 1 else stride))
            yield max(a, end - 1 - context), scored, end
            scored = end


def _batches(windows: list[Window], budget: int) -> Iterator[list[Window]]:
    """Windows, longest first, in groups of at most ``budget`` cells."""
    batch: list[Window] = []
    for window in windows:
        longest = batch[0][2] - 1 - batch[0][0] if batch else 0
        if batch and longest * (len(batch) + 1) > budget:
            yield batch
            batch = []
        batch.append(window)
    if batch:
        yield batch


def _rows(split: TokenSplit, batch: list[Window]) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and targets (B, T) int64, padded on the right; separators and mere context are IGNORE."""
    longest = max(end - 1 - first for first, _, end in batch)
    inputs = torch.zeros(len(batch), longest, dtype=torch.int64)
    targets = torch.full((len(batch), longest), IGNORE, dtype=torch.int64)
    for row, (first, scored, end) in enumerate(batch):
        tokens = torch.from_numpy(split.read(first, end).astype(np.int64))
        inputs[row, : end - 1 - first] = tokens[:-1]
        shifted = tokens[1:].clone()
        shifted[shifted == split.separator_id] = IGNORE
        shifted[: scored - first - 1] = IGNORE
        targets[row, : end - 1 - first] = shifted
    return inputs, targets


def _exp(nats: float) -> float:
    """exp, with infinity where a float cannot hold it."""
    return math.exp(nats) if nats < 700 else math.inf
