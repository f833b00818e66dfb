"""Each shape learns one batch by heart: the shortest proof that gradients reach everything."""

from __future__ import annotations

import pytest
import torch

from pocketlm.config import ModelConfig
from pocketlm.model.transformer import Transformer

LLAMA = {"positions": "rotary", "norm": "rmsnorm", "mlp": "swiglu", "bias": False}
SHAPES = {
    "gpt2": {},
    "mixed": {**LLAMA, "positions": "learned"},
    "llama": LLAMA,
    "llama-gqa": {**LLAMA, "n_kv_head": 1, "tie_embeddings": False, "vocab_multiple": 64},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("shape", SHAPES)
def test_two_hundred_steps_memorise_a_batch(shape: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    config = ModelConfig(vocab_size=50, block_size=16, n_layer=2, n_head=4, n_embd=32, **SHAPES[shape])
    model = Transformer(config)
    model.compute_dtype = dtype
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0, fused=True)
    tokens = torch.randint(0, 50, (4, 17))
    for _ in range(200):
        loss = model.loss(tokens[:, :-1], tokens[:, 1:]) / (4 * 16)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.05
