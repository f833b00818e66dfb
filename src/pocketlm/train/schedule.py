"""Learning rate as a pure function of the step.

What belongs here: the shapes. Imports only ``config``.

Design: nothing to save and nothing to restore. The loop writes ``peak * lr_factor(step)`` into the
optimisers before every step, so a resumed optimiser cannot bring an old rate back.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from pocketlm.config import ScheduleConfig


def lr_factor(step: int, total: int, config: ScheduleConfig) -> float:
    """Share of the peak learning rate in force at ``step`` (0-based) of ``total`` steps.

    Warm-up is linear and reaches 1 at its last step; the rest falls from 1 towards
    ``min_lr_ratio``, which it would reach at step ``total``.
    """
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    progress = min(1.0, (step - config.warmup_steps) / max(1, total - config.warmup_steps))
    floor = config.min_lr_ratio
    return floor + (1 - floor) * _SHAPES[config.name](progress, config)


def _wsd(progress: float, config: ScheduleConfig) -> float:
    """Warm-up, stable, decay with a linear end (Hu et al., 2024, MiniCPM; Hägele et al., 2024)."""
    return min(1.0, (1.0 - progress) / max(config.decay_fraction, 1e-9))


_SHAPES: dict[str, Callable[[float, ScheduleConfig], float]] = {
    "cosine": lambda progress, _: 0.5 * (1 + math.cos(math.pi * progress)),
    "linear": lambda progress, _: 1 - progress,
    "constant": lambda progress, _: 1.0,
    "wsd": _wsd,
}
