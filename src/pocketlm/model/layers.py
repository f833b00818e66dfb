"""The small layers: linear, embedding, norms, MLPs, dropout.

What belongs here: layers that see one token at a time. Imports only ``config``.

Design: precision without autocast. The residual stream is fp32; a norm hands out the dtype that it is asked
for, and ``Linear`` casts its weight to the dtype of its input. So one argument decides the precision of a
whole block, weights stay in the dtype they are stored in, and a swapped-in layer needs no special case.
Nothing initialises itself: ``transformer.initialise`` fills every parameter, once.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pocketlm.config import ModelConfig


class Linear(nn.Module):
    """x W^T + b, computed in the dtype of x."""

    def __init__(self, n_in: int, n_out: int, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_out, n_in))
        self.bias = nn.Parameter(torch.empty(n_out)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out), same dtype."""
        return F.linear(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))


class Embedding(nn.Module):
    """A row for each token."""

    def __init__(self, rows: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, width))

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, T) int64 -> (B, T, C) fp32, the start of the residual stream."""
        return F.embedding(tokens, self.weight).float()


class LayerNorm(nn.Module):
    """(x - mean) / sqrt(var + eps) * weight + bias (Ba et al., 2016)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.eps = config.norm_eps
        self.weight = nn.Parameter(torch.empty(config.n_embd))
        self.bias = nn.Parameter(torch.empty(config.n_embd)) if config.bias else None

    def forward(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """(B, T, C) fp32 -> (B, T, C) of dtype."""
        bias = None if self.bias is None else self.bias.float()
        return F.layer_norm(x, self.weight.shape, self.weight.float(), bias, self.eps).to(dtype)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight (Zhang and Sennrich, 2019)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.eps = config.norm_eps
        self.weight = nn.Parameter(torch.empty(config.n_embd))

    def forward(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """(B, T, C) fp32 -> (B, T, C) of dtype."""
        weight = self.weight.float()
        if x.device.type == "cpu":
            y: Tensor = _RMSNormCPU.apply(x, weight, self.eps, dtype)  # type: ignore[no-untyped-call]
            return y
        return F.rms_norm(x, weight.shape, weight, self.eps).to(dtype)


class _RMSNormCPU(torch.autograd.Function):
    """What ``F.rms_norm`` gives, which has no kernel of its own on CPUs: 1.4 times as fast, and keeps x alone
    for the backward pass instead of x and its normalised copies (14 MB less a layer at 2,048 x 576)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
        norm: Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        scale = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        y: Tensor = (x * scale).mul_(weight)
        return y.to(dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        x, weight, scale = ctx.saved_tensors
        normed = x * scale
        grad_weight = (normed * grad).flatten(0, -2).sum(0)
        grad_normed = grad * weight
        along = (grad_normed * normed).mean(-1, keepdim=True)  # what the norm takes out
        return grad_normed.sub_(normed.mul_(along)).mul_(scale), grad_weight, None, None


class GeluMLP(nn.Module):
    """down(gelu(up(x))) with the tanh form of GELU, as GPT-2 has it (Hendrycks and Gimpel, 2016)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.up = Linear(config.n_embd, config.hidden, config.bias)
        self.down = Linear(config.hidden, config.n_embd, config.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        y: Tensor = self.down(F.gelu(self.up(x), approximate="tanh"))
        return y


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)) (Shazeer, 2020)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate = Linear(config.n_embd, config.hidden, config.bias)
        self.up = Linear(config.n_embd, config.hidden, config.bias)
        self.down = Linear(config.hidden, config.n_embd, config.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        y: Tensor = self.down(F.silu(self.gate(x)) * self.up(x))
        return y


def dropout(x: Tensor, p: float, training: bool) -> Tensor:
    """Zero a share p of x, scale the rest by 1 / (1 - p) (Srivastava et al., 2014).

    On CPUs, where drawing is most of the time, 16 random bits an element are enough: p is met to 1 / 65,536, and
    forward and backward take a quarter of the time of ``F.dropout``.
    """
    if not training or p == 0:
        return x
    if x.device.type != "cpu" or p > 0.99:
        return F.dropout(x, p)
    words = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None)  # four draws each
    keep = words.view(torch.int16)[: x.numel()].view(x.shape) >= round(p * 2**16) - 2**15
    return x * keep.to(x.dtype).div_(1 - p)


NORMS: dict[str, type[LayerNorm] | type[RMSNorm]] = {"layernorm": LayerNorm, "rmsnorm": RMSNorm}
MLPS: dict[str, type[GeluMLP] | type[SwiGLU]] = {"gelu": GeluMLP, "swiglu": SwiGLU}
