"""Keys and values of tokens already read, so that decoding reads each token once.

What belongs here: the storage, nothing about sampling. Imports only ``config``.

Design: allocated once for its whole length, (n_layer, B, K, L, D); a step writes in place and attends to
views. ``offset`` moves once a forward, after all layers have written (the Transformer does it), so no layer
knows whether it is the last. Whoever creates a cache owns it: the model keeps none.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pocketlm.config import ModelConfig


class KVCache:
    """Keys and values of up to ``length`` tokens for ``batch`` sequences.

    Bytes: 2 x n_layer x batch x K x length x D x size of dtype.
    """

    def __init__(
        self, config: ModelConfig, batch: int, length: int, device: torch.device | str, dtype: torch.dtype
    ) -> None:
        shape = (config.n_layer, batch, config.kv_heads, length, config.head_dim)
        self.keys = torch.zeros(shape, device=device, dtype=dtype)
        self.values = torch.zeros(shape, device=device, dtype=dtype)
        self.length = length
        self.offset = 0
        """Tokens held; the next token has this position."""

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write a layer's k, v (B, K, T, D) behind the offset; return all it holds, (B, K, offset + T, D)."""
        end = self.offset + k.shape[2]
        assert end <= self.length, f"{end} tokens in a cache of {self.length}"
        self.keys[layer, :, :, self.offset : end] = k
        self.values[layer, :, :, self.offset : end] = v
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]
