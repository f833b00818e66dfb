"""Generation: cached equals uncached, equals transformers, and draws what it says."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from test_model import SHAPES, build, reference_of, some_tokens
from torch import Tensor

from pocketlm import ModelConfig, SmallLanguageModel
from pocketlm.errors import PocketError
from pocketlm.generate.engine import generate
from pocketlm.generate.sampling import filter_top_k, next_token
from pocketlm.generate.text import complete
from pocketlm.model.transformer import Transformer
from pocketlm.tokenizers import train_bpe


def collect(model: Transformer, tokens: Tensor, n: int, **options: object) -> Tensor:
    options = {"temperature": 0.0, **options}
    return torch.stack(list(generate(model, tokens, max_new_tokens=n, **options)), dim=1)


def greedy_uncached(model: Transformer, tokens: Tensor, n: int) -> Tensor:
    """The definition: the whole window through the model for each token."""
    context, start = model.config.block_size, 0
    total = tokens[:, -context:]
    first = total.shape[1]
    with torch.no_grad():
        for _ in range(n):
            if total.shape[1] - start > context:
                start = total.shape[1] - max(1, context // 2)
            total = torch.cat((total, model(total[:, start:])[:, -1].argmax(-1)[:, None]), dim=1)
    return total[:, first:]


@pytest.fixture
def model() -> SmallLanguageModel:
    torch.manual_seed(0)
    return SmallLanguageModel(ModelConfig(**SHAPES["gqa"]))


# ---------------------------------------------------------------- decoding


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("prompt", [1, 10, 23, 24, 40])
def test_greedy_ids_equal_uncached_decoding_also_beyond_the_context(shape: str, prompt: int) -> None:
    model = build(**SHAPES[shape])
    tokens = some_tokens(model, 3, prompt)
    assert torch.equal(collect(model, tokens, 60), greedy_uncached(model, tokens, 60))


@pytest.mark.parametrize("context", [1, 2, 3])
def test_the_smallest_contexts_generate(context: int) -> None:
    model = build(**{**SHAPES["gpt2"], "block_size": context})
    tokens = some_tokens(model, 1, 5)
    assert torch.equal(collect(model, tokens, 9), greedy_uncached(model, tokens, 9))


@pytest.mark.parametrize("shape", ["gpt2", "llama", "gqa"])
def test_greedy_ids_equal_transformers_generate(shape: str) -> None:
    model = build(**SHAPES[shape])
    reference, _ = reference_of(model)
    tokens = some_tokens(model, 2, 6)
    theirs = reference.generate(
        tokens, attention_mask=torch.ones_like(tokens), do_sample=False, max_new_tokens=18,
        eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    assert torch.equal(collect(model, tokens, 18), theirs[:, 6:])


def test_each_token_is_read_once() -> None:
    model = build(**SHAPES["gqa"])
    lengths = []
    model.embed.register_forward_hook(lambda module, inputs, output: lengths.append(inputs[0].shape[1]))
    collect(model, some_tokens(model, 1, 7), 10)
    assert lengths == [7] + [1] * 9


def test_training_mode_precision_and_global_randomness_are_left_as_they_were() -> None:
    model = build(**SHAPES["gpt2"], dropout=0.5).train()
    model.compute_dtype = torch.bfloat16
    tokens, state = some_tokens(model, 1, 4), torch.get_rng_state()
    first, second = (collect(model, tokens, 12, temperature=1.0, seed=3) for _ in range(2))
    assert torch.equal(first, second)
    stream = generate(model, tokens, max_new_tokens=9, temperature=1.0)
    next(stream)
    assert not model.training
    stream.close()
    assert model.training
    assert model.compute_dtype == torch.bfloat16
    assert torch.equal(torch.get_rng_state(), state)
    model.loss(tokens, tokens).backward()  # nothing of inference mode is left behind


def test_seeds_decide_what_is_drawn() -> None:
    model = build(**SHAPES["llama"])
    tokens = some_tokens(model, 2, 4)
    draws = [collect(model, tokens, 20, temperature=2.0, seed=seed) for seed in (1, 1, 2, None, None)]
    assert torch.equal(draws[0], draws[1])
    assert len({tuple(d.flatten().tolist()) for d in draws}) == 4


def test_generation_ends_when_each_row_has_met_a_stop_id() -> None:
    model = build(**SHAPES["gpt2"])
    tokens = some_tokens(model, 2, 5)
    free = collect(model, tokens, 30)
    stops = {int(free[0, 4]), int(free[1, 11])}
    firsts = [next(i for i, t in enumerate(row) if t in stops) for row in free.tolist()]
    assert firsts[0] != firsts[1]
    stopped = collect(model, tokens, 30, stop_ids=stops)
    assert stopped.shape[1] == max(firsts) + 1
    for row, whole, first in zip(stopped.tolist(), free.tolist(), firsts, strict=True):
        assert row == whole[: first + 1] + [whole[first]] * (len(row) - first - 1)


# ---------------------------------------------------------------- sampling


def test_top_k_keeps_exactly_the_k_largest() -> None:
    logits = torch.tensor([[1.0, 5.0, 3.0, 4.0], [2.0, 2.0, 2.0, 2.0]])
    kept = filter_top_k(logits, 2)
    assert kept[0].tolist() == [float("-inf"), 5.0, float("-inf"), 4.0]
    assert kept[1].isfinite().sum() == 2
    for everything in (None, 0, 4, 100):
        assert torch.equal(filter_top_k(logits, everything), logits)


def test_frequencies_follow_the_tempered_softmax() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0])
    drawn = next_token(logits.expand(40_000, -1), 0.7, 3, generator).bincount(minlength=4) / 40_000
    weights = torch.tensor([2.0, 1.0, 0.0]).div(0.7).exp()
    assert torch.allclose(drawn[:3], weights / weights.sum(), atol=0.01)
    assert drawn[3] == 0


@pytest.mark.parametrize("temperature", [0.0, 1e-45, 1e-6])
def test_vanishing_temperatures_take_the_likeliest(temperature: float) -> None:
    logits = torch.tensor([[0.1, 0.5, 0.2], [-80.0, -90.0, -1e4]])
    assert next_token(logits, temperature, None, torch.Generator()).tolist() == [1, 0]


# ---------------------------------------------------------------- the public face


def test_generate_returns_a_longer_tensor_that_begins_with_the_prompt(model: SmallLanguageModel) -> None:
    ids = some_tokens(model, 2, 5)
    out = model.generate(ids, max_length=40, temperature=0.9, top_k=5, seed=1)
    assert out.shape == (2, 40)
    assert out.dtype == torch.int64
    assert torch.equal(out[:, :5], ids)
    assert torch.equal(out, model.generate(ids.int(), max_length=40, temperature=0.9, top_k=5, seed=1))


def test_the_model_is_built_as_people_know_it() -> None:
    config = ModelConfig(vocab_size=50257, block_size=512, n_layer=12, n_head=12, n_embd=768, dropout=0.1, bias=True)
    with torch.device("meta"):
        assert SmallLanguageModel(config).num_parameters() == 124_046_592


@pytest.mark.parametrize(
    ("ids", "options", "sentence"),
    [
        ([[1, 2, 3]], {"max_length": 3}, "max_length 3 counts the prompt, which has 3 tokens"),
        ([[]], {}, "input_ids is empty"),
        ([1, 2], {}, r"shape \(batch, time\).*torch.tensor\(\[ids\]\)"),
        ([[1.0]], {}, "must be integers"),
        ([[60, 61]], {}, "input_ids holds 61, the vocabulary 0 to 60"),
        ([[0, -1]], {}, "input_ids holds -1"),
        ([[1]], {"temperature": -0.5}, "temperature must be 0 or more, not -0.5"),
        ([[1]], {"temperature": float("nan")}, "temperature must be 0 or more, not nan"),
        ([[1]], {"top_k": -2}, "top_k must be 0 or more, not -2"),
    ],
)
def test_mistakes_are_answered_with_a_sentence(
    model: SmallLanguageModel, ids: list, options: dict, sentence: str
) -> None:
    tokens = torch.tensor(ids) if ids != [[]] else torch.empty(1, 0, dtype=torch.int64)
    with pytest.raises(PocketError, match=sentence):
        model.generate(tokens, **options)


def test_importing_the_package_and_its_configuration_imports_no_torch() -> None:
    code = (
        "import sys, pocketlm; pocketlm.ModelConfig(); assert 'torch' not in sys.modules; pocketlm.SmallLanguageModel"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_prompt_that_ends_in_a_space_goes_on_with_a_word():
    """The space belongs to the next token: no new text begins with a second one, and the prompt is kept as it was."""
    tokenizer = train_bpe(["def first(x):\n    return x + 1\n\n\ndef second(y):\n    return y\n"] * 20, 300)
    torch.manual_seed(0)
    model = Transformer(ModelConfig(vocab_size=tokenizer.vocab_size, block_size=32, n_layer=1, n_head=2, n_embd=16))
    settings = {"max_tokens": 5, "temperature": 1.0, "top_k": None}
    firsts = [next(complete(model, tokenizer, "def ", seed=seed, **settings)) for seed in range(20)]
    begins = {tokenizer.decode([i])[1:] for i in range(tokenizer.vocab_size) if tokenizer.decode([i]).startswith(" ")}
    assert set(firsts) <= begins
    assert len(set(firsts)) > 3
    plain = "".join(complete(model, tokenizer, "def", seed=1, **settings))
    ids = generate(model, torch.tensor([tokenizer.encode("def")]), max_new_tokens=5, temperature=1.0, seed=1)
    assert plain == tokenizer.decode([int(i) for i in ids])
