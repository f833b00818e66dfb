"""The Transformer equals its references: transformers' GPT-2 and LLaMA, and a formula in float64."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from pocketlm.config import ModelConfig
from pocketlm.errors import PocketError
from pocketlm.model.attention import attend, attend_by_matmul, document_mask, matmul_is_faster
from pocketlm.model.cache import KVCache
from pocketlm.model.layers import RMSNorm, dropout
from pocketlm.model.loss import IGNORE
from pocketlm.model.positions import positions_in_documents
from pocketlm.model.transformer import Transformer, initialise

TINY = {"vocab_size": 61, "block_size": 24, "n_layer": 2, "n_head": 3, "n_embd": 36, "init_std": 0.2}
LLAMA = {"positions": "rotary", "norm": "rmsnorm", "mlp": "swiglu", "bias": False}
MIXED = {**LLAMA, "positions": "learned"}
SMOL = {"vocab_size": 49152, "block_size": 2048, "n_layer": 30, "n_head": 9, "n_embd": 576, "n_hidden": 1536}
SHAPES = {
    "gpt2": TINY,
    "llama": {**TINY, **LLAMA},
    "gqa": {**TINY, **LLAMA, "n_head": 6, "n_kv_head": 2},
    "mixed": {**TINY, **MIXED},
}


def build(seed: int = 0, **settings: object) -> Transformer:
    """A model whose biases and norms are random too, so that nothing hides behind a 0 or a 1."""
    torch.manual_seed(seed)
    model = Transformer(ModelConfig(**settings))
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim == 1:
                p.add_(torch.randn_like(p) * 0.2)
    return model.eval()


def some_tokens(model: Transformer, *shape: int, seed: int = 1) -> Tensor:
    return torch.randint(0, model.config.vocab, shape, generator=torch.Generator().manual_seed(seed))


def close(a: Tensor, b: Tensor, tolerance: float = 1e-5) -> None:
    """Equal within tolerance of the largest value."""
    assert a.shape == b.shape
    assert (a - b).abs().max() <= tolerance * max(1.0, b.abs().max().item())


# ---------------------------------------------------------------- references

Rename = Callable[[dict[str, Tensor], int], dict[str, Tensor]]


def as_gpt2(ours: dict[str, Tensor], n_layer: int) -> dict[str, Tensor]:
    """Our names to GPT-2's in transformers, whose linear layers store (in, out)."""
    theirs = {"transformer.wte.weight": ours["embed.weight"], "transformer.wpe.weight": ours["position.weight"]}
    theirs |= {f"transformer.ln_f.{kind}": ours[f"norm.{kind}"] for kind in ("weight", "bias")}
    for n in range(n_layer):
        for kind in ("weight", "bias"):
            a, b = f"transformer.h.{n}", f"blocks.{n}"
            theirs[f"{a}.ln_1.{kind}"] = ours[f"{b}.norm1.{kind}"]
            theirs[f"{a}.ln_2.{kind}"] = ours[f"{b}.norm2.{kind}"]
            theirs[f"{a}.attn.c_attn.{kind}"] = torch.t(torch.cat([ours[f"{b}.attn.{x}.{kind}"] for x in "qkv"]))
            theirs[f"{a}.attn.c_proj.{kind}"] = torch.t(ours[f"{b}.attn.o.{kind}"])
            theirs[f"{a}.mlp.c_fc.{kind}"] = torch.t(ours[f"{b}.mlp.up.{kind}"])
            theirs[f"{a}.mlp.c_proj.{kind}"] = torch.t(ours[f"{b}.mlp.down.{kind}"])
    if "head.weight" in ours:
        theirs["lm_head.weight"] = ours["head.weight"]
    return theirs


def as_llama(ours: dict[str, Tensor], n_layer: int) -> dict[str, Tensor]:
    """Our names to LLaMA's in transformers."""
    places = {"norm1": "input_layernorm", "norm2": "post_attention_layernorm"}
    places |= {f"attn.{x}": f"self_attn.{x}_proj" for x in "qkvo"}
    places |= {f"mlp.{x}": f"mlp.{x}_proj" for x in ("gate", "up", "down")}
    theirs = {"model.embed_tokens.weight": ours["embed.weight"], "model.norm.weight": ours["norm.weight"]}
    for n in range(n_layer):
        for mine, other in places.items():
            for kind in ("weight", "bias"):
                if f"blocks.{n}.{mine}.{kind}" in ours:
                    theirs[f"model.layers.{n}.{other}.{kind}"] = ours[f"blocks.{n}.{mine}.{kind}"]
    if "head.weight" in ours:
        theirs["lm_head.weight"] = ours["head.weight"]
    return theirs


