"""The Transformer: embedding, blocks, final norm, output layer.

What belongs here: how the parts are put together and filled with numbers. Imports ``config``, ``errors``
and the rest of ``model``.

Design: one class for all shapes. What differs (positions, norm, MLP, key-value heads) is chosen in a constructor
from a closed table; ``forward`` never asks the configuration. Precision is one attribute, ``compute_dtype``: the
residual stream stays fp32, everything between a norm and the addition of a branch runs in it.
"""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from pocketlm.config import ModelConfig
from pocketlm.errors import ConfigError
from pocketlm.model.attention import Attention, Remember, cached_mask, document_mask
from pocketlm.model.cache import KVCache
from pocketlm.model.layers import MLPS, NORMS, Embedding, Linear, dropout
from pocketlm.model.loss import linear_cross_entropy
from pocketlm.model.positions import POSITIONS, Learned, Rotary, positions_in_documents


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)): pre-norm, as GPT-2 and LLaMA."""

    def __init__(self, config: ModelConfig, position: Learned | Rotary) -> None:
        super().__init__()
        self.dropout = config.dropout
        self.norm1 = NORMS[config.norm](config)
        self.attn = Attention(config, position)
        self.norm2 = NORMS[config.norm](config)
        self.mlp = MLPS[config.mlp](config)

    def forward(
        self, x: Tensor, dtype: torch.dtype, place: Tensor, mask: Tensor | None, remember: Remember | None
    ) -> Tensor:
        """x (B, T, C) fp32 -> (B, T, C) fp32; both branches compute in dtype."""
        x = x + self._drop(self.attn(self.norm1(x, dtype), place, mask, remember))
        return x + self._drop(self.mlp(self.norm2(x, dtype)))

    def _drop(self, branch: Tensor) -> Tensor:
        return dropout(branch, self.dropout, self.training)


class Transformer(nn.Module):
    """A decoder-only language model of the shape that its configuration gives.

    Parameters: ``embed.weight``; ``position.weight`` if learned; ``blocks.N.{norm1, attn.{q,k,v,o}, norm2,
    mlp.{gate,up,down}}``; ``norm``; ``head.weight`` if the output layer is not tied to the embedding.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.compute_dtype = torch.float32
        """Dtype between a norm and the residual stream; the trainer sets it."""
        self.gradient_checkpointing = False
        """Recompute each block in the backward pass instead of keeping its activations."""
        self.embed = Embedding(config.padded_vocab, config.n_embd)
        self.position = POSITIONS[config.positions](config)
        self.blocks = nn.ModuleList(Block(config, self.position) for _ in range(config.n_layer))
        self.norm = NORMS[config.norm](config)
        self.head = None if config.tie_embeddings else Linear(config.n_embd, config.padded_vocab, bias=False)
        initialise(self)

    @property
    def output_weight(self) -> nn.Parameter:
        """(Vp, C): the embedding's own tensor where the two are tied."""
        return self.embed.weight if self.head is None else self.head.weight

    def forward(self, tokens: Tensor, *, document_ids: Tensor | None = None, cache: KVCache | None = None) -> Tensor:
        """tokens (B, T) int64 -> logits (B, T, V) fp32. Arguments as in ``hidden``."""
        return self.logits(self.hidden(tokens, document_ids, cache))

    def hidden(self, tokens: Tensor, document_ids: Tensor | None = None, cache: KVCache | None = None) -> Tensor:
        """tokens (B, T) int64 -> (B, T, C) in the compute dtype, after the final norm.

        document_ids (B, T): tokens see only their own document, whose positions start at 0. cache: tokens follow
        those it holds, and are added to it. Raises ConfigError beyond block_size.
        """
        assert document_ids is None or cache is None, "a cache holds one document"
        t, offset = tokens.shape[1], cache.offset if cache else 0
        if offset + t > self.config.block_size:
            raise ConfigError(
                f"the sequence has {offset + t} tokens, the model's context {self.config.block_size}: "
                "shorten it, or train with a larger model.block_size"
            )
        if document_ids is None:
            positions = torch.arange(offset, offset + t, device=tokens.device)
            mask = cached_mask(t, offset, tokens.device)
        else:
            positions, mask = positions_in_documents(document_ids), document_mask(document_ids)
        place = self.position.at(positions)
        x = dropout(self.position.add(self.embed(tokens), place), self.config.dropout, self.training)
        recompute = self.gradient_checkpointing and self.training and torch.is_grad_enabled()
        for i, block in enumerate(self.blocks):
            remember = partial(cache.append, i) if cache else None
            run = partial(checkpoint, block, use_reentrant=False) if recompute else block
            x = run(x, self.compute_dtype, place, mask, remember)
        if cache:
            cache.offset += t
        out: Tensor = self.norm(x, self.compute_dtype)
        return out

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden (..., C) -> (..., V) fp32; rows that only pad the vocabulary are left out."""
        return F.linear(hidden, self.output_weight[: self.config.vocab].to(hidden.dtype)).float()

    def loss(self, tokens: Tensor, targets: Tensor, *, document_ids: Tensor | None = None) -> Tensor:
        """Cross-entropy in nats, summed over the targets that are not IGNORE: a scalar, fp32.

        tokens, targets (B, T) int64; targets are already shifted. Divide by their number to get the mean.
        """
        hidden = self.hidden(tokens, document_ids)
        return linear_cross_entropy(hidden.flatten(0, 1), self.output_weight, targets.flatten(), self.config.vocab)

    def num_parameters(self) -> int:
        """How many numbers are learned: tied weights once, rows that pad the vocabulary not at all."""
        padding = (self.config.padded_vocab - self.config.vocab) * self.config.n_embd
        return sum(p.numel() for p in self.parameters()) - padding * (1 if self.head is None else 2)


@torch.no_grad()
def initialise(model: Transformer) -> None:
    """Fill every parameter, or raise for one that no rule knows.

    Weights are normal(0, init_std), learned positions too, as transformers' GPT-2 has them; the two projections that
    write into the residual stream get init_std / sqrt(2 n_layer), so that its variance does not grow with
    depth (GPT-2, section 2.3). Norms are 1, biases and rows that pad the vocabulary 0.
    """
    for name, p in model.named_parameters():
        _, layer, kind = f"..{name}".rsplit(".", 2)
        if kind == "bias":
            p.zero_()
        elif layer in ("norm", "norm1", "norm2"):
            p.fill_(1)
        elif layer in ("o", "down"):
            p.normal_(0, model.config.init_std / math.sqrt(2 * model.config.n_layer))
        elif layer in ("embed", "position", "q", "k", "v", "gate", "up", "head"):
            p.normal_(0, model.config.init_std)
        else:
            raise AssertionError(f"no rule initialises {name}")
    for table in {model.embed.weight, model.output_weight}:
        table[model.config.vocab :] = 0
