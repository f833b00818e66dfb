"""Training: schedules, optimisers, exact accumulation, resume, checkpoints."""

from __future__ import annotations

import hashlib
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from pocketlm.cli import main
from pocketlm.config import ModelConfig, OptimizerConfig, ScheduleConfig, load_config, override_layer, preset_layer
from pocketlm.data.loader import Batch
from pocketlm.errors import RunError
from pocketlm.model.transformer import Transformer
from pocketlm.train import checkpoint
from pocketlm.train.loop import compute_gradients, train, update
from pocketlm.train.optim import Optimizers
from pocketlm.train.runs import Run
from pocketlm.train.schedule import lr_factor
from pocketlm.train.setup import open_session
from pocketlm.train.state import TrainState

MODES = ["stream", "pack", "bucket", "pad"]
SMALL = {
    "model.n_layer": "2",
    "model.n_head": "2",
    "model.n_embd": "16",
    "model.block_size": "32",
    "tokenizer.name": "bytes",
    "data.document": "line",
    "training.steps": "6",
    "training.batch_size": "3",
    "training.grad_accum": "2",
    "training.precision": "fp32",
    "training.device": "cpu",
    "training.save_every": "2",
    "training.log_every": "1",
    "schedule.warmup_steps": "2",
    "evaluation.every": "3",
    "sampling.every": "3",
    "sampling.max_tokens": "4",
}


def small_config(book: Path, **changes: str):
    pairs = {**SMALL, "data.path": str(book), "data.cache_dir": str(book.parent / "cache"), **changes}
    return load_config(preset_layer("demo"), override_layer(list(pairs.items())))


def run_small(folder: Path, book: Path, **changes: str):
    session = open_session(
        small_config(book, **changes), Run(folder), command="", began=time.perf_counter(), quiet=True
    )
    return session, train(session)


def weights_hash(run: Run, which: str = "last") -> str:
    return hashlib.sha256((run.checkpoint(which).folder / checkpoint.WEIGHTS).read_bytes()).hexdigest()


# ---------------------------------------------------------------- schedule and optimiser


@pytest.mark.parametrize("name", ["cosine", "linear", "constant", "wsd"])
def test_warmup_is_linear_and_reaches_the_peak(name):
    schedule = ScheduleConfig(name=name, warmup_steps=4, min_lr_ratio=0.1)
    assert [lr_factor(s, 100, schedule) for s in range(4)] == [0.25, 0.5, 0.75, 1.0]
    assert lr_factor(4, 100, schedule) == 1.0


def test_schedules_equal_their_formulas():
    half = 54  # half-way between warm-up (step 4) and the end (step 104)
    for name, wanted in {"cosine": 0.55, "linear": 0.55, "constant": 1.0, "wsd": 1.0}.items():
        schedule = ScheduleConfig(name=name, warmup_steps=4, min_lr_ratio=0.1, decay_fraction=0.2)
        assert lr_factor(half, 104, schedule) == pytest.approx(wanted)
        assert lr_factor(104, 104, schedule) == pytest.approx(1.0 if name == "constant" else 0.1)
    wsd = ScheduleConfig(name="wsd", warmup_steps=4, min_lr_ratio=0.0, decay_fraction=0.2)
    assert lr_factor(94, 104, wsd) == pytest.approx(0.5)
    cosine = ScheduleConfig(name="cosine", warmup_steps=0, min_lr_ratio=0.0)
    assert lr_factor(25, 100, cosine) == pytest.approx(0.5 * (1 + math.cos(math.pi / 4)))


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_vectors_are_never_decayed_and_every_parameter_is_owned_once(name):
    model = Transformer(ModelConfig(vocab_size=11, block_size=8, n_layer=2, n_head=2, n_embd=8))
    optimizers = Optimizers(model, OptimizerConfig(name=name, weight_decay=0.3))
    groups = [group for part in optimizers.parts for group in part.param_groups]
    owned = [p for group in groups for p in group["params"]]
    assert {id(p) for p in owned} == {id(p) for p in model.parameters()} and len(owned) == len(set(owned))
    for group in groups:
        assert group["weight_decay"] == (0.3 if group["params"][0].ndim > 1 else 0.0)
        assert len({p.ndim > 1 for p in group["params"]}) == 1