def reference_of(model: Transformer) -> tuple[torch.nn.Module, Rename]:
    """transformers' model with our weights, and the function from our names to its."""
    transformers = pytest.importorskip("transformers")
    c = model.config
    shared = {"vocab_size": c.vocab, "tie_word_embeddings": c.tie_embeddings}
    if c.positions == "learned":
        settings = transformers.GPT2Config(
            n_positions=c.block_size, n_embd=c.n_embd, n_layer=c.n_layer, n_head=c.n_head, n_inner=c.hidden,
            layer_norm_epsilon=c.norm_eps, **shared,
        )  # fmt: skip
        reference, rename = transformers.GPT2LMHeadModel(settings), as_gpt2
    else:
        settings = transformers.LlamaConfig(
            max_position_embeddings=c.block_size, hidden_size=c.n_embd, num_hidden_layers=c.n_layer,
            num_attention_heads=c.n_head, num_key_value_heads=c.kv_heads, intermediate_size=c.hidden,
            rms_norm_eps=c.norm_eps, attention_bias=c.bias, mlp_bias=c.bias,
            rope_parameters={"rope_type": "default", "rope_theta": c.rope_theta}, **shared,
        )  # fmt: skip
        reference, rename = transformers.LlamaForCausalLM(settings), as_llama
    weights = rename({k: v.detach() for k, v in model.named_parameters()}, c.n_layer)
    missing, unexpected = reference.load_state_dict(weights, strict=False)
    assert not unexpected
    assert set(missing) <= ({"lm_head.weight"} if c.tie_embeddings else set())
    return reference.eval(), rename


@pytest.mark.parametrize(
    "settings",
    [
        TINY,
        {**TINY, "n_head": 4, "n_hidden": 50, "tie_embeddings": False},
        {**TINY, "n_embd": 33, "n_layer": 3, "vocab_size": 7},
        {**TINY, **LLAMA},
        {**TINY, **LLAMA, "n_head": 9, "n_kv_head": 3, "n_embd": 54, "rope_theta": 500.0},
        {**TINY, **LLAMA, "n_head": 6, "n_kv_head": 1, "tie_embeddings": False, "norm_eps": 1e-3},
        {**TINY, **LLAMA, "n_hidden": 19, "bias": True, "n_layer": 3},
    ],
    ids=["gpt2", "gpt2-untied", "gpt2-odd", "llama", "llama-gqa", "llama-mqa-untied", "llama-bias"],
)
@pytest.mark.parametrize("time", [1, 17, 24])
def test_logits_and_gradients_equal_transformers(settings: dict, time: int) -> None:
    model = build(**settings)
    tokens = some_tokens(model, 2, time)
    targets = some_tokens(model, 2, time, seed=2)
    model.loss(tokens, targets).backward()
    reference, rename = reference_of(model)
    grads = rename({k: v.grad for k, v in model.named_parameters()}, model.config.n_layer)
    logits = reference(tokens).logits
    close(model(tokens), logits)
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum").backward()
    for name, p in reference.named_parameters():
        close(grads[name], p.grad)


def formula(w: dict[str, Tensor], tokens: Tensor, c: ModelConfig) -> Tensor:
    """The mixed shape, one sequence (T,) -> logits (T, V), written from its definition."""
    heads, d = c.n_head, c.head_dim

    def norm(x: Tensor, name: str) -> Tensor:
        return x / ((x * x).mean(-1, keepdim=True) + c.norm_eps).sqrt() * w[f"{name}.weight"]

    x = w["embed.weight"][tokens] + w["position.weight"][: len(tokens)]
    for n in range(c.n_layer):
        at = f"blocks.{n}."
        h = norm(x, at + "norm1")
        q, k, v = (h @ w[f"{at}attn.{name}.weight"].T for name in "qkv")
        out = torch.zeros_like(x)
        for head in range(heads):
            part = slice(head * d, (head + 1) * d)
            for i in range(len(tokens)):
                scores = (k[: i + 1, part] @ q[i, part] / math.sqrt(d)).exp()
                out[i, part] = (scores / scores.sum()) @ v[: i + 1, part]
        x = x + out @ w[at + "attn.o.weight"].T
        h = norm(x, at + "norm2")
        gate = h @ w[at + "mlp.gate.weight"].T
        x = x + (gate / (1 + (-gate).exp()) * (h @ w[at + "mlp.up.weight"].T)) @ w[at + "mlp.down.weight"].T
    return norm(x, "norm") @ w["embed.weight"].T


