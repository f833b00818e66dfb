"""A user's mistakes: one clear sentence, exit code 2, no traceback, nothing half-written."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from pocketlm.cli import main

TINY = ["--model.n_layer", "1", "--model.n_embd", "16", "--model.n_head", "2", "--model.block_size", "16"]
TINY += ["--tokenizer.name", "bytes", "--training.steps", "1", "--training.device", "cpu"]

# What a user types after `pocketlm`, and words that the sentence must hold. {folder} is a folder with the files of
# `files` below.
CASES: list[tuple[str, str, list[str]]] = [
    # commands and options
    ("no such command", "trian", ["unknown command 'trian'", "did you mean train"]),
    ("no such command, nothing near", "xyzzy", ["unknown command", "commands: train"]),
    ("unknown option", "train --resum latest", ["unknown option --resum", "did you mean --resume"]),
    ("unknown option of generate", "generate latest x --temprature 1", ["--temprature"]),
    ("missing run", "generate", ["RUN"]),
    ("two presets", "train demo demo", ["one argument too many", "demo"]),
    ("resume with a preset", "train demo --resume latest", ["--resume takes everything from the run"]),
    ("option without its value", "train --model.n_layer", ["expected one argument"]),
    # settings on the command line
    ("misspelt setting", "train --model.n_layr 4", ["--model.n_layr", "did you mean --model.n_layer"]),
    ("setting without its group", "train --n_layer 4", ["--n_layer", "did you mean --model.n_layer"]),
    ("misspelt group", "train --modle.n_layer 4", ["--modle.n_layer", "did you mean --model.n_layer"]),
    ("British spelling", "train --optimiser.lr 1", ["did you mean --optimizer.lr"]),
    ("text for a number", "train --model.n_layer four", ["model.n_layer", "valid integer", "'four'"]),
    ("fraction for a count", "train --model.n_layer 2.5", ["model.n_layer", "2.5"]),
    ("truth for a number", "train --model.dropout true", ["model.dropout", "'true'"]),
    ("zero layers", "train --model.n_layer 0", ["model.n_layer", "greater than or equal to 1"]),
    ("negative dropout", "train --model.dropout -0.1", ["model.dropout", "-0.1"]),
    ("not a number", "train --optimizer.lr nan", ["optimizer.lr", "finite"]),
    ("infinite", "train --optimizer.lr inf", ["optimizer.lr", "finite"]),
    ("unknown choice", "train --data.mode packed", ["data.mode", "'pack'", "'packed'"]),
    ("heads do not divide the width", "train --model.n_head 7", ["n_embd 192", "n_head 7"]),
    ("key-value heads do not divide the heads", "train --model.n_kv_head 3", ["n_head 4", "n_kv_head 3"]),
    ("odd head size with rotary positions", "train --model.n_embd 20 --model.n_head 4", ["even head size", "5"]),
    ("no length", "train --training.steps none", ["training.steps", "training.epochs", "empty"]),
    ("window beyond the context", "train --training.window 9999", ["training.window 9999", "256"]),
    ("stride beyond the context", "train --evaluation.stride 9999", ["evaluation.stride 9999", "256"]),
    ("several mistakes at once", "train --model.n_layer x --optimizer.lr y", ["model.n_layer", "optimizer.lr"]),
    ("absent device", "train --training.device cuda", ["training.device is cuda", "auto or cpu"]),
    ("tiny tokenizer", "train --tokenizer.vocab_size 3", ["tokenizer.vocab_size", "257"]),
    # presets and YAML
    ("misspelt preset", "train smollm2-135", ["smollm2-135", "did you mean smollm2-135m"]),
    ("misspelt preset to print", "presets dmo", ["no preset 'dmo'", "did you mean demo"]),
    ("missing YAML", "train {folder}/none.yaml", ["no configuration file", "none.yaml"]),
    ("broken YAML", "train {folder}/broken.yaml", ["broken.yaml", "not valid YAML"]),
    ("YAML that is a list", "train {folder}/list.yaml", ["list.yaml", "must be a mapping"]),
    ("YAML with an unknown setting", "train {folder}/unknown.yaml", ["model.n_layr", "did you mean model.n_layer"]),
    ("YAML with an unknown group", "train {folder}/group.yaml", ["modle", "did you mean model"]),
    ("YAML with yes for a number", "train {folder}/yes.yaml", ["model.n_layer", "not a truth value"]),
    ("YAML with a group that is a number", "train {folder}/flat.yaml", ["model", "group of settings"]),
    ("YAML that is binary", "train {folder}/binary.yaml", ["binary.yaml", "cannot be read"]),
    ("YAML that is a folder", "train {folder}/folder.yaml", ["folder.yaml", "cannot be read"]),
    ("--config that is not there", "train demo --config {folder}/none.yaml", ["none.yaml"]),
    # text
    ("missing text", "train {folder}/none.txt", ["none.txt"]),
    ("missing text as a setting", "train --data.path {folder}/none.txt", ["none.txt"]),
    ("empty file", "train {folder}/empty.txt", ["empty.txt", "empty"]),
    ("only whitespace", "train {folder}/blank.txt", ["blank.txt"]),
    ("not UTF-8", "train {folder}/latin1.txt", ["latin1.txt", "UTF-8", "invalid_utf8"]),
    ("shorter than one window", "train {folder}/short.txt", ["fewer than one window of 16", "--training.window"]),
    ("folder without text", "train {folder}/no-text", ["no-text"]),
    ("broken jsonl", "train {folder}/broken.jsonl", ["broken.jsonl", "line 2"]),
    ("jsonl without the field", "train {folder}/field.jsonl", ["text", "body", "text_field"]),
    ("jsonl whose text is a number", "train {folder}/number.jsonl", ["number.jsonl"]),
    ("broken parquet", "train {folder}/broken.parquet", ["broken.parquet"]),
    ("an executable", "train {folder}/program.txt", ["program.txt"]),
    # tokenizers
    ("vocabulary too small", "train {folder}/good.txt --tokenizer.name bytes --model.vocab_size 100", ["100", "257"]),
    ("tokenizer that is no tokenizer", "train {folder}/good.txt --tokenizer.name {folder}/good.txt", ["good.txt"]),
    ("tokenizer folder without one", "train {folder}/good.txt --tokenizer.name {folder}/no-text", ["no-text"]),
    ("tokenizer to show, unknown", "tokenizer show {folder}/nowhere abc", ["nowhere"]),
    ("tokenizer into a full folder", "tokenizer train {folder}/good.txt --out {folder}", ["not an empty folder"]),
    ("tokenizer size", "tokenizer train {folder}/good.txt --vocab-size 3 --out {folder}/t", ["257"]),
    # runs
    ("no run yet", "generate latest hello", ["no run", "pocketlm train"]),
    ("no such run", "generate nowhere hello", ["no run 'nowhere'"]),
    ("a folder that is no run", "generate {folder}/no-text hello", ["not a run", "config.yaml"]),
    ("resume nothing", "train --resume latest", ["no run"]),
    ("run without checkpoint", "generate {folder}/bare-run hello", ["no checkpoint"]),
    ("run with a damaged configuration", "generate {folder}/bad-run hello", ["config.yaml"]),
    ("out is a full folder", "train {folder}/good.txt --out {folder}", ["--out", "not empty"]),
    ("out is a run", "train {folder}/good.txt --out {folder}/bare-run", ["already holds a run", "--resume"]),
    ("negative temperature", "generate x y --temperature -1", ["temperature", "-1"]),
    ("temperature that is no number", "generate x y --temperature warm", ["warm"]),
    ("no tokens", "generate x y --max-tokens 0", ["--max-tokens", "0"]),
    ("unknown checkpoint", "generate {folder}/bare-run y --checkpoint 7", ["no checkpoint"]),
    ("stride of nothing", "eval x --stride 0", ["--stride"]),
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    here = tmp_path / "in put"  # a space in the path, as on many desktops
    here.mkdir()
    texts = {
        "broken.yaml": "model: {n_layer: [",
        "list.yaml": "- 1\n- 2\n",
        "unknown.yaml": "model: {n_layr: 3}",
        "group.yaml": "modle: {n_layer: 3}",
        "yes.yaml": "model: {n_layer: yes}",
        "flat.yaml": "model: 3",
        "empty.txt": "",
        "blank.txt": " \n\t\n",
        "short.txt": "abc",
        "good.txt": "All work and no play makes Jack a dull boy.\n" * 50,
        "broken.jsonl": '{"text": "fine"}\n{"text": \n',
        "field.jsonl": '{"body": "not here"}\n',
        "number.jsonl": '{"text": 3}\n',
    }
    for name, text in texts.items():
        (here / name).write_text(text)
    (here / "binary.yaml").write_bytes(b"\xff\xfe\x00\x01")
    (here / "latin1.txt").write_bytes("caf\xe9 ".encode("latin-1") * 100)
    (here / "program.txt").write_bytes(b"\x7fELF\x00\x01\xff\xfe" * 100)
    (here / "broken.parquet").write_bytes(b"PAR1 but no more")
    for name in ("folder.yaml", "no-text", "bare-run", "bad-run"):
        (here / name).mkdir()
    (here / "bare-run" / "config.yaml").write_text("{training: {steps: 1}}")
    (here / "bad-run" / "config.yaml").write_text("model: {")
    return here


@pytest.mark.parametrize(("line", "words"), [c[1:] for c in CASES], ids=[c[0] for c in CASES])
def test_a_mistake_gets_one_sentence(line, words, folder, tmp_path, monkeypatch, capsys):
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    monkeypatch.setenv("POCKETLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    args = [word.format(folder=folder) for word in line.split()]
    if args[0] == "train" and str(folder) in line.format(folder=folder):
        args += TINY if not (".yaml" in line or "--tokenizer" in line or "--model" in line) else []
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*")}

    assert main(args) == 2
    err = capsys.readouterr().err
    assert err.startswith("pocketlm: error: ") and err.count("\n") == 1, err
    for word in words:
        assert word in err
    assert list(work.iterdir()) == [], "nothing half-written stays behind"
    assert {p: p.stat().st_mtime_ns for p in folder.rglob("*")} == before


@pytest.mark.skipif(os.name != "posix" or os.getuid() == 0, reason="root may read and write everything")
def test_unreadable_text_and_unwritable_runs(folder, tmp_path, monkeypatch, capsys):
    (folder / "good.txt").chmod(0)
    assert main(["train", str(folder / "good.txt"), *TINY]) == 2
    assert "good.txt" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("someone/some-corpus", ["some-corpus"]),
        ("wikitext-2", ["wikitext", "--data.mirror"]),
        ("shakespeare", ["shakespeare", "--data.mirror"]),
    ],
)
def test_without_a_network_the_hub_is_one_sentence(name, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("POCKETLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    monkeypatch.delenv("POCKETLM_MIRROR", raising=False)
    assert main(["train", "--data.path", name, *TINY]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and all(w in err for w in words), err
    assert not (tmp_path / "runs").exists()


def test_a_run_with_a_foreign_tokenizer_is_refused(tmp_path, book, monkeypatch, capsys):
    monkeypatch.setenv("POCKETLM_CACHE", str(tmp_path / "cache"))
    run = tmp_path / "run"
    assert main(["train", str(book), "--out", str(run), *TINY]) == 0
    capsys.readouterr()
    for name, text in {"{}": "", '{"version": "1.0"}': "", "[" * 10_000: ""}.items():
        (run / "tokenizer" / "tokenizer.json").write_text(name + text)
        assert main(["generate", str(run), "x"]) == 2
        assert "tokenizer" in capsys.readouterr().err
    assert json.loads((run / "summary.json").read_text())["finished"]
