"""A run that was stopped anywhere and resumed ends in the weights and metrics of one that never stopped."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from small import MODES, SMALL, contents, metrics, open_small, run_small, stop_small, weights_hash

from pocketlm.cli import main
from pocketlm.errors import RunError
from pocketlm.train import checkpoint
from pocketlm.train.loop import train
from pocketlm.train.runs import Run
from pocketlm.train.setup import open_session


def assert_same_end(part: Run, whole: Run) -> None:
    assert weights_hash(part) == weights_hash(whole)
    assert weights_hash(part, file=checkpoint.TRAINING) == weights_hash(whole, file=checkpoint.TRAINING)
    assert metrics(part) == metrics(whole)


# ---------------------------------------------------------------- bit for bit


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_stopped_anywhere_and_resumed_is_bit_identical(tmp_path, book, mode, precision, optimizer):
    """Dropout, accumulation and an average of the weights are on; the log's grid is not the checkpoints'."""
    changes = {
        "data.mode": mode,
        "training.precision": precision,
        "optimizer.name": optimizer,
        "model.dropout": "0.1",
        "training.ema": "0.9",
        "training.steps": "8",
        "training.log_every": "3",
    }
    whole, _ = run_small(tmp_path / "whole", book, **changes)
    part = tmp_path / "part"
    for step in (1, 4, 5):
        stopped = stop_small(part, book, step, **changes)
        assert stopped.state.progress.step == step
    run_small(part, book, **changes)
    assert_same_end(Run(part), whole.run)
    assert weights_hash(Run(part), file=checkpoint.AVERAGE) == weights_hash(whole.run, file=checkpoint.AVERAGE)


@pytest.mark.parametrize("stop", range(1, 13))
def test_every_stop_in_several_epochs_is_bit_identical(tmp_path, stop):
    """Five micro-batches an epoch, two a step: windows cross the epochs' edges."""
    book = tmp_path / "tiny.txt"
    book.write_text("".join(f"{n} and {n * n}\n" for n in range(40)))
    changes = {"training.steps": "12", "evaluation.every": "5", "sampling.every": "4", "training.save_every": "100"}
    whole, _ = run_small(tmp_path / "whole", book, **changes)
    assert whole.state.progress.position.epoch >= 2
    stop_small(tmp_path / "part", book, stop, **changes)
    run_small(tmp_path / "part", book, **changes)
    assert_same_end(Run(tmp_path / "part"), whole.run)


@pytest.mark.parametrize("mode", ["stream", *(pytest.param(m, marks=pytest.mark.slow) for m in MODES[1:])])
def test_resume_of_a_compiled_run_is_bit_identical(tmp_path, book, mode):
    """In a process of its own each time: compiled code must not depend on what a process met before."""
    flags = {**SMALL, "data.mode": mode, "training.compile": "true", "model.n_layer": "1", "training.steps": "5"}
    args = [x for name, value in flags.items() for x in (f"--{name}", value)]
    code = (
        "import sys; from pocketlm.cli import main; from pocketlm.train import loop; from small import StopAfter\n"
        "stop = int(sys.argv[1])\n"
        "train = loop.train\n"
        "loop.train = lambda s: setattr(s, 'observers', [*s.observers, StopAfter(s, stop)]) or train(s)\n"
        "sys.exit(main(sys.argv[2:]))\n"
    )
    env = {**os.environ, "POCKETLM_CACHE": str(tmp_path / "cache"), "PYTHONPATH": os.pathsep.join(sys.path)}
    for name, stops in (("whole", [9]), ("part", [2, 3, 9])):
        for stop in stops:
            command = [sys.executable, "-c", code, str(stop), "train", str(book), "--out", str(tmp_path / name), *args]
            done = subprocess.run(command, env=env, capture_output=True, text=True)
            assert done.returncode == (0 if stop == 9 else 130), done.stderr
            assert "no effect" not in done.stderr
    assert_same_end(Run(tmp_path / "part"), Run(tmp_path / "whole"))


@pytest.mark.parametrize("mode", MODES)
def test_resume_from_an_older_checkpoint_is_bit_identical(tmp_path, book, mode):
    """As after a kill: everything beyond the checkpoint was written already, and is written again."""
    changes = {"data.mode": mode, "model.dropout": "0.1"}
    whole, _ = run_small(tmp_path / "whole", book, **changes)
    part = Run(tmp_path / "part")
    run_small(part.folder, book, **{**changes, "training.keep_last": "9"})
    for found in checkpoint.find(part.checkpoints):
        if found.step > 2:
            checkpoint.remove(found.folder)
    part.summary_path.unlink()
    run_small(part.folder, book, **changes)
    assert_same_end(part, whole.run)


def test_a_validation_that_was_cut_short_is_done_again(tmp_path, book):
    """The stop comes in the middle of it; the checkpoint of its step is from before."""
    changes = {"evaluation.batch_size": "1"}
    whole, _ = run_small(tmp_path / "whole", book, **changes)
    session = open_small(tmp_path / "part", book, **changes)
    real = type(session.state.model).loss
    calls = []

    def loss(model, *args, **kwargs):
        if not model.training:
            calls.append(1)
            session.stop.requested |= len(calls) == 3
        return real(model, *args, **kwargs)

    session.state.model.loss = loss.__get__(session.state.model)
    assert not train(session).finished
    assert (session.state.progress.step, session.state.progress.best_step) == (3, None)
    run_small(tmp_path / "part", book, **changes)
    assert_same_end(Run(tmp_path / "part"), whole.run)


