"""Is training still sane? Losses that are not finite, spikes, memorisation.

What belongs here: judgements on numbers, pure functions of ``Progress`` and the settings, and the diagnosis of a run
that diverged. Imports ``errors``, ``config``, ``data``, ``train.state``.

Design: the judgement falls between the gradient and the update, so nothing that is not finite ever reaches the weights.
Everything a later judgement depends on lies in ``Progress`` and is saved with it: a resumed run judges the same.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from pocketlm.config import SafetyConfig
from pocketlm.data.loader import Batch
from pocketlm.errors import RunError
from pocketlm.files import follow_umask, write_atomically
from pocketlm.train.state import Progress, TrainState

WINDOW, FEWEST = 128, 32
"""Steps that a spike is measured against, and the fewest that make a judgement."""
RISE = 1.005
"""A validation loss this many times the best one counts as risen."""


@dataclass(frozen=True)
class Verdict:
    """What becomes of a step's gradient."""

    update: bool
    """Whether the weights may take it."""
    finite: bool
    message: str | None = None
    """What a person should know."""


def judge(progress: Progress, loss: float, grad_norm: float, config: SafetyConfig, *, scaling: bool) -> Verdict:
    """Decide on the step after ``progress.step`` and note it there.

    scaling: whether fp16's loss scale is still being found, by overflows that are nothing to worry about.
    """
    step = progress.step + 1
    if not (math.isfinite(loss) and math.isfinite(grad_norm)):
        progress.skipped += 1
        progress.skipped_in_row += 1
        what = f"loss is {loss}" if not math.isfinite(loss) else f"gradient is not finite (loss {loss:.3f})"
        told = not scaling or not math.isfinite(loss)
        message = f"step {step}: the {what}; its update is left out ({progress.skipped} so far)"
        return Verdict(update=False, finite=False, message=message if told else None)
    progress.skipped_in_row = 0
    spikes = [
        f"{name} {value:.3g} is {z:.1f} standard deviations above that of the last {len(recent)} steps"
        for name, value, recent in (
            ("loss", loss, progress.recent_losses),
            ("gradient norm", grad_norm, progress.recent_norms),
        )
        if (z := z_score(value, recent)) >= config.spike_zscore
    ]
    progress.recent_losses = [*progress.recent_losses, loss][-WINDOW:]
    progress.recent_norms = [*progress.recent_norms, grad_norm][-WINDOW:]
    if not spikes:
        return Verdict(update=True, finite=True)
    end = "; its update is left out" if config.skip_spikes else ""
    progress.skipped += config.skip_spikes
    return Verdict(not config.skip_spikes, finite=True, message=f"spike at step {step}: {' and '.join(spikes)}{end}")


def z_score(value: float, recent: Sequence[float]) -> float:
    """Standard deviations of ``value`` above the mean of ``recent``; 0 while there are too few, or all are equal."""
    if len(recent) < FEWEST:
        return 0.0
    deviation = statistics.pstdev(recent)
    return (value - statistics.fmean(recent)) / deviation if deviation > 0 else 0.0


# ---------------------------------------------------------------- memorisation


def memorising(history: Sequence[dict[str, float]]) -> str | None:
    """A sentence once validation has risen twice in a row beyond its best while training went on falling."""
    if len(history) < 3:
        return None
    best = min(range(len(history)), key=lambda i: history[i]["validation"])
    after = history[best + 1 :]
    last = history[-1]
    risen = len(after) >= 2 and all(h["validation"] > RISE * history[best]["validation"] for h in after[-2:])
    if not risen or not last["train"] < history[best]["train"]:
        return None
    return (
        f"the model is memorising its training text: since step {history[best]['step']:,.0f} validation loss has risen "
        f"from {history[best]['validation']:.3f} to {last['validation']:.3f} while training loss fell from "
        f"{history[best]['train']:.3f} to {last['train']:.3f}; the best is kept, and more text, dropout, a "
        f"smaller model "
        "or fewer steps would help"
    )


def should_stop_early(history: Sequence[dict[str, float]], patience: int | None) -> bool:
    """Whether the last ``patience`` validations brought no new best."""
    if patience is None or not history:
        return False
    best = min(range(len(history)), key=lambda i: history[i]["validation"])
    return len(history) - 1 - best >= patience


# ---------------------------------------------------------------- divergence


def diverged(state: TrainState, window: Sequence[Batch], lr: float, precision: str, folder: Path) -> RunError:
    """Look for the cause, keep the batch in ``folder``, and say both in a sentence."""
    progress = state.progress
    step, row = progress.step, progress.skipped_in_row
    findings = _findings(state, window, lr, precision)
    path = folder / f"diverged-step-{step:08d}.safetensors"
    tensors = {f"{i}/{name}": t for i, batch in enumerate(window) for name, t in _named(batch).items()}
    try:
        save_file(tensors, path)
        follow_umask(path)
        about: dict[str, Any] = {"step": step, "lr": lr, "precision": precision, "findings": findings}
        write_atomically(path.with_suffix(".json"), json.dumps(about, indent=2))
        kept = f"the batch is kept in '{path}'"
    except Exception as e:
        kept = f"the batch could not be kept ({e})"
    return RunError(
        f"training has diverged: {row} steps in a row, up to step {step}, had a loss or gradient that is not "
        f"finite, and "
        f"none of them touched the weights. {' '.join(findings)} {kept[0].upper()}{kept[1:]}; go on from the last "
        f"checkpoint with: pocketlm train --resume {folder.parent} --optimizer.lr {lr / 3:.1e}"
    )


def _findings(state: TrainState, window: Sequence[Batch], lr: float, precision: str) -> list[str]:
    """What a person would look at first, looked at."""
    model, findings = state.model, []
    bad = [name for name, p in model.named_parameters() if not bool(torch.isfinite(p).all())]
    if bad:
        findings.append(f"Weights that are not finite: {', '.join(bad[:3])}.")
    targets = torch.cat([batch.targets.flatten() for batch in window])
    if not bool((targets >= 0).any()):
        findings.append("Data: the batch has no target at all.")
    elif precision != "fp32" and not bad:
        exact = _loss_in_fp32(state, window)
        if math.isfinite(exact):
            findings.append(
                f"Precision: in fp32 the loss of the same batch is finite ({exact:.3f}), so {precision} is the "
                f"cause: use "
                f"--training.precision {'bf16 or fp32' if precision == 'fp16' else 'fp32'}."
            )
    largest = max(float(p.detach().abs().max()) for p in model.parameters())
    recent = state.progress.recent_losses
    trend = f", the last finite losses were {', '.join(f'{x:.3g}' for x in recent[-3:])}" if recent else ""
    findings.append(f"Learning rate {lr:.1e}, largest weight {largest:.3g}{trend}: a smaller rate is the usual cure.")
    return findings


@torch.no_grad()
def _loss_in_fp32(state: TrainState, window: Sequence[Batch]) -> float:
    model = state.model
    device, dtype = next(model.parameters()).device, model.compute_dtype
    model.compute_dtype = torch.float32
    try:
        batch = window[0].to(device)
        return float(model.loss(batch.inputs, batch.targets, document_ids=batch.document_ids)) / max(1, batch.n_targets)
    finally:
        model.compute_dtype = dtype


def _named(batch: Batch) -> dict[str, torch.Tensor]:
    named = {"inputs": batch.inputs, "targets": batch.targets}
    return named if batch.document_ids is None else {**named, "document_ids": batch.document_ids}
