"""The cache holds the text, survives interruption and damage, and is built once."""

from __future__ import annotations

import hashlib
import json
import logging
import multiprocessing
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pocketlm.config import DataConfig
from pocketlm.data import encoding, shards
from pocketlm.data.corpora import Corpus, open_corpus
from pocketlm.data.shards import Shard, TokenSplit, prepare
from pocketlm.errors import CorpusError, TokenizerError
from pocketlm.tokenizers import build_bytes, build_char, train_bpe

BYTES = build_bytes()
WORDS = ["how", "much", "wood", "would", "a", "woodchuck", "chuck\nif", "a", "woodchuck", "could", "chuck", "wood", ""]


def corpus_of(folder: Path, n: int = 40) -> Corpus:
    """``n`` documents of different lengths, the first one long."""
    folder.mkdir(exist_ok=True)
    for i in range(n):
        (folder / f"{i:03d}.txt").write_text(" ".join(WORDS[: i % 9 + 1] * (1 if i else 200)) + f" é{i}\n")
    return open_corpus(DataConfig(path=str(folder)), mirror=None)


def stream(split: TokenSplit) -> list[int]:
    return split.read(0, split.n_stored).tolist()


def files(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir()}


# ---------------------------------------------------------------- contents


@pytest.mark.parametrize("shard_tokens", [1, 50, 10**6])
def test_the_stream_is_every_document_between_separators(shard_tokens, tmp_path):
    corpus = corpus_of(tmp_path / "text")
    cache = prepare(corpus, BYTES, tmp_path / "cache", shard_tokens=shard_tokens)
    for name, split in cache.splits.items():
        texts = list(corpus.documents(name))
        expected = [256]
        for i, text in enumerate(texts):
            assert split.starts[i] == len(expected)
            expected += [*text.encode(), 256]
        assert stream(split) == expected
        whole = "".join(texts)
        assert (split.n_documents, split.n_stored) == (len(texts), len(expected))
        assert split.n_tokens == split.n_bytes == len(whole.encode())
        assert (split.n_words, split.n_lines) == (sum(len(t.split()) for t in texts), whole.count("\n"))
    assert len(list(cache.folder.glob("train-0*.bin"))) > (1 if shard_tokens < 100 else 0)


@pytest.mark.parametrize("vocab_size", [2**16, 2**16 + 1])
def test_ids_take_two_bytes_while_they_fit(vocab_size, tmp_path):
    tokenizer = build_char([chr(2**16 + i) for i in range(vocab_size - 1)])
    assert tokenizer.vocab_size == vocab_size
    last = tokenizer.decode([vocab_size - 2])
    (tmp_path / "a.txt").write_text(last * 10)
    cache = prepare(open_corpus(DataConfig(path=str(tmp_path / "a.txt")), mirror=None), tokenizer, tmp_path / "cache")
    assert cache.splits["train"].shards[0].tokens.dtype == (np.uint16 if vocab_size == 2**16 else np.uint32)
    assert stream(cache.splits["train"]) == [vocab_size - 1, *[vocab_size - 2] * 9, vocab_size - 1]


@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.data())
def test_reads_across_shards_equal_reads_of_one_array(sizes, data):
    whole = np.arange(sum(sizes), dtype=np.uint16)
    split = TokenSplit("train", (), np.array([1]), 0, 0, 0, 0)
    parts = []
    for part in np.split(whole, np.cumsum(sizes)[:-1]):
        parts.append(Shard(Path(), len(part), "<u2", ""))
        parts[-1].__dict__["tokens"] = part
    split = replace(split, shards=tuple(parts))
    a = data.draw(st.integers(0, len(whole) - 1))
    b = data.draw(st.integers(a + 1, len(whole)))
    assert split.read(a, b).tolist() == whole[a:b].tolist()
    indices = np.array(data.draw(st.lists(st.integers(0, len(whole) - 1))), dtype=np.int64)
    assert split.take(indices).tolist() == whole[indices].tolist()


