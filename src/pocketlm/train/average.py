"""A moving average of the weights.

What belongs here: the average, and putting it in the weights' place for a while. Imports only torch.

Design: the decay rises from 0.1 to its setting, min(decay, (1 + n) / (10 + n)) after n updates, so that the random
weights of the start are soon forgotten; n is the run's step, so there is nothing to save but the tensors.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class Average:
    """Exponential moving average of every parameter of ``model`` (Polyak and Juditsky, 1992), in fp32."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.tensors: dict[str, Tensor] = {name: p.detach().clone() for name, p in model.named_parameters()}

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Take in the weights after optimiser step ``step`` (1-based)."""
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(self.tensors.values()), [p.detach() for p in model.parameters()], 1 - decay)

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Become these. Raises KeyError or RuntimeError when they have other names or shapes."""
        for name, tensor in self.tensors.items():
            tensor.copy_(tensors[name])

    @contextmanager
    def in_place(self, model: nn.Module) -> Iterator[None]:
        """The model holds the average inside this block, and its own weights again after it."""
        kept = {name: p.data for name, p in model.named_parameters()}
        try:
            for name, p in model.named_parameters():
                p.data = self.tensors[name]
            yield
        finally:
            for name, p in model.named_parameters():
                p.data = kept[name]