def test_mixed_shape_equals_its_formula_in_float64() -> None:
    model = build(**TINY, **MIXED)
    tokens = some_tokens(model, 2, 13)
    weights = {k: v.detach().double() for k, v in model.state_dict().items()}
    for row, logits in zip(tokens, model(tokens), strict=True):
        close(logits.double(), formula(weights, row, model.config))


# ---------------------------------------------------------------- sizes and configuration


SYSTEMS = {
    "gpt-125m": ({"vocab_size": 50257, "block_size": 512, "n_layer": 12, "n_head": 12, "n_embd": 768}, 124_046_592),
    "smolm-135": ({**SMOL, **MIXED}, 148_965_696),
    "smollm2-80m": ({"vocab_size": 49152, "block_size": 128, "n_layer": 6, "n_head": 12, "n_embd": 768}, 80_375_808),
    "smollm2-135m": ({**SMOL, **LLAMA, "n_kv_head": 3}, 134_515_008),
}


@pytest.mark.parametrize("system", SYSTEMS)
def test_parameter_counts_of_the_four_systems(system: str) -> None:
    settings, parameters = SYSTEMS[system]
    with torch.device("meta"):
        assert Transformer(ModelConfig(**settings)).num_parameters() == parameters
        assert Transformer(ModelConfig(**settings, vocab_multiple=128)).num_parameters() == parameters


def test_a_model_built_on_meta_and_filled_equals_the_original() -> None:
    model = build(**SHAPES["gqa"])
    with torch.device("meta"):
        empty = Transformer(model.config)
    empty.to_empty(device="cpu").load_state_dict(model.state_dict())
    tokens = some_tokens(model, 1, 9)
    assert torch.equal(empty.eval()(tokens), model(tokens))


def test_heads_that_do_not_divide_the_width_are_refused() -> None:
    with pytest.raises(ValidationError, match="multiple of n_head 3"):
        ModelConfig(n_embd=10, n_head=3)


def test_a_sequence_beyond_the_context_is_refused() -> None:
    model = build(**SHAPES["llama"])
    with pytest.raises(PocketError, match="25 tokens, the model's context 24"):
        model(some_tokens(model, 1, 25))


def test_tied_output_is_the_embedding_itself() -> None:
    assert (tied := build(**TINY)).output_weight is tied.embed.weight
    untied = build(**TINY, tie_embeddings=False)
    assert untied.output_weight is untied.head.weight
    assert untied.num_parameters() - tied.num_parameters() == 61 * 36


def test_initial_weights_have_their_standard_deviations() -> None:
    torch.manual_seed(0)
    config = ModelConfig(
        vocab_size=500, n_layer=8, n_embd=256, n_head=4, block_size=256, init_std=0.05, vocab_multiple=64
    )
    model = Transformer(config)
    for name, p in model.named_parameters():
        p = p[:500] if name == "embed.weight" else p
        if p.ndim == 1:
            assert torch.equal(p, torch.full_like(p, float("norm" in name and name.endswith("weight"))))
        else:
            expected = 0.05 / 4 if name.endswith(("attn.o.weight", "mlp.down.weight")) else 0.05
            assert p.std().item() == pytest.approx(expected, rel=0.03), name
    assert not model.embed.weight[500:].any()


def test_a_parameter_without_a_rule_is_not_left_uninitialised() -> None:
    model = build(**TINY)
    model.extra = torch.nn.Parameter(torch.empty(3, 3))
    with pytest.raises(AssertionError, match="no rule initialises extra"):
        initialise(model)


# ---------------------------------------------------------------- masks, cache, padding


@pytest.mark.parametrize("shape", SHAPES)
def test_packed_documents_do_not_see_each_other(shape: str) -> None:
    model = build(**SHAPES[shape])
    documents = [some_tokens(model, 1, n, seed=n) for n in (5, 1, 9, 3)]
    ids = torch.cat([torch.full_like(d, n) for n, d in enumerate(documents)], dim=1)
    packed = model(torch.cat(documents, dim=1).expand(2, -1), document_ids=ids.expand(2, -1))
    alone = torch.cat([model(d) for d in documents], dim=1)
    close(packed, alone.expand(2, -1, -1))


