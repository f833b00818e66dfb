"""Where a token stands: learned absolute positions (GPT-2) or rotary embedding (LLaMA).

What belongs here: everything that depends on a token's index in its sequence. Imports only ``config``.

Design: one object with two hooks. ``add`` changes the embeddings, ``rotate`` the queries and keys; each
family takes one hook and passes the other through, so blocks never ask which it is. What both need
(rows of a table, or cosines and sines) is looked up once in a forward by ``at``, not once a layer, and
rotary keeps no buffer at all: nothing to move, to save, to lose on the meta device or to round to bf16.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pocketlm.config import ModelConfig


class Learned(nn.Module):
    """A vector for each position, added to the embeddings (Radford et al., 2019)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.block_size, config.n_embd))

    def at(self, positions: Tensor) -> Tensor:
        """positions (T,) or (B, T) int64 -> their vectors (..., T, C)."""
        return F.embedding(positions, self.weight)

    def add(self, x: Tensor, place: Tensor) -> Tensor:
        """x (B, T, C) + place (..., T, C)."""
        return x + place

    def rotate(self, q: Tensor, k: Tensor, place: Tensor) -> tuple[Tensor, Tensor]:
        """Queries and keys as they are."""
        return q, k


class Rotary(nn.Module):
    """Rotates pairs (i, i + D/2) of each head by position * theta^(-2i/D) (Su et al., 2021; pairing of LLaMA in
    transformers, where the two halves of a head are the two coordinates)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.theta = config.rope_theta

    def at(self, positions: Tensor) -> Tensor:
        """positions (T,) or (B, T) int64 -> cosines and sines (2, ..., T, 1, D/2) fp32."""
        exponents = torch.arange(0, self.head_dim, 2, device=positions.device, dtype=torch.float32) / self.head_dim
        angles = positions[..., None, None].float() / self.theta**exponents
        return torch.stack((angles.cos(), angles.sin()))

    def add(self, x: Tensor, place: Tensor) -> Tensor:
        """Embeddings as they are."""
        return x

    def rotate(self, q: Tensor, k: Tensor, place: Tensor) -> tuple[Tensor, Tensor]:
        """q (B, T, H, D) and k (B, T, K, D), each head turned by its position's angles."""
        cos, sin = place.to(q.dtype)
        return _turn(q, cos, sin), _turn(k, cos, sin)


POSITIONS: dict[str, type[Learned] | type[Rotary]] = {"learned": Learned, "rotary": Rotary}


def positions_in_documents(document_ids: Tensor) -> Tensor:
    """document_ids (B, T), each document one run of equal ids -> positions (B, T) that restart at 0 in each."""
    index = torch.arange(document_ids.shape[1], device=document_ids.device).expand_as(document_ids)
    starts = torch.ones_like(document_ids, dtype=torch.bool)
    starts[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
    return index - torch.where(starts, index, 0).cummax(dim=1).values


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate (first half, second half) of the last dimension of x (B, T, heads, D)."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)