def test_adamw_takes_the_steps_of_its_formula():
    """Loshchilov and Hutter (2019), Algorithm 2, in float64."""
    torch.manual_seed(0)
    model = Transformer(ModelConfig(vocab_size=5, block_size=4, n_layer=1, n_head=1, n_embd=4)).double()
    config = OptimizerConfig(lr=0.01, beta1=0.8, beta2=0.9, weight_decay=0.2)
    optimizers = Optimizers(model, config)
    weight = model.blocks[0].attn.q.weight
    w, m, v = weight.detach().clone(), torch.zeros_like(weight), torch.zeros_like(weight)
    for step in (1, 2, 3):
        gradients = {p: torch.randn_like(p) for p in model.parameters()}
        for p, g in gradients.items():
            p.grad = g.clone()
        for part in optimizers.parts:
            part.step()
        g = gradients[weight]
        m, v = 0.8 * m + 0.2 * g, 0.9 * v + 0.1 * g * g
        w = w - 0.01 * 0.2 * w - 0.01 * (m / (1 - 0.8**step)) / ((v / (1 - 0.9**step)).sqrt() + 1e-8)
        torch.testing.assert_close(weight.detach(), w, rtol=1e-9, atol=1e-12)


# ---------------------------------------------------------------- accumulation


@pytest.mark.parametrize("mode", MODES)
def test_accumulation_equals_one_large_batch(tmp_path, book, mode):
    """Gradients of N micro-batches of unlike lengths are those of the mean over all their tokens."""
    session, _ = run_small(tmp_path / "run", book, **{"data.mode": mode, "training.steps": "1"})
    model, batches = session.state.model, session.phases[0].loader.batches(session.state.progress.position)
    window = [next(batches)[0] for _ in range(4)]

    model.zero_grad()
    total = sum(
        torch.nn.functional.cross_entropy(
            model(b.inputs, document_ids=b.document_ids).flatten(0, 1), b.targets.flatten(), reduction="sum"
        )
        for b in window
    )
    n_targets = sum(int((b.targets != -100).sum()) for b in window)
    (total / n_targets).backward()
    wanted = {name: p.grad.clone() for name, p in model.named_parameters()}

    seen = {}
    state = TrainState(model, _Recorder(model, seen), torch.amp.GradScaler("cpu", enabled=False))
    model.zero_grad()
    loss, norm = compute_gradients(state, window, sum(b.n_targets for b in window), grad_clip=0.0)
    update(state, allowed=True)
    assert loss == pytest.approx(total.item() / n_targets, rel=1e-6)
    assert norm == pytest.approx(float(torch.stack([g.norm() for g in wanted.values()]).norm()), rel=1e-5)
    for name, gradient in wanted.items():
        torch.testing.assert_close(seen[name], gradient, rtol=1e-5, atol=1e-6)


class _Recorder(torch.optim.SGD):
    """An optimiser that keeps the gradients it is given, in place of the run's own."""

    def __init__(self, model, seen):
        super().__init__(model.parameters(), lr=0.0)
        self.parts, self.names, self.seen = [self], model, seen

    def step(self, closure=None):
        self.seen.update({name: p.grad.clone() for name, p in self.names.named_parameters()})


def test_fp16_scaling_skips_an_overflow_and_lowers_the_scale():
    model = Transformer(ModelConfig(vocab_size=11, block_size=8, n_layer=1, n_head=2, n_embd=8))
    state = TrainState(model, Optimizers(model, OptimizerConfig()), torch.amp.GradScaler("cpu", init_scale=2.0**127))
    tokens = torch.randint(0, 11, (2, 8))
    before = {n: p.clone() for n, p in model.named_parameters()}
    compute_gradients(state, [Batch(tokens, tokens, None, 16)], 16, 1.0)
    update(state, allowed=True)
    assert state.scaler.get_scale() < 2.0**127
    assert all(torch.equal(before[n], p) for n, p in model.named_parameters())


# ---------------------------------------------------------------- resume


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_resume_ends_in_the_same_weights_and_metrics(tmp_path, book, mode, optimizer):
    changes = {"data.mode": mode, "model.dropout": "0.1", "optimizer.name": optimizer}
    whole, _ = run_small(tmp_path / "whole", book, **changes)
    part = Run(tmp_path / "part")
    run_small(part.folder, book, **{**changes, "training.keep_last": "9"})
    for found in checkpoint.find(part.checkpoints):
        if found.step > 2:
            for file in found.folder.iterdir():
                file.unlink()
            found.folder.rmdir()
    assert checkpoint.find(part.checkpoints)[0].step == 2
    run_small(part.folder, book, **changes)
    assert weights_hash(part) == weights_hash(whole.run)

    def curve(run: Run):
        lines = map(json.loads, (run.logs / "metrics.jsonl").read_text().splitlines())
        return [
            (x["kind"], x["step"], x.get("loss"), x.get("text")) for x in lines if x["kind"] not in ("start", "end")
        ]

    assert curve(part) == curve(whole.run)