def test_cutting_and_batching_for_the_encoder_change_no_id(tmp_path, monkeypatch):
    corpus = corpus_of(tmp_path / "text")
    tokenizer = train_bpe(corpus.documents("train"), 300)
    whole = prepare(corpus, tokenizer, tmp_path / "whole").splits["train"]
    monkeypatch.setattr(encoding, "PIECE_CHARS", 7)
    monkeypatch.setattr(encoding, "BATCH_CHARS", 100)
    pieces = prepare(corpus, tokenizer, tmp_path / "pieces").splits["train"]
    assert stream(pieces) == stream(whole)
    assert pieces.starts.tolist() == whole.starts.tolist()


# ---------------------------------------------------------------- built once, and again only when it must be


class Counted:
    """A corpus that counts how often its documents are asked for."""

    def __init__(self, corpus: Corpus, fail_after: int | None = None) -> None:
        self.read = 0
        readers = {s: (lambda s=s: self._count(corpus.documents(s), fail_after)) for s in corpus.splits}
        self.corpus = replace(corpus, _readers=readers)

    def _count(self, documents: Iterator[str], fail_after: int | None) -> Iterator[str]:
        for text in documents:
            if self.read == fail_after:
                raise KeyboardInterrupt
            self.read += 1
            yield text


def test_a_second_run_tokenises_nothing(tmp_path):
    corpus = corpus_of(tmp_path / "text")
    first = prepare(corpus, BYTES, tmp_path / "cache")
    counted = Counted(corpus)
    again = prepare(counted.corpus, BYTES, tmp_path / "cache")
    assert counted.read == 0
    assert (again.folder, again.fingerprint) == (first.folder, first.fingerprint)
    assert stream(again.splits["train"]) == stream(first.splits["train"])


def test_other_text_or_another_tokenizer_is_another_cache(tmp_path):
    cache = tmp_path / "cache"
    corpus = corpus_of(tmp_path / "text")
    first = prepare(corpus, BYTES, cache)
    other_tokenizer = prepare(corpus, train_bpe(corpus.documents("train"), 300), cache)
    (tmp_path / "text" / "003.txt").write_text("changed")
    other_text = prepare(open_corpus(DataConfig(path=str(tmp_path / "text")), mirror=None), BYTES, cache)
    assert len({c.fingerprint for c in (first, other_tokenizer, other_text)}) == 3
    assert len({c.folder for c in (first, other_tokenizer, other_text)}) == 3
    assert "changed" in BYTES.decode(stream(other_text.splits["train"]) + stream(other_text.splits["validation"]))


@pytest.mark.parametrize("fail_after", [0, 1, 11, 25, 36, 38, 39])
def test_an_interrupted_build_goes_on_and_ends_with_the_same_bytes(fail_after, tmp_path, monkeypatch):
    monkeypatch.setattr(encoding, "BATCH_CHARS", 30)
    corpus = corpus_of(tmp_path / "text")
    whole = prepare(corpus, BYTES, tmp_path / "whole", shard_tokens=100)
    with pytest.raises(KeyboardInterrupt):
        prepare(Counted(corpus, fail_after).corpus, BYTES, tmp_path / "cache", shard_tokens=100)
    assert not list((tmp_path / "cache").rglob("manifest.json"))

    encoded: list[str] = []
    real = type(BYTES).encode_batch
    monkeypatch.setattr(type(BYTES), "encode_batch", lambda self, texts: encoded.extend(texts) or real(self, texts))
    resumed = prepare(corpus, BYTES, tmp_path / "cache", shard_tokens=100)
    assert files(resumed.folder) == files(whole.folder)
    if fail_after > 11:
        assert len("".join(encoded)) < 0.5 * len("".join(t for s in corpus.splits for t in corpus.documents(s)))


def test_a_half_written_shard_is_written_again(tmp_path):
    corpus = corpus_of(tmp_path / "text")
    whole = prepare(corpus, BYTES, tmp_path / "whole", shard_tokens=100)
    with pytest.raises(KeyboardInterrupt):
        prepare(Counted(corpus, 20).corpus, BYTES, tmp_path / "cache", shard_tokens=100)
    folder = next(p for p in (tmp_path / "cache").iterdir() if p.is_dir())
    (folder / "train-00005.bin").write_bytes(b"torn")
    (folder / "building.json.partial-1").write_text("{torn")
    assert files(prepare(corpus, BYTES, tmp_path / "cache", shard_tokens=100).folder) == files(whole.folder)


