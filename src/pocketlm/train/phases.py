"""The phases of a run: which settings, text and batches are in force at which step.

What belongs here: from the configuration's phases to stretches of steps, and where in the text each begins.
Imports ``errors``, ``config``, ``data``, ``tokenizers``.

Design: which phase a step belongs to, its learning rate and its data are functions of the step alone, so a resume in
any phase, or on the very edge of two, has nothing to remember. A configuration without phases is one phase.
"""

from __future__ import annotations

from dataclasses import dataclass

from pocketlm.config import Config, PhaseConfig
from pocketlm.data.corpora import Corpus, open_corpus
from pocketlm.data.loader import Loader, Position
from pocketlm.data.shards import TokenCache, prepare
from pocketlm.tokenizers import Tokenizer
from pocketlm.train.schedule import lr_factor


@dataclass(frozen=True)
class Phase:
    """Steps ``first`` to ``end`` (exclusive, 0-based) under one set of settings."""

    number: int
    """1-based."""
    config: Config
    first: int
    end: int
    corpus: Corpus
    cache: TokenCache
    loader: Loader

    @property
    def steps(self) -> int:
        """Its length."""
        return self.end - self.first

    def lr(self, step: int) -> float:
        """Learning rate in force at ``step`` of the run."""
        return self.config.optimizer.lr * lr_factor(step - self.first, self.steps, self.config.schedule)

    def has_text_of(self, other: Phase) -> bool:
        """Whether both train on the same tokens."""
        return self.cache.fingerprint == other.cache.fingerprint

    def begin(self, before: Phase, position: Position) -> Position:
        """Where this phase starts when the one before it ended at ``position``.

        The same text in the same batches goes on as if nothing had happened; in other batches it goes on with the next
        epoch, whose order is new; other text starts at its beginning.
        """
        if not self.has_text_of(before):
            return Position()
        if _batches(self.config) == _batches(before.config):
            return position
        return Position(position.epoch + 1) if position.index else position


def plan(config: Config, tokenizer: Tokenizer, first: tuple[Corpus, TokenCache]) -> list[Phase]:
    """The phases of ``config`` in order; ``first`` is the text of its first. Raises PocketError."""
    phases: list[Phase] = []
    settings = [config.phase(i) for i in range(len(config.phases))] or [config]
    for number, each in enumerate(settings, 1):
        corpus, cache = first
        if each.data != settings[0].data:
            corpus = open_corpus(each.data, mirror=each.data.mirror_folder)
            cache = prepare(corpus, tokenizer, each.data.cache_folder)
        loader = Loader(
            cache.splits["train"],
            mode=each.data.mode,
            block_size=each.window,
            batch_size=each.training.batch_size,
            seed=each.training.seed,
        )
        steps = each.training.steps or steps_for_epochs(loader, each.training.epochs or 1.0, each.training.grad_accum)
        begins = phases[-1].end if phases else 0
        each = each.model_copy(update={"training": each.training.replace(steps=steps)})
        phases.append(Phase(number, each, begins, begins + steps, corpus, cache, loader))
    return phases


def settled(config: Config, phases: list[Phase]) -> Config:
    """``config`` with the number of steps of every phase written down."""
    if not config.phases:
        return config.model_copy(update={"training": config.training.replace(steps=phases[0].steps)})
    stated = [
        PhaseConfig(**{**layer.model_dump(), "training": {**layer.training, "steps": phase.steps}})
        for layer, phase in zip(config.phases, phases, strict=True)
    ]
    return config.model_copy(update={"phases": tuple(stated)})


def steps_for_epochs(loader: Loader, epochs: float, grad_accum: int) -> int:
    """Optimiser steps that ``epochs`` passes need; a fraction counts in micro-batches of its epoch."""
    whole = int(epochs)
    batches = sum(loader.batches_in_epoch(epoch) for epoch in range(whole))
    batches += round((epochs - whole) * loader.batches_in_epoch(whole))
    return max(1, -(-batches // grad_accum))


def _batches(config: Config) -> tuple[object, ...]:
    """What decides how tokens fall into micro-batches."""
    return config.data.mode, config.window, config.training.batch_size, config.training.seed
