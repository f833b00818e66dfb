"""How the next token is chosen from logits.

What belongs here: pure functions on logits (B, V) fp32. Imports nothing of pocketlm.

Design: a filter returns logits with -inf where nothing may be chosen, so filters compose in any number
before the one draw.
"""

from __future__ import annotations

import torch
from torch import Tensor


def filter_top_k(logits: Tensor, k: int | None) -> Tensor:
    """logits (B, V) with all but the k largest of each row at -inf, exactly k also in ties; None or 0: all stay."""
    if not k or k >= logits.shape[-1]:
        return logits
    top = logits.topk(k, dim=-1)
    return torch.full_like(logits, float("-inf")).scatter_(-1, top.indices, top.values)


def next_token(logits: Tensor, temperature: float, top_k: int | None, generator: torch.Generator | None) -> Tensor:
    """logits (B, V) -> ids (B,) int64, drawn from softmax(logits / temperature) among the top_k; 0: the likeliest."""
    if temperature == 0:
        return logits.argmax(-1)
    logits = filter_top_k(logits, top_k)
    shifted = logits - logits.amax(-1, keepdim=True)  # so that a tiny temperature gives -inf, never inf
    return torch.multinomial((shifted / temperature).softmax(-1), 1, generator=generator).squeeze(1)
