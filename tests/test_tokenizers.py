"""Ids equal those of the original libraries, and every tokenizer survives its own file."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Library

from pocketlm.config import DataConfig, ModelConfig, TokenizerConfig
from pocketlm.data.corpora import open_corpus
from pocketlm.data.encoding import _EDGE
from pocketlm.data.shards import prepare
from pocketlm.errors import TokenizerError
from pocketlm.tokenizers import (
    SEPARATOR,
    Tokenizer,
    build_bytes,
    build_char,
    check_vocabulary,
    load_tokenizer,
    train_bpe,
)

TEXT = (
    "The quick brown fox, 12 times over, didn't jump.\n\n  Zwölf Boxkämpfer jagen Viktor quer über den Sylter Deich.\n"
)
BYTES = build_bytes()
BPE = train_bpe([TEXT * 3], 300)
ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)
WORDS = st.text("aé9 .'\n\t\u00a0\x1c😀", max_size=60)


@pytest.fixture(scope="module")
def published(mirror) -> list[Tokenizer]:
    return [named(name, mirror) for name in ("gpt2", "smollm")]


def named(name: str, mirror) -> Tokenizer:
    return load_tokenizer(TokenizerConfig(name=name), mirror=mirror, texts=None)


# ---------------------------------------------------------------- ids


@given(ANY_TEXT)
def test_a_byte_is_its_own_id(text):
    assert BYTES.encode(text) == list(text.encode())
    assert BYTES.decode(BYTES.encode(text)) == text
    assert (BYTES.vocab_size, BYTES.separator_id) == (257, 256)


@given(ANY_TEXT)
def test_a_trained_bpe_is_lossless_on_any_text(text):
    assert BPE.decode(BPE.encode(text)) == text


def test_characters_are_numbered_as_in_nanogpt(mirror):
    text = (mirror / "shakespeare" / "input.txt").read_text()
    numbers = {c: i for i, c in enumerate(sorted(set(text)))}
    tokenizer = build_char([text])
    assert (tokenizer.vocab_size, tokenizer.separator_id) == (66, 65)
    assert tokenizer.encode_batch([text])[0].tolist() == [numbers[c] for c in text]
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_gpt2_tokens_in_shards_equal_tiktoken_on_all_of_wikitext2(mirror, tmp_path, monkeypatch):
    tiktoken = pytest.importorskip("tiktoken")
    for name, file in (("vocab.bpe", "vocab.bpe"), ("encoder.json", "encoder.json")):
        address = f"https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/{file}"
        shutil.copy(mirror / "gpt2-tokenizer" / name, tmp_path / hashlib.sha1(address.encode()).hexdigest())
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    reference = tiktoken.get_encoding("gpt2")
    assert_shards_hold(reference.encode_ordinary_batch, "gpt2", mirror, tmp_path)


def test_smollm_tokens_in_shards_equal_the_library_on_wikitext2(mirror, tmp_path):
    library = Library.from_file(str(mirror / "smollm-tokenizer" / "tokenizer.json"))
    assert_shards_hold(lambda texts: [e.ids for e in library.encode_batch(texts)], "smollm", mirror, tmp_path)


def assert_shards_hold(encode_batch, name, mirror, tmp_path):
    """The stored stream is sep d0 sep d1 ... sep with each document as the reference encodes it."""
    corpus = open_corpus(DataConfig(path="wikitext-2"), mirror=mirror)
    tokenizer = named(name, mirror)
    cache = prepare(corpus, tokenizer, tmp_path / "cache", shard_tokens=500_000)
    for split in ("train", "validation", "test"):
        expected = [tokenizer.separator_id]
        for ids in encode_batch(list(corpus.documents(split))):
            expected += [*ids, tokenizer.separator_id]
        stored = cache.splits[split].read(0, cache.splits[split].n_stored)
        assert np.array_equal(stored, expected)


# ---------------------------------------------------------------- the separator is out of reach of text


@pytest.mark.parametrize("name", ["gpt2", "smollm", "cosmo2", "bytes", "bpe", "char"])
def test_the_separators_name_in_a_text_is_ordinary_text(name, request):
    made = {"bytes": BYTES, "bpe": BPE, "char": build_char([TEXT, SEPARATOR])}
    tokenizer = made.get(name) or named(name, request.getfixturevalue("mirror"))
    ids = tokenizer.encode(f"fox{SEPARATOR}")
    assert tokenizer.separator_id not in ids
    assert tokenizer.decode(ids) == f"fox{SEPARATOR}"


@pytest.mark.parametrize("tokenizer", [BYTES, BPE, build_char([TEXT])], ids=lambda t: t.name)
def test_the_empty_text_has_no_ids(tokenizer):
    assert tokenizer.encode("") == []
    assert tokenizer.decode([]) == ""


# ---------------------------------------------------------------- cutting and streaming


def assert_pieces_have_the_ids_of_the_whole(tokenizer, text):
    edges = [0, *(m.end() for m in _EDGE.finditer(text)), len(text)]
    pieces = [text[a:b] for a, b in pairwise(edges)]
    assert tokenizer.safe_to_split
    assert [i for piece in pieces for i in tokenizer.encode(piece)] == tokenizer.encode(text)


@settings(max_examples=300)
@given(WORDS)
def test_text_may_be_cut_where_we_cut_it(text):
    for tokenizer in (BYTES, BPE):
        assert_pieces_have_the_ids_of_the_whole(tokenizer, text)


@settings(max_examples=300, deadline=None)
@given(text=WORDS)
def test_text_may_be_cut_there_for_published_tokenizers_too(published, text):
    for tokenizer in published:
        assert_pieces_have_the_ids_of_the_whole(tokenizer, text)


def test_a_tokenizer_whose_words_span_spaces_is_not_cut(tmp_path):
    BPE.save(tmp_path)
    description = json.loads((tmp_path / "tokenizer.json").read_text())
    description["pre_tokenizer"] = None
    (tmp_path / "tokenizer.json").write_text(json.dumps(description))
    assert not Tokenizer.from_folder(tmp_path).safe_to_split


@pytest.mark.parametrize("tokenizer", [BYTES, BPE], ids=lambda t: t.name)
@given(data=st.data())
def test_a_stream_joined_is_the_text_of_all_ids(tokenizer, data):
    """Also for ids that are no UTF-8, which an untrained model writes all the time."""
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=40))
    stream = tokenizer.stream()
    pieces = [stream.push(i) for i in ids] + [stream.flush()]
    assert "".join(pieces) == tokenizer.decode(ids)


def test_a_character_is_shown_when_its_last_byte_has_come():
    stream = BYTES.stream()
    assert [stream.push(b) for b in "é😀!".encode()] == ["", "é", "", "", "", "😀", "!"]
    assert stream.flush() == ""


# ---------------------------------------------------------------- files


@pytest.mark.parametrize("tokenizer", [BYTES, BPE, build_char([TEXT])], ids=lambda t: t.name)
def test_a_saved_tokenizer_is_the_same_to_us_and_to_autotokenizer(tokenizer, tmp_path):
    transformers = pytest.importorskip("transformers")
    tokenizer.save(tmp_path / "tokenizer")
    again = Tokenizer.from_folder(tmp_path / "tokenizer")
    for one, other in ((again, tokenizer), (Tokenizer.from_folder(tmp_path / "tokenizer" / "tokenizer.json"), again)):
        assert vars(one).keys() == vars(other).keys()
        assert (one.name, one.vocab_size, one.separator_id) == (other.name, other.vocab_size, other.separator_id)
        assert (one.fingerprint, one.safe_to_split) == (other.fingerprint, other.safe_to_split)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    assert theirs(TEXT)["input_ids"] == tokenizer.encode(TEXT)
    assert theirs.decode(tokenizer.encode(TEXT)) == TEXT
    assert theirs.eos_token_id == theirs.bos_token_id == tokenizer.separator_id
    assert len(theirs) == tokenizer.vocab_size


def test_training_twice_gives_the_same_tokenizer():
    assert train_bpe([TEXT * 3], 300).fingerprint == BPE.fingerprint
    assert train_bpe([TEXT * 3], 301).fingerprint != BPE.fingerprint
    assert BPE.vocab_size == 300


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{}",
        b"[]",
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"version":"1.0","model":{"type":"BPE","vocab":{"a":0},"merges":[["a","b"]]}}',
        b'{"version":"1.0","model":{"type":"BPE","vocab":{"a":-1},"merges":[]}}',
        b'{"version":"1.0","model":{"type":"BPE","vocab":{},"merges":[]}}',
        b'{"version":"1.0","model":{"type":"BPE","vocab":{"a":0},"merges":[]}}',
    ],
    ids=["empty", "no model", "list", "binary", "deep", "merge of nothing", "negative", "no tokens", "no separator"],
)
def test_a_broken_file_is_one_sentence(content, tmp_path):
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(TokenizerError, match=r"tokenizer\.json") as caught:
        Tokenizer.from_folder(tmp_path)
    assert "\n" not in str(caught.value)


def test_the_separator_is_what_the_tokenizer_itself_declares(tmp_path):
    library = Library.from_str(BPE._library.to_str())
    library.add_special_tokens(["<stop>"])
    library.save(str(tmp_path / "tokenizer.json"))
    assert Tokenizer.from_folder(tmp_path).separator_id == BPE.separator_id, "by its usual name"
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "<stop>"}}))
    assert Tokenizer.from_folder(tmp_path).separator_id == 300


# ---------------------------------------------------------------- mistakes


def test_an_unknown_character_is_named():
    with pytest.raises(TokenizerError, match="'☃'"):
        build_char(["abc"]).encode("ab☃c")


def test_half_a_surrogate_pair_is_refused():
    with pytest.raises(TokenizerError, match="surrogate"):
        BYTES.encode("a\ud800")


def test_an_embedding_of_another_size_is_refused_with_both_numbers():
    check_vocabulary(BYTES, ModelConfig(vocab_size=257, vocab_multiple=64))
    for rows, fix in ((256, "cannot hold"), (50304, "vocab_multiple")):
        with pytest.raises(TokenizerError, match=rf"{rows}.* 257 .*{fix}.*--model.vocab_size 257"):
            check_vocabulary(BYTES, ModelConfig(vocab_size=rows))


@pytest.mark.parametrize("name", ["gpt3", "bpe", "./nowhere", "char"])
def test_a_tokenizer_that_cannot_be_had_is_one_sentence(name):
    with pytest.raises(TokenizerError, match=name) as caught:
        load_tokenizer(TokenizerConfig(name=name), mirror=None, texts=None)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["gpt2", "someone/something"])
def test_without_a_network_the_sentence_says_what_to_do(name, tmp_path):
    code = (
        "from pocketlm.tokenizers import load_tokenizer, TokenizerConfig, TokenizerError\n"
        f"try: load_tokenizer(TokenizerConfig(name={name!r}), mirror=None, texts=None)\n"
        "except TokenizerError as e: print(e)"
    )
    env = {"PYTHONPATH": ":".join(sys.path), "HF_HOME": str(tmp_path), "HF_ENDPOINT": "http://hub.invalid"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True, timeout=15)
    assert "local folder" in done.stdout
    assert done.stderr == ""