def test_positions_restart_in_each_document() -> None:
    ids = torch.tensor([[0, 0, 0, 1, 2, 2], [7, 3, 3, 3, 3, 9]])
    assert positions_in_documents(ids).tolist() == [[0, 1, 2, 0, 0, 1], [0, 0, 1, 2, 3, 0]]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("steps", [(7, 1, 1, 1), (1, 1, 5, 1), (3, 4, 3), (10,)])
def test_cached_forward_equals_uncached(shape: str, steps: tuple[int, ...]) -> None:
    model = build(**SHAPES[shape])
    tokens = some_tokens(model, 2, sum(steps))
    cache = KVCache(model.config, 2, sum(steps), "cpu", torch.float32)
    with torch.no_grad():
        parts = [model(part, cache=cache) for part in tokens.split(steps, dim=1)]
        close(torch.cat(parts, dim=1), model(tokens))
    assert cache.offset == sum(steps)


@pytest.mark.parametrize("shape", SHAPES)
def test_padding_on_the_right_changes_nothing_before_it(shape: str) -> None:
    model = build(**SHAPES[shape])
    tokens, targets = some_tokens(model, 2, 12), some_tokens(model, 2, 12, seed=2)
    targets[0, 5:] = IGNORE
    other = tokens.clone()
    other[0, 5:] = 3
    assert torch.equal(model(tokens)[0, :5], model(other)[0, :5])
    grads = []
    for t in (tokens, other):
        model.zero_grad()
        model.loss(t, targets).backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    for a, b in zip(*grads, strict=True):
        close(a, b, 1e-6)


@pytest.mark.parametrize("tied", [True, False])
def test_a_padded_vocabulary_changes_nothing(tied: bool) -> None:
    plain = build(**TINY, tie_embeddings=tied)
    padded = build(**TINY, tie_embeddings=tied, vocab_multiple=64)
    state = plain.state_dict()
    for name in ["embed.weight"] + ["head.weight"] * (not tied):
        state[name] = torch.cat([state[name], torch.full((3, 36), 100.0)])  # never scored, whatever they hold
    padded.load_state_dict(state)
    tokens, targets = some_tokens(plain, 2, 9), some_tokens(plain, 2, 9, seed=2)
    assert padded(tokens).shape == (2, 9, 61)
    close(padded(tokens), plain(tokens))
    for model in (plain, padded):
        model.loss(tokens, targets).backward()
    for (name, a), b in zip(padded.named_parameters(), plain.parameters(), strict=True):
        close(a.grad[: len(b)], b.grad)
        assert not a.grad[len(b) :].any(), name


# ---------------------------------------------------------------- two ways to the same attention


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2), (3, 1)])
@pytest.mark.parametrize("kind", ["causal", "one query", "cached", "documents"])
def test_matmul_attention_equals_the_fused_kernel(heads: int, kv_heads: int, kind: str) -> None:
    torch.manual_seed(0)
    t, s = {"causal": (11, 11), "one query": (1, 11), "cached": (4, 11), "documents": (11, 11)}[kind]
    mask = None
    if kind == "cached":
        mask = torch.ones(t, s, dtype=torch.bool).tril(s - t)
    if kind == "documents":
        mask = document_mask(torch.tensor([[0] * 4 + [1] * 7, [0] * 11]))
    q = torch.randn(2, heads, t, 8, requires_grad=True)
    k, v = (torch.randn(2, kv_heads, s, 8, requires_grad=True) for _ in "kv")
    assert not matmul_is_faster("cpu", torch.float32, t * s, 0.0)
    fused, plain = attend(q, k, v, mask, 0.0), attend_by_matmul(q, k, v, mask, 0.0)
    close(plain, fused)
    weights = torch.randn_like(fused)
    for a, b in zip(*(torch.autograd.grad(y, (q, k, v), weights) for y in (plain, fused)), strict=True):
        close(a, b)


