"""Decoding: read the prompt once, then one token a step.

What belongs here: the loop over tokens and the life of the cache. Imports ``model`` and above.

Design: a generator of tokens, so that streaming, stopping and collecting are the caller's three lines. Learned
positions end at the context, so no cache can slide: when it is full, the newest half of the context is read
again. That is one forward of block_size / 2 tokens every block_size / 2 tokens, so about twice the products.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

import torch
from torch import Tensor

from pocketlm.generate.sampling import next_token
from pocketlm.model.cache import KVCache
from pocketlm.model.transformer import Transformer


@torch.inference_mode()
def generate(
    model: Transformer,
    tokens: Tensor,
    *,
    max_new_tokens: int,
    temperature: float,
    top_k: int | None = None,
    seed: int | None = None,
    stop_ids: Collection[int] = (),
    first: Tensor | None = None,
) -> Iterator[Tensor]:
    """Continue prompts tokens (B, T), T >= 1, on the model's device; yield the new ids (B,) int64 of each step.

    first (V,) bool: the ids among which the first new one is chosen; None: all.

    Ends after max_new_tokens, or once each row has met one of stop_ids (yielded too, and repeated for a row that ends
    before the others). Of a prompt longer than the context its end is read. Draws from a generator of its own: seed
    None takes a new one. The model is in eval mode and computes in the dtype its weights are stored in (casting them
    for each token would cost more than the product); both are put back when the iteration ends.
    """
    context, device = model.config.block_size, tokens.device
    generator = torch.Generator(device)
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(seed)
    stops = torch.tensor(sorted(stop_ids), dtype=torch.int64, device=device)
    was_training, was_dtype = model.training, model.compute_dtype
    model.eval()
    model.compute_dtype = model.embed.weight.dtype
    try:
        seen = unread = tokens[:, -context:]
        length = min(context, seen.shape[1] + max_new_tokens)
        cache = KVCache(model.config, len(seen), length, device, model.compute_dtype)
        done = torch.zeros(len(seen), dtype=torch.bool, device=device)
        for _ in range(max_new_tokens):
            hidden = model.hidden(unread, cache=cache)
            logits = model.logits(hidden[:, -1])
            if first is not None:
                logits, first = logits.masked_fill(~first, float("-inf")), None
            chosen = next_token(logits, temperature, top_k, generator)
            chosen = torch.where(done, seen[:, -1], chosen)
            yield chosen
            if stop_ids:
                done |= torch.isin(chosen, stops)
                if done.all():
                    return
            seen = torch.cat((seen, chosen[:, None]), dim=1)[:, -context:]
            unread = seen[:, -1:]
            if cache.offset == context:
                cache.offset, unread = 0, seen[:, -max(1, context // 2) :]
    finally:
        model.train(was_training)
        model.compute_dtype = was_dtype