DAMAGES = {
    "truncated": lambda p: p.write_bytes(p.read_bytes()[:-1]),
    "longer": lambda p: p.write_bytes(p.read_bytes() + b"\0"),
    "one bit": lambda p: p.write_bytes(bytes([p.read_bytes()[0] ^ 1]) + p.read_bytes()[1:]),
    "emptied": lambda p: p.write_bytes(b""),
    "gone": lambda p: p.unlink(),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", ["train-00000.bin", "train-docs-00000.bin", "validation-00000.bin", "manifest.json"])
def test_a_damaged_cache_is_built_again(name, damage, tmp_path, caplog):
    corpus = corpus_of(tmp_path / "text")
    cache = prepare(corpus, BYTES, tmp_path / "cache")
    folder, before, ids = cache.folder, files(cache.folder), stream(cache.splits["train"])
    del cache  # a file must not shrink under its own memory map
    DAMAGES[damage](folder / name)
    with caplog.at_level(logging.WARNING):
        again = prepare(corpus, BYTES, tmp_path / "cache")
    assert files(folder) == before
    assert stream(again.splits["train"]) == ids
    if (name, damage) != ("manifest.json", "gone"):
        assert len(caplog.records) == 1
        assert "damaged" in caplog.text


def test_a_large_cache_is_verified_when_it_is_first_read(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "VERIFIED_BYTES", 0)
    corpus = corpus_of(tmp_path / "text")
    DAMAGES["one bit"](prepare(corpus, BYTES, tmp_path / "cache").folder / "train-00000.bin")
    split = prepare(corpus, BYTES, tmp_path / "cache").splits["train"]
    with pytest.raises(CorpusError, match=r"train-00000\.bin is not what was written"):
        split.read(0, 2)


def _prepare_together(folder: Path, barrier: Any, results: Any) -> None:
    counted = Counted(open_corpus(DataConfig(path=str(folder / "text")), mirror=None))
    barrier.wait(timeout=60)
    cache = prepare(counted.corpus, BYTES, folder / "cache", shard_tokens=100)
    results.put((counted.read, stream(cache.splits["train"])))


def test_of_two_processes_one_builds_and_the_other_waits(tmp_path):
    corpus_of(tmp_path / "text", n=300)
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(2), context.Queue()
    both = [context.Process(target=_prepare_together, args=(tmp_path, barrier, results)) for _ in range(2)]
    for process in both:
        process.start()
    (read, ids), (other_read, other_ids) = sorted(results.get(timeout=60) for _ in both)
    for process in both:
        process.join()
    assert (read, other_read) == (0, 300)
    assert ids == other_ids


# ---------------------------------------------------------------- for people


def test_the_manifest_says_what_it_is(tmp_path):
    corpus = corpus_of(tmp_path / "text")
    cache = prepare(corpus, BYTES, tmp_path / "cache")
    manifest = json.loads((cache.folder / "manifest.json").read_text())
    assert manifest["corpus"]["description"] == corpus.description
    assert manifest["tokenizer"] == {
        "name": "bytes",
        "fingerprint": BYTES.fingerprint,
        "vocab_size": 257,
        "separator_id": 256,
    }
    assert sum(s["bytes"] for s in manifest["splits"]["train"]) == cache.splits["train"].n_bytes


def test_progress_counts_the_tokens_of_each_split(tmp_path):
    seen: dict[str, list[int]] = {}
    corpus = corpus_of(tmp_path / "text")
    cache = prepare(
        corpus, BYTES, tmp_path / "cache", shard_tokens=200, progress=lambda s, n: seen.setdefault(s, []).append(n)
    )
    assert {s: n[-1] for s, n in seen.items()} == {s: cache.splits[s].n_stored for s in cache.splits}
    assert all(n == sorted(n) for n in seen.values())


def test_an_unknown_character_stops_the_build_with_its_name(tmp_path):
    corpus = corpus_of(tmp_path / "text")
    with pytest.raises(TokenizerError, match="'é'"):
        prepare(corpus, build_char(["".join(WORDS) + " 0123456789"]), tmp_path / "cache")


def test_a_cache_folder_that_cannot_be_written_is_one_sentence(tmp_path):
    (tmp_path / "cache").write_text("a file is in the way")
    with pytest.raises(CorpusError, match=r"--data\.cache_dir"):
        prepare(corpus_of(tmp_path / "text"), BYTES, tmp_path / "cache")