def test_attention_dropout_keeps_the_mean_and_drops_the_stated_share() -> None:
    torch.manual_seed(0)
    zeros, eye = torch.zeros(1, 1, 200, 200), torch.eye(200)[None, None]
    weights = attend_by_matmul(zeros, zeros, eye, None, 0.25)[0, 0]  # values are a unit matrix: these are the weights
    seen = torch.ones(200, 200).tril() > 0
    assert (weights[seen] == 0).float().mean().item() == pytest.approx(0.25, abs=0.01)
    assert weights.sum(1).mean().item() == pytest.approx(1, abs=0.02)
    assert not weights[~seen].any()


# ---------------------------------------------------------------- training modes


def test_rms_norm_of_cpus_equals_its_definition_and_its_gradients() -> None:
    norm = RMSNorm(ModelConfig(n_embd=36, n_head=3, norm_eps=1e-2))
    torch.nn.init.normal_(norm.weight)
    x = torch.randn(2, 7, 36, requires_grad=True)
    g = torch.randn(2, 7, 36)
    exact_x, exact_weight = x.detach().double().requires_grad_(), norm.weight.detach().double().requires_grad_()
    exact = exact_x / (exact_x.square().mean(-1, keepdim=True) + 1e-2).sqrt() * exact_weight
    y = norm(x, torch.float32)
    close(y.double(), exact, 1e-6)
    for a, b in zip(
        torch.autograd.grad(y, (x, norm.weight), g), torch.autograd.grad(exact, (exact_x, exact_weight), g), strict=True
    ):
        close(a.double(), b, 1e-6)


@pytest.mark.parametrize("p", [0.1, 0.5, 0.995, 1.0])
def test_dropout_drops_the_stated_share_and_scales_the_rest(p: float) -> None:
    torch.manual_seed(0)
    x = torch.full((501, 333), 3.0, requires_grad=True)
    y = dropout(x, p, True)
    assert (y == 0).float().mean().item() == pytest.approx(p, abs=4 * math.sqrt(p * (1 - p) / x.numel()))
    assert torch.allclose(y[y != 0], torch.tensor(3.0 / (1 - p) if p < 1 else 0.0))
    y.sum().backward()
    assert torch.allclose(x.grad, y / 3)
    neighbours = (y[:, 1:] == 0).float() * (y[:, :-1] == 0)
    assert neighbours.mean().item() == pytest.approx(p * p, abs=0.005)
    assert dropout(x, p, False) is x


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradient_checkpointing_gives_identical_gradients(shape: str, dtype: torch.dtype) -> None:
    model = build(**SHAPES[shape], dropout=0.2).train()
    model.compute_dtype = dtype
    tokens, targets = some_tokens(model, 2, 12), some_tokens(model, 2, 12, seed=2)
    results = []
    for model.gradient_checkpointing in (False, True):
        torch.manual_seed(5)
        model.zero_grad()
        model.loss(tokens, targets).backward()
        results.append([p.grad.clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_dropout_acts_in_training_only() -> None:
    model = build(**TINY, dropout=0.5)
    tokens = some_tokens(model, 1, 10)
    assert torch.equal(model(tokens), model(tokens))
    model.train()
    assert not torch.equal(model(tokens), model(tokens))


@pytest.mark.parametrize("shape", SHAPES)
def test_bfloat16_stays_close_to_float32(shape: str) -> None:
    model = build(**{**SHAPES[shape], "init_std": 0.1})
    low = copy.deepcopy(model)
    low.compute_dtype = torch.bfloat16
    tokens, targets = some_tokens(model, 2, 20), some_tokens(model, 2, 20, seed=2)
    assert low.hidden(tokens).dtype == torch.bfloat16
    assert low(tokens).dtype == torch.float32
    close(low(tokens), model(tokens), 0.05)
    for m in (model, low):
        m.loss(tokens, targets).backward()
    for (name, a), b in zip(low.named_parameters(), model.parameters(), strict=True):
        assert a.grad.dtype == torch.float32
        if b.grad.norm() > 1e-3:  # the bias of keys has no gradient at all: softmax does not see it
            assert torch.cosine_similarity(a.grad.flatten(), b.grad.flatten(), dim=0) > 0.99, name


def test_weights_stored_in_bfloat16_compute_too() -> None:
    model = build(**SHAPES["gqa"])
    stored = copy.deepcopy(model).to(torch.bfloat16)
    stored.compute_dtype = torch.bfloat16
    tokens = some_tokens(model, 1, 20)
    close(stored(tokens), model(tokens), 0.1)