def test_the_saved_configuration_repeats_the_run(tmp_path, book):
    first, _ = run_small(tmp_path / "first", book)
    again = open_session(first.run.config(), Run(tmp_path / "again"), command="", began=0.0, quiet=True)
    train(again)
    assert weights_hash(again.run) == weights_hash(first.run)


def test_the_same_command_goes_on_with_its_run_and_another_is_refused(tmp_path, book, monkeypatch, capsys):
    monkeypatch.setenv("POCKETLM_CACHE", str(tmp_path / "cache"))
    flags = [x for name, value in SMALL.items() for x in (f"--{name}", value)]
    command = ["train", str(book), "--out", str(tmp_path / "run"), *flags]
    assert main(command) == 0
    run = Run(tmp_path / "run")
    finished = weights_hash(run)
    newest = run.checkpoint("last").folder
    for file in newest.iterdir():
        file.unlink()
    newest.rmdir()
    assert main(command) == 0
    assert weights_hash(run) == finished
    capsys.readouterr()
    assert main(command) == 2
    assert "is finished, at step 6 of 6" in capsys.readouterr().err
    assert main([*command, "--optimizer.lr", "0.5"]) == 2
    assert "other settings (optimizer.lr)" in capsys.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_finishes_the_step_saves_and_says_how_to_resume(tmp_path, book, number):
    flags = [x for name, value in {**SMALL, "training.steps": "100000"}.items() for x in (f"--{name}", value)]
    command = [sys.executable, "-m", "pocketlm", "train", str(book), "--out", str(tmp_path / "run"), *flags]
    env = {**os.environ, "POCKETLM_CACHE": str(tmp_path / "cache")}
    process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    metrics = tmp_path / "run" / "logs" / "metrics.jsonl"
    deadline = time.monotonic() + 60
    while not (metrics.exists() and metrics.read_text().count('"train"') > 3):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(number)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 130, out
    assert "--resume" in out and "Traceback" not in out
    saved = checkpoint.find(Run(tmp_path / "run").checkpoints)[0]
    steps = [json.loads(x) for x in metrics.read_text().splitlines()]
    assert saved.step == max(x["step"] for x in steps if x["kind"] == "train")


# ---------------------------------------------------------------- checkpoints


def test_best_and_last_are_kept(tmp_path, book):
    session, _ = run_small(tmp_path / "run", book, **{"training.keep_last": "1", "evaluation.every": "2"})
    kept = {c.step for c in checkpoint.find(session.run.checkpoints)}
    assert kept == {session.state.progress.best_step, 6}
    assert session.run.checkpoint("best").step == session.state.progress.best_step
    assert session.run.checkpoint("last").step == 6


@pytest.mark.parametrize("name", [checkpoint.WEIGHTS, checkpoint.TRAINING, checkpoint.STATE])
def test_one_flipped_bit_is_noticed(tmp_path, book, name):
    session, _ = run_small(tmp_path / "run", book)
    saved = session.run.checkpoint("last")
    data = bytearray((saved.folder / name).read_bytes())
    data[len(data) // 2] ^= 1
    (saved.folder / name).write_bytes(data)
    with pytest.raises(RunError, match="damaged"):
        saved.restore(session.state)


def test_resume_passes_over_a_damaged_checkpoint_and_never_starts_again(tmp_path, book, capsys):
    whole, _ = run_small(tmp_path / "whole", book)
    part = Run(tmp_path / "part")
    run_small(part.folder, book, **{"training.keep_last": "9"})
    newest = checkpoint.find(part.checkpoints)[0]
    (newest.folder / checkpoint.TRAINING).write_bytes(b"not what it was")
    run_small(part.folder, book)
    assert newest.folder.name in capsys.readouterr().err
    assert weights_hash(part) == weights_hash(whole.run)
    for saved in checkpoint.find(part.checkpoints):
        (saved.folder / checkpoint.WEIGHTS).write_bytes(b"")
    before = {c.step for c in checkpoint.find(part.checkpoints)}
    with pytest.raises(RunError, match="none of the run's"):
        run_small(part.folder, book)
    assert {c.step for c in checkpoint.find(part.checkpoints)} == before


def test_changed_text_is_noticed_on_resume(tmp_path, book):
    run_small(tmp_path / "run", book)
    book.write_text(book.read_text() + "One more line.\n")
    with pytest.raises(RunError, match="changed since"):
        run_small(tmp_path / "run", book)


def test_time_is_booked_where_it_was_spent(tmp_path, book):
    _, end = run_small(tmp_path / "run", book)
    seconds = end.summary["seconds"]
    assert set(seconds) == {"startup", "training", "reporting", "evaluation", "saving", "sampling"}
    assert sum(seconds.values()) == pytest.approx(end.summary["wall_seconds"], rel=0.05, abs=0.2)
