"""Evaluation: every token once, with the context the protocol promises, and sums that mean what they say."""

from __future__ import annotations

import copy
import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pocketlm.cli import main
from pocketlm.config import DataConfig, ModelConfig, TokenizerConfig
from pocketlm.data.corpora import open_corpus
from pocketlm.data.shards import TokenSplit, prepare
from pocketlm.evaluate.perplexity import _windows, evaluate, sum_up
from pocketlm.model.transformer import Transformer
from pocketlm.tokenizers import load_tokenizer


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=6), st.integers(1, 16), st.integers(1, 16))
def test_every_token_is_scored_once_with_the_promised_context(lengths, context, stride):
    stride = min(stride, context)
    edges = np.cumsum([0, *lengths])
    spans = [(int(a), int(b) + 1) for a, b in itertools.pairwise(edges)]
    scored = []
    for first, start, end in _windows(spans, context, stride):
        span = next(s for s in spans if s[0] <= first and end <= s[1])
        assert end - 1 - first <= context
        # What comes before the first scored target: all of the span, or at least context - stride inputs more.
        assert first == span[0] or start - 1 - first >= context - stride
        scored += range(start, end)
    assert scored == [i for a, b in spans for i in range(a + 1, b)]


@pytest.fixture(scope="module")
def split(tmp_path_factory) -> TokenSplit:
    folder = tmp_path_factory.mktemp("text")
    (folder / "book.txt").write_text("".join(f"line {i} of the book, with é and more.\n" for i in range(40)))
    corpus = open_corpus(DataConfig(path=str(folder / "book.txt"), document="line"), mirror=None)
    tokenizer = load_tokenizer(TokenizerConfig(name="bytes"), mirror=None, texts=None)
    return prepare(corpus, tokenizer, folder / "cache").splits["train"]


@pytest.fixture(scope="module")
def model() -> Transformer:
    torch.manual_seed(0)
    config = ModelConfig(vocab_size=257, block_size=24, n_layer=1, n_head=2, n_embd=16, init_std=0.3, dropout=0.5)
    return Transformer(config)


@pytest.mark.parametrize("within_documents", [False, True])
@pytest.mark.parametrize(("context", "stride"), [(24, 24), (24, 5), (10, 1)])
def test_the_loss_is_that_of_one_token_at_a_time(split, model, context, stride, within_documents):
    """Against a loop that scores each token alone, with the context its window gives it."""
    result = evaluate(
        model,
        split,
        name="train",
        context=context,
        stride=stride,
        batch_size=3,
        within_documents=within_documents,
        device=torch.device("cpu"),
    )
    ids = split.read(0, split.n_stored).astype(np.int64)
    starts = [*split.starts.tolist(), split.n_stored]
    spans = [(a - 1, b) for a, b in itertools.pairwise(starts)] if within_documents else [(0, len(ids))]
    reference = copy.deepcopy(model).eval()
    nats, n = 0.0, 0
    with torch.no_grad():
        for a, b in spans:
            for target in range(a + 1, b):
                if ids[target] == split.separator_id:
                    continue
                done = target - (a + 1)
                block = 0 if done < context else 1 + (done - context) // stride
                end = min(b, a + 1 + context + block * stride)
                first = max(a, end - 1 - context)
                x = torch.from_numpy(ids[first:target])[None]
                nats -= float(reference(x)[0, -1].double().log_softmax(-1)[ids[target]])
                n += 1
    assert result.n_tokens == n == split.n_tokens
    assert result.nats == pytest.approx(nats, rel=1e-5)
    assert model.training, "the mode is put back"


def test_bits_per_byte_and_word_perplexity_divide_the_same_sum(split, model):
    options = {"context": 24, "stride": 24, "batch_size": 4, "within_documents": False, "device": torch.device("cpu")}
    result = evaluate(model, split, name="train", **options)
    text = split.read(0, split.n_stored)
    raw = bytes(text[text != split.separator_id].tolist())
    assert result.n_bytes == len(raw) and result.n_words == len(raw.split()) + raw.count(b"\n")
    assert result.bits_per_byte == pytest.approx(result.loss / math.log(2))  # a token is a byte here
    assert result.word_perplexity == pytest.approx(math.exp(result.nats / result.n_words))
    twice = sum_up([result, result])
    assert (twice.loss, twice.n_tokens) == (pytest.approx(result.loss), 2 * result.n_tokens)


def test_wikitext_words_are_counted_as_everybody_counts_them(mirror, tmp_path):
    """245,569 words of the test split, line ends counted (Merity et al., 2017, table 1)."""
    corpus = open_corpus(DataConfig(path="wikitext-2"), mirror=mirror)
    tokenizer = load_tokenizer(TokenizerConfig(name="bytes"), mirror=mirror, texts=None)
    split = prepare(corpus, tokenizer, tmp_path).splits["test"]
    assert split.n_words + split.n_lines == 245_569


def test_eval_prints_and_writes_its_protocol(book: Path, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("POCKETLM_CACHE", str(tmp_path / "cache"))
    line = "--model.n_layer 1 --model.n_embd 16 --model.n_head 2 --model.block_size 16 --training.steps 2"
    shape = line.split()
    run = tmp_path / "run"
    assert main(["train", str(book), "--out", str(run), "--tokenizer.name", "bytes", *shape]) == 0
    summary = json.loads((run / "summary.json").read_text())
    capsys.readouterr()

    assert main(["eval", str(run), "--stride", "4"]) == 0
    out = capsys.readouterr().out
    values = json.loads((run / "eval-validation.json").read_text())
    assert "windows of 16 every 4 tokens over the whole text" in out and values["protocol"] in out
    assert f"{values['bits_per_byte']:.4f}" in out
    assert (values["context"], values["stride"], values["n_bytes"]) == (16, 4, summary["validation"]["n_bytes"])

    assert main(["eval", str(run)]) == 0
    again = json.loads((run / "eval-validation.json").read_text())
    assert again["loss"] == pytest.approx(summary["best_loss"], rel=1e-6)

    (tmp_path / "other.txt").write_text("7 times 8 is 56.\n" * 30)
    assert main(["eval", str(run), "--data", str(tmp_path / "other.txt")]) == 0
    assert json.loads((run / "eval-train-validation.json").read_text())["n_bytes"] == 17 * 30

    assert main(["generate", str(run), "7 times", "--seed", "1", "--max-tokens", "12"]) == 0
    first = capsys.readouterr().out
    assert main(["generate", str(run), "7 times", "--seed", "1", "--max-tokens", "12"]) == 0
    assert capsys.readouterr().out.endswith(first.splitlines()[-1] + "\n")
    for args in (["--split", "tset"], ["--context", "99"], ["--stride", "99"], ["--checkpoint", "7"]):
        assert main(["eval", str(run), *args]) == 2
        assert "Traceback" not in capsys.readouterr().err


def test_presets_prints_the_true_counts(capsys):
    assert main(["presets"]) == 0
    out = capsys.readouterr().out
    counts = {line.split()[0]: line.split()[1] for line in out.splitlines()[1:]}
    assert counts["smollm2-135m"] == "134,515,008"
    assert counts["gpt-125m-wikitext2"] == "124,046,592"
    assert counts["smolm-135"] == "148,965,696"
    assert counts["smollm2-80m-shakespeare"] == "80,375,808"
    assert counts["shakespeare-char"] == "1,783,872"
    assert counts["demo"] == "2,557,632"
