"""Nothing of a text is lost, held-out text is held out, and every bad file is one sentence."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pocketlm.config import DataConfig
from pocketlm.data import hub, sources
from pocketlm.data.corpora import Corpus, open_corpus
from pocketlm.data.sources import cut, read_text
from pocketlm.errors import CorpusError


def opened(path: Path | str, mirror: Path | None = None, **settings) -> Corpus:
    return open_corpus(DataConfig(path=str(path), **settings), mirror=mirror)


def all_documents(corpus: Corpus) -> dict[str, list[str]]:
    return {split: list(corpus.documents(split)) for split in corpus.splits}


def write(folder: Path, **files: str | bytes) -> Path:
    for name, content in files.items():
        path = folder / name.replace("__", "/").replace("_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


# ---------------------------------------------------------------- documents


UNITS = st.sampled_from(["file", "paragraph", "line", "article"])


@given(st.lists(st.text("ab =\n\u2028é", max_size=12), max_size=12), UNITS)
def test_documents_joined_are_the_text(pieces, unit):
    text = "".join(pieces)
    documents = list(cut(iter(pieces), unit))
    assert "".join(documents) == (text if text.strip() else "")
    assert all(document.strip() for document in documents)


@given(st.text("ab \n", max_size=60), UNITS, st.integers(1, 60))
def test_documents_do_not_depend_on_how_the_file_is_read(text, unit, size):
    pieces = [text[i : i + size] for i in range(0, len(text), size)]
    assert list(cut(pieces, unit)) == list(cut([text], unit))


def test_paragraphs_end_at_blank_lines_and_keep_them():
    text = "\n one\ntwo\n\n \nthree\n\nfour"
    assert list(cut([text], "paragraph")) == ["\n one\ntwo\n\n \n", "three\n\n", "four"]
    assert list(cut([text], "line")) == ["\n one\n", "two\n\n \n", "three\n\n", "four"]


def test_no_document_is_longer_than_the_limit(monkeypatch):
    monkeypatch.setattr(sources, "LONGEST", 10)
    assert list(cut(["abc\n"] * 5, "file")) == ["abc\nabc\n", "abc\nabc\n", "abc\n"]
    documents = list(cut(["x" * 4] * 5 + ["\n"], "line"))
    assert documents == ["x" * 12, "xxxxxxxx\n"]


def test_a_huge_file_is_read_in_bounded_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "LONGEST", 2**20)
    (tmp_path / "huge.txt").write_text("All work and no play.\n" * 1_500_000)
    corpus = opened(tmp_path / "huge.txt")
    tracemalloc.start()
    length = sum(len(text) for text in corpus.documents("train"))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert length == int(33_000_000 * 0.9)
    assert peak < 16 * 2**20


def test_wikitext_has_its_published_articles_and_loses_nothing(mirror):
    for document in ("auto", "line"):
        documents = all_documents(opened("wikitext-2", mirror, document=document))
        assert documents["train"][0].startswith(" \n = Valkyria Chronicles III = \n")
        if document == "auto":
            assert {s: len(d) for s, d in documents.items()} == {"train": 600, "validation": 60, "test": 60}
        for split, file in (("train", "train"), ("validation", "valid"), ("test", "test")):
            path = mirror / "wikitext-2" / f"wiki.{file}.tokens"
            assert "".join(documents[split]).encode() == path.read_bytes()


def test_the_standard_library_comes_without_its_tests():
    corpus = opened("stdlib")
    documents = all_documents(corpus)
    assert any("class OrderedDict" in text for text in documents["train"] + documents["validation"])
    assert not any("import unittest\n" in text and "test.support" in text for text in documents["train"])
    assert 0.02 < len(documents["validation"]) / (len(documents["train"]) + len(documents["validation"])) < 0.2
    assert "Python's standard library" in corpus.description


# ---------------------------------------------------------------- splits


def test_shakespeare_is_cut_where_everybody_cuts_it(mirror):
    text = (mirror / "shakespeare" / "input.txt").read_text()
    n = len(text)
    expected = {"train": [text[: int(n * 0.9)]], "validation": [text[int(n * 0.9) :]]}
    assert all_documents(opened("shakespeare", mirror)) == expected
    assert all_documents(opened(mirror / "shakespeare" / "input.txt")) == expected


@pytest.mark.parametrize("n_files", [1, 3, 9])
def test_few_documents_are_cut_at_the_tail(n_files, tmp_path):
    texts = [f"file {i}: " + "é" * (10 * i) + "\n" for i in range(n_files)]
    for i, text in enumerate(texts):
        (tmp_path / f"{i}.txt").write_text(text)
    documents = all_documents(opened(tmp_path, val_fraction=0.25))
    whole = "".join(texts)
    assert "".join(documents["train"]) == whole[: int(len(whole) * 0.75)]
    assert "".join(documents["validation"]) == whole[int(len(whole) * 0.75) :]


def test_many_documents_are_dealt_once_each_and_stay_where_they_are(tmp_path):
    for i in range(200):
        (tmp_path / f"{i}.txt").write_text(f"text {i}")
    before = all_documents(opened(tmp_path))
    assert sorted(before["train"] + before["validation"]) == sorted(f"text {i}" for i in range(200))
    assert 5 <= len(before["validation"]) <= 40
    for i in range(200, 230):
        (tmp_path / f"{i}.txt").write_text(f"text {i}")
    (tmp_path / "0.txt").unlink()
    after = all_documents(opened(tmp_path))
    assert set(before["train"]) - {"text 0"} <= set(after["train"])
    assert set(before["validation"]) - {"text 0"} <= set(after["validation"])


def test_a_corpus_keeps_the_splits_it_brings(tmp_path):
    write(tmp_path, train_txt="one", valid_txt="two", test_txt="three", README_md="not text to train on")
    assert all_documents(opened(tmp_path)) == {"train": ["one"], "validation": ["two"], "test": ["three"]}


def test_a_corpus_without_validation_gives_some_of_its_training_text(tmp_path):
    write(tmp_path, train_txt="0123456789", test_txt="three")
    assert all_documents(opened(tmp_path)) == {"train": ["012345678"], "validation": ["9"], "test": ["three"]}


def test_a_folder_of_scripts_is_no_folder_of_splits(tmp_path):
    write(tmp_path, train_py="import this\n", test_py="import that\n", deep__er__val_py="import these\n")
    documents = all_documents(opened(tmp_path))
    assert "".join(documents["train"] + documents["validation"]) == "import these\nimport that\nimport this\n"


def test_a_folder_mixes_kinds_and_skips_hidden_and_binary_files(tmp_path):
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    write(
        tmp_path,
        a_txt="plain",
        b__c_jsonl='{"text": "row 1"}\n\n{"text": "row 2"}\n',
        _hidden="secret",
        d_png=b"\x89PNG\0\0",
        _git__config="secret",
        blank_txt=" \n",
    )
    pq.write_table(pa.table({"text": ["col 1", None, "col 2"]}), tmp_path / "e.parquet")
    documents = all_documents(opened(tmp_path, val_fraction=0.01))
    assert "|".join(documents["train"]) + documents["validation"][0] == "plain|row 1|row 2|col 1|col 2"


def test_at_most_max_documents_are_read(tmp_path):
    (tmp_path / "rows.jsonl").write_text("".join(f'{{"text": "row {i}"}}\n' for i in range(100)) + "not json")
    documents = all_documents(opened(tmp_path / "rows.jsonl", max_documents=40))
    assert sorted(documents["train"] + documents["validation"]) == sorted(f"row {i}" for i in range(40))


def test_a_path_wins_over_a_name(tmp_path, monkeypatch):
    monkeypatch.chdir(write(tmp_path, stdlib="0123456789", karpathy__tiny="abcdefghij"))
    assert all_documents(opened("stdlib"))["train"] == ["012345678"]
    assert all_documents(opened("karpathy/tiny"))["train"] == ["abcdefghi"]


def test_the_fingerprint_follows_the_text_and_its_shape_but_not_its_place(tmp_path):
    first = opened(write(tmp_path / "here", a_txt="one", b_txt="two")).fingerprint()
    assert opened(write(tmp_path / "there", a_txt="one", b_txt="two")).fingerprint() == first
    others = [
        opened(write(tmp_path / "text", a_txt="one", b_txt="twi")),
        opened(write(tmp_path / "name", a_txt="one", c_txt="two")),
        opened(tmp_path / "here", document="line"),
        opened(tmp_path / "here", val_fraction=0.2),
        opened(tmp_path / "here", max_documents=1),
    ]
    assert len({first, *(c.fingerprint() for c in others)}) == 6


# ---------------------------------------------------------------- decoding


@given(st.text("a\r\n\ufeffé😀", max_size=40), st.booleans(), st.integers(1, 7))
def test_text_is_decoded_as_python_opens_it(tmp_path_factory, text, bom, size):
    path = tmp_path_factory.getbasetemp() / "decoded.txt"
    path.write_bytes((b"\xef\xbb\xbf" if bom else b"") + text.encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "PIECE_BYTES", size)
        assert "".join(read_text(path, "refuse")) == path.read_text(encoding="utf-8-sig")


@given(st.binary(max_size=30), st.integers(1, 7))
def test_the_first_bad_byte_is_named_and_can_be_replaced(tmp_path_factory, data, size):
    path = tmp_path_factory.getbasetemp() / "bad.txt"
    path.write_bytes(data)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "PIECE_BYTES", size)
        try:
            data.decode()
        except UnicodeDecodeError as e:
            with pytest.raises(CorpusError, match=rf"bad\.txt.* byte {e.start} .*invalid_utf8 replace"):
                list(read_text(path, "refuse"))
        whole = io.StringIO(data.decode(errors="replace").removeprefix("\ufeff"), newline=None).read()
        assert "".join(read_text(path, "replace")) == whole


def test_half_a_surrogate_pair_in_jsonl_is_refused_or_replaced(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"text": "whole \\ud83d\\ude00 half \\ud83d."}\n')
    with pytest.raises(CorpusError, match="line 1"):
        opened(tmp_path / "x.jsonl")
    documents = all_documents(opened(tmp_path / "x.jsonl", invalid_utf8="replace"))
    assert "".join(documents["train"] + documents["validation"]) == "whole 😀 half \ufffd."


# ---------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.txt", b"", "empty"),
        ("a.txt", b" \n\t\r\n", "blank"),
        ("a.txt", b"x", "1 characters"),
        ("a.txt", b"text\0text", "NUL"),
        ("a.txt", b"\xff\xfea", "byte 0 "),
        ("a.txt", b"ok\n" * 500_000 + b"\xe9", "byte 1500000 "),
        ("a.jsonl", b'{"text": "ok"}\n{"text": ', "line 2"),
        ("a.jsonl", b'{"body": "ok", "title": "x"}\n', "no 'text', only body, title"),
        ("a.jsonl", b"{}\n", "only nothing"),
        ("a.jsonl", b"[1]\n", r"line 1 .*\[1\]"),
        ("a.jsonl", b'{"text": 3}\n', "line 1 .*3.*text_field"),
        ("a.jsonl", b'{"text": "ok"}\n{"text": "\xe9"}\n', "byte 10 of line 2"),
        ("a.jsonl", b"[" * 100_000, "line 1"),
        ("a.jsonl", b'{"text": null}\n', "empty"),
        ("a.parquet", b"PAR1 and no more", "parquet"),
        ("a.parquet", b"", "parquet"),
    ],
)
def test_a_bad_file_is_one_sentence_that_names_it(name, content, words, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CorpusError, match=words) as caught:
        all_documents(opened(tmp_path / name))
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_parquet_file_without_the_column_names_those_it_has(tmp_path):
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    pq.write_table(pa.table({"body": ["x"], "number": [1]}), tmp_path / "a.parquet")
    with pytest.raises(CorpusError, match=r"a\.parquet.* no 'text', only body, number.*text_field"):
        opened(tmp_path / "a.parquet")
    with pytest.raises(CorpusError, match="'number' holds int64"):
        opened(tmp_path / "a.parquet", text_field="number")


def test_a_missing_path_suggests_its_neighbour(tmp_path):
    write(tmp_path, book_txt="text")
    with pytest.raises(CorpusError, match=r"did you mean '.*book\.txt'"):
        opened(tmp_path / "bok.txt")
    with pytest.raises(CorpusError, match="did you mean 'shakespeare'"):
        opened("shakespere")
    for name in ("no such text", "\0", "x" * 5000):
        with pytest.raises(CorpusError, match="there is no text"):
            opened(name)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_neither_a_pipe_nor_an_empty_folder_is_text(tmp_path):
    with pytest.raises(CorpusError, match="empty"):
        opened(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(CorpusError, match="neither"):
        opened(tmp_path / "pipe")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root reads everything")
def test_an_unreadable_file_is_one_sentence(tmp_path):
    path = write(tmp_path, a_txt="text") / "a.txt"
    path.chmod(0)
    with pytest.raises(CorpusError, match=r"a\.txt.* cannot be read"):
        opened(path)


# ---------------------------------------------------------------- the Hub


@pytest.mark.parametrize("streaming", [False, True])
def test_rows_of_a_dataset_are_its_texts(streaming, tmp_path, monkeypatch):
    pytest.importorskip("datasets")
    rows = [f"row {i}" for i in range(20)]
    for split in ("train", "test"):
        write(tmp_path / "data", **{f"{split}_jsonl": "".join(f'{{"text": "{split} {r}"}}\n' for r in rows)})
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    dataset = hub.load(str(tmp_path / "data"), subset=None, revision=None, streaming=streaming, field="text")
    assert {s: list(read()) for s, read in dataset.splits.items()} == {
        s: [f"{s} {r}" for r in rows] for s in ("train", "test")
    }
    wrong = hub.load(str(tmp_path / "data"), subset=None, revision=None, streaming=streaming, field="body")
    with pytest.raises(CorpusError, match=r"'body'.* columns text.*text_field"):
        next(wrong.splits["train"]())


@pytest.mark.parametrize("name", ["wikitext-2", "shakespeare", "someone/something"])
def test_without_a_network_the_sentence_says_what_to_do(name, tmp_path):
    pytest.importorskip("datasets")
    code = (
        "from pocketlm.data.corpora import open_corpus, DataConfig, CorpusError\n"
        f"try: open_corpus(DataConfig(path={name!r}), mirror=None)\n"
        "except CorpusError as e: print(e)"
    )
    env = {"PYTHONPATH": ":".join(sys.path), "HF_HOME": str(tmp_path), "HF_ENDPOINT": "http://hub.invalid"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True, timeout=15)
    assert "could not be read from the Hub" in done.stdout
    assert "--data.mirror" in done.stdout
    assert done.stdout.count("\n") == 1
