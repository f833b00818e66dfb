"""Cross-entropy of a linear output layer, without ever holding its logits in fp32.

What belongs here: the loss and its plain reference. Imports ``config``.

Design: logits are the largest tensor of a small model (2,048 tokens x 50,257 x 4 bytes = 412 MB, several times over
in the plain form). Here rows go through in chunks whose logits fill at most 64 MiB in the dtype of x; softmax runs
in fp32 on a few rows at a time, and the gradient is formed in the forward pass, in place of the logits.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from pocketlm.config import IGNORE

_CHUNK_BYTES = 2**26
_CPU_SOFTMAX_ROWS = 64  # fp32 rows that stay in the cache of a core: 5 passes in the time of 1.5
_CPU_GRADIENT_ROWS = 4096  # rows of the weight's gradient per product, so that its addition hits the cache too


def linear_cross_entropy(x: Tensor, weight: Tensor, targets: Tensor, vocab: int) -> Tensor:
    """Sum of -log softmax(x weight[:vocab]^T)[target] over targets that are not IGNORE.

    x (N, C) in the compute dtype, weight (Vp, C) with Vp >= vocab, targets (N,) int64 -> scalar, fp32 (fp64 for fp64).
    Products run in the dtype of x, sums in fp32. Differentiable once, in x and weight.
    """
    kept = (targets != IGNORE).nonzero().squeeze(1)  # padding then costs nothing
    if len(kept) < len(targets):
        x, targets = x[kept], targets[kept]
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        loss: Tensor = _LinearCrossEntropy.apply(x, weight, targets, vocab)  # type: ignore[no-untyped-call]
        return loss
    return _forward(x, weight, targets, vocab, None)


def plain_cross_entropy(x: Tensor, weight: Tensor, targets: Tensor, vocab: int) -> Tensor:
    """What ``linear_cross_entropy`` must equal, from all logits at once."""
    logits = F.linear(x, weight[:vocab].to(x.dtype))
    return F.cross_entropy(logits.to(_sum_dtype(x)), targets, ignore_index=IGNORE, reduction="sum")


class _LinearCrossEntropy(torch.autograd.Function):
    """Gradients are formed in ``forward``; ``backward`` only scales them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, targets: Tensor, vocab: int) -> Tensor:
        grads = torch.empty_like(x), torch.zeros_like(weight, dtype=_sum_dtype(x))
        ctx.grads = grads
        return _forward(x, weight, targets, vocab, grads)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        assert ctx.grads is not None, "the gradient of this loss was already taken"
        (grad_x, grad_weight), ctx.grads = ctx.grads, None  # ours no longer: autograd may keep them without a copy
        return grad_x.mul_(grad), grad_weight.mul_(grad), None, None


def _forward(x: Tensor, weight: Tensor, targets: Tensor, vocab: int, grads: tuple[Tensor, Tensor] | None) -> Tensor:
    """The summed loss; fills grads = (of x, of weight; the latter zero before), for a gradient of 1, if given."""
    w = weight.to(x.dtype)
    losses = torch.empty(len(x), device=x.device, dtype=_sum_dtype(x))
    chunk = max(1, min(len(x), _CHUNK_BYTES // (len(w) * x.element_size())))
    buffer = torch.empty(chunk, len(w), device=x.device, dtype=x.dtype)
    for i in range(0, len(x), chunk):
        rows = slice(i, i + chunk)
        logits = buffer[: len(x[rows])]
        torch.mm(x[rows], w.T, out=logits)
        losses[rows] = _softmax(logits[:, :vocab], targets[rows], grads is not None)
        if grads is not None:
            logits[:, vocab:] = 0
            torch.mm(logits, w, out=grads[0][rows])
            _add_product(grads[1], logits, x[rows])
    return losses.sum()


def _softmax(logits: Tensor, targets: Tensor, in_place: bool) -> Tensor:
    """Losses (n,) of logits (n, V); in_place: logits become their own gradient, softmax minus one-hot."""
    losses = []
    step = _CPU_SOFTMAX_ROWS if logits.device.type == "cpu" else len(logits)
    for part, target in zip(torch.split(logits, step), torch.split(targets[:, None], step), strict=True):
        p = part.to(_sum_dtype(part), copy=True)
        chosen = p.gather(1, target)
        top = p.amax(1, keepdim=True)
        total = p.sub_(top).exp_().sum(1, keepdim=True)
        losses.append(total.log() + top - chosen)
        if in_place:
            part.copy_(p.div_(total).scatter_add_(1, target, torch.full_like(chosen, -1)))
    return torch.cat(losses).squeeze(1)


def _add_product(total: Tensor, logits: Tensor, x: Tensor) -> None:
    """total (Vp, C) += logits^T (Vp, n) x (n, C)."""
    step = _CPU_GRADIENT_ROWS if total.device.type == "cpu" else len(total)
    for part, columns in zip(torch.split(total, step), torch.split(logits, step, dim=1), strict=True):
        part += columns.T @ x


def _sum_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