def test_time_adds_up_over_the_processes_of_a_run(tmp_path, book):
    stopped = stop_small(tmp_path / "run", book, 4)
    before = json.loads((tmp_path / "run" / "summary.json").read_text())
    _, end = run_small(tmp_path / "run", book)
    assert end.summary["wall_seconds"] > before["wall_seconds"]
    assert end.summary["seconds"]["training"] == pytest.approx(
        stopped.clock.seconds["training"] + end.summary["seconds"]["training"] - before["seconds"]["training"]
    )


# ---------------------------------------------------------------- commands


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
    checkpoint.remove(run.checkpoint("last").folder)
    assert main(command) == 0
    assert weights_hash(run) == finished
    capsys.readouterr()
    assert main(command) == 2
    assert "is finished, at step 6 of 6" in capsys.readouterr().err
    assert main([*command, "--optimizer.lr", "0.5"]) == 2
    assert "other settings (optimizer.lr)" in capsys.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_finishes_the_step_saves_and_says_how_to_resume(tmp_path, book, number):
    process = start(tmp_path, book)
    wait_for_steps(process, tmp_path, 4)
    process.send_signal(number)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 130, out
    assert "--resume" in out and "Traceback" not in out
    saved = checkpoint.find(Run(tmp_path / "run").checkpoints)[0]
    assert saved.step == max(x["step"] for x in metrics(Run(tmp_path / "run")) if x["kind"] == "train")


def test_a_second_ctrl_c_quits_at_once(tmp_path, book):
    # A step of many micro-batches, so that the second one comes while the first is still waiting for its end.
    process = start(tmp_path, book, **{"training.grad_accum": "3000", "training.steps": "2"})
    logged = tmp_path / "run" / "logs" / "train.log"
    deadline = time.monotonic() + 60
    while not (logged.exists() and "run:" in logged.read_text()):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=10)
    assert process.returncode == 130
    assert "interrupted" in out and "Traceback" not in out


def test_two_processes_cannot_have_one_run(tmp_path, book):
    first = start(tmp_path, book)
    wait_for_steps(first, tmp_path, 2)
    second = start(tmp_path, book)
    out, _ = second.communicate(timeout=60)
    assert second.returncode == 2
    assert "is being trained by another process" in out and out.count("\n") == 1
    assert first.poll() is None
    first.terminate()
    first.communicate(timeout=60)


def start(tmp_path: Path, book: Path, **changes: str) -> subprocess.Popen:
    flags = {**SMALL, "training.steps": "100000", **changes}
    args = [x for name, value in flags.items() for x in (f"--{name}", value)]
    command = [sys.executable, "-m", "pocketlm", "train", str(book), "--out", str(tmp_path / "run"), *args]
    env = {**os.environ, "POCKETLM_CACHE": str(tmp_path / "cache")}
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def wait_for_steps(process: subprocess.Popen, tmp_path: Path, n: int) -> None:
    path = tmp_path / "run" / "logs" / "metrics.jsonl"
    deadline = time.monotonic() + 60
    while not (path.exists() and path.read_text().count('"train"') >= n):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)


# ---------------------------------------------------------------- the same run


def test_settings_that_may_change_are_in_force_and_said(tmp_path, book):
    """A resumed optimiser must not bring its old learning rate and decay back."""
    run = Run(tmp_path / "run")
    stop_small(run.folder, book, 3)
    run_small(run.folder, book, **{"optimizer.lr": "0.5", "optimizer.weight_decay": "0.3", "schedule.name": "constant"})
    rates = {x["step"]: (x["lr"], x["weight_decay"]) for x in metrics(run) if x["kind"] == "train"}
    assert rates[4] == rates[6] == (0.5, 0.3) != rates[3]
    log = (run.logs / "train.log").read_text()
    assert "optimizer.lr is 0.5 from here on (before: 0.01)" in log
    assert "schedule.name is constant from here on (before: linear)" in log


def test_settings_that_make_another_run_are_refused_all_at_once(tmp_path, book):
    run = Run(tmp_path / "run")
    stop_small(run.folder, book, 3)
    before = contents(run.checkpoints)
    other = {"model.n_layer": "3", "training.seed": "1", "training.batch_size": "4", "data.mode": "pack"}
    with pytest.raises(RunError) as refused:
        run_small(run.folder, book, **other)
    for words in ("n_layer 3 (it has 2)", "seed 1 (it has 1337)", "batch_size 4 (it has 3)", "mode pack", "continue"):
        assert words in str(refused.value)
    assert contents(run.checkpoints) == before
    run_small(run.folder, book)


def test_changed_text_is_noticed_on_resume(tmp_path, book):
    stop_small(tmp_path / "run", book, 3)
    book.write_text(book.read_text() + "One more line.\n")
    with pytest.raises(RunError, match="changed since"):
        run_small(tmp_path / "run", book)


def test_another_machine_is_said(tmp_path, book):
    stop_small(tmp_path / "run", book, 3)
    threads = torch.get_num_threads()
    try:
        run_small(tmp_path / "run", book, **{"training.threads": str(threads + 1)})
    finally:
        torch.set_num_threads(threads)
    log = (tmp_path / "run" / "logs" / "train.log").read_text()
    assert f"threads {threads + 1} (before: {threads})" in log


def test_a_larger_number_of_steps_goes_on_with_a_finished_run(tmp_path, book):
    run_small(tmp_path / "run", book)
    with pytest.raises(RunError, match="finished, at step 6 of 6"):
        run_small(tmp_path / "run", book)
    _, end = run_small(tmp_path / "run", book, **{"training.steps": "8"})
    assert (end.step, end.finished) == (8, True)
