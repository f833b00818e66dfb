"""All that a run needs to go on as if it had never stopped.

What belongs here: the one object that owns it, and its form as named tensors and JSON values.
Imports ``config``, ``data``, ``model``, ``train.optim``.

Design: what is saved is this object and nothing beside it. Learning rate and the order of the data are not
in it: they are pure functions of the step, and of (seed, epoch, position).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

from pocketlm.data.loader import Position
from pocketlm.model.transformer import Transformer
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
    """Weights, optimiser, loss scaler, random generators and progress of a run."""

    model: Transformer
    optimizers: Optimizers
    scaler: torch.amp.GradScaler
    progress: Progress = field(default_factory=Progress)

    def training_tensors(self) -> dict[str, Tensor]:
        """Everything but the weights that is a tensor: optimiser state and random generators."""
        tensors = {f"optimizer/{name}": value for name, value in self.optimizers.tensors().items()}
        tensors["random/cpu"] = torch.get_rng_state()
        if next(self.model.parameters()).device.type == "cuda":
            tensors["random/cuda"] = torch.cuda.get_rng_state()
        return tensors

    def values(self) -> dict[str, Any]:
        """Everything that is not a tensor, as JSON values."""
        return {"progress": self.progress.to_dict(), "scaler": self.scaler.state_dict()}

    def restore(self, weights: Mapping[str, Tensor], training: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """Become the saved state. Raises KeyError, TypeError or RuntimeError when it has another form."""
        self.model.load_state_dict(dict(weights))
        prefix = "optimizer/"
        self.optimizers.load_tensors({n.removeprefix(prefix): t for n, t in training.items() if n.startswith(prefix)})
        if values["scaler"]:
            self.scaler.load_state_dict(dict(values["scaler"]))
        self.progress = Progress.from_dict(values["progress"])
        torch.set_rng_state(training["random/cpu"])
        if "random/cuda" in training and torch.cuda.is_available():
            torch.cuda.set_rng_state(training["random/cuda"])
