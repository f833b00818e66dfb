"""All that a run needs to go on as if it had never stopped.

What belongs here: the one object that owns it, and its form as named tensors and JSON values.
Imports ``config``, ``data``, ``model``, ``train.optim``, ``train.average``.

Design: what is saved is this object and nothing beside it. Learning rate and the order of the data are not
in it: they are pure functions of the step, and of (seed, epoch, position). It is saved right after an optimiser step,
before any validation or sample of that step, so whoever resumes does those again and gets the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

from pocketlm.data.loader import Position
from pocketlm.model.transformer import Transformer
from pocketlm.train.average import Average
from pocketlm.train.optim import Optimizers


@dataclass
class Progress:
    """How far a run has come. Every field is a JSON value."""

    step: int = 0
    """Optimiser steps done."""
    tokens: int = 0
    """Target tokens trained on."""
    position: Position = field(default_factory=Position)
    """Where the next micro-batch comes from."""
    seconds: float = 0.0
    """Time spent in training steps."""
    spent: dict[str, float] = field(default_factory=dict)
    """Wall-clock time of every kind, over all the run's processes."""
    pieces: int = 1
    """Pieces that a micro-batch is cut into, doubled when memory did not suffice."""
    skipped: int = 0
    """Steps whose update was left out."""
    skipped_in_row: int = 0
    recent_losses: list[float] = field(default_factory=list)
    """Of the newest steps, for telling a spike."""
    recent_norms: list[float] = field(default_factory=list)
    nats: float = 0.0
    """Training loss summed since the last validation."""
    nats_tokens: int = 0
    """Tokens it was summed over."""
    history: list[dict[str, float]] = field(default_factory=list)
    """Every validation of this phase's text: step, validation, train (the mean since the one before)."""
    best_loss: float | None = None
    """Lowest validation loss so far, in nats a token."""
    best_step: int | None = None
    validated_step: int | None = None
    """Step of the newest validation."""
    validation_loss: float | None = None
    """Its loss."""

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Progress:
        """The inverse of ``to_dict``. Raises KeyError or TypeError for values of another form."""
        known = {f.name: values[f.name] for f in fields(cls)}
        return cls(**{**known, "position": Position(**values["position"])})


@dataclass
class TrainState:
    """Weights, their average, optimiser, loss scaler, random generators and progress of a run."""

    model: Transformer
    optimizers: Optimizers
    scaler: torch.amp.GradScaler
    progress: Progress = field(default_factory=Progress)
    average: Average | None = None
    watching: dict[str, Any] = field(default_factory=dict)
    """What the observers need to go on, by observer; JSON values."""
    machine: dict[str, Any] = field(default_factory=dict)
    """What else decides the last bit: torch, threads, device, precision."""

    def averaged(self) -> AbstractContextManager[None]:
        """Inside this block the model holds the weights that are validated and used."""
        return self.average.in_place(self.model) if self.average else nullcontext()

    def training_tensors(self) -> dict[str, Tensor]:
        """Everything but the weights that is a tensor: optimiser state and random generators."""
        tensors = {f"optimizer/{name}": value for name, value in self.optimizers.tensors().items()}
        tensors["random/cpu"] = torch.get_rng_state()
        device = next(self.model.parameters()).device.type
        if device == "cuda":
            tensors["random/cuda"] = torch.cuda.get_rng_state()
        if device == "mps":
            tensors["random/mps"] = torch.mps.get_rng_state()
        return tensors

    def values(self) -> dict[str, Any]:
        """Everything that is not a tensor, as JSON values."""
        return {
            "progress": self.progress.to_dict(),
            "scaler": self.scaler.state_dict(),
            "watching": self.watching,
            "machine": self.machine,
        }

    def restore(
        self,
        weights: Mapping[str, Tensor],
        training: Mapping[str, Tensor],
        average: Mapping[str, Tensor] | None,
        values: Mapping[str, Any],
    ) -> None:
        """Become the saved state. Raises KeyError, TypeError, ValueError or RuntimeError when it has another form."""
        self.progress = Progress.from_dict(values["progress"])
        self.watching, self.machine = dict(values["watching"]), dict(values["machine"])
        self.model.load_state_dict(dict(weights))
        prefix = "optimizer/"
        self.optimizers.load_tensors({n.removeprefix(prefix): t for n, t in training.items() if n.startswith(prefix)})
        if self.average is not None:
            self.average.load(weights if average is None else average)
        if values["scaler"] and self.scaler.is_enabled():
            self.scaler.load_state_dict(dict(values["scaler"]))
        torch.set_rng_state(training["random/cpu"])
        if "random/cuda" in training and torch.cuda.is_available():
            torch.cuda.set_rng_state(training["random/cuda"])
        if "random/mps" in training and torch.backends.mps.is_available():
            torch.mps.set_rng_state(training["random/mps"])
