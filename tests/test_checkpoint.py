"""Checkpoints: whole or not there, verified byte by byte, kept by rule, never run."""

from __future__ import annotations

import json
import os
import resource
import shutil
import stat
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from small import contents, open_small, run_small, stop_small, weights_hash

from pocketlm.errors import RunError
from pocketlm.train import checkpoint
from pocketlm.train.loop import train
from pocketlm.train.runs import Run

FILES = [checkpoint.WEIGHTS, checkpoint.AVERAGE, checkpoint.TRAINING, checkpoint.STATE, checkpoint.MANIFEST]
KEEP_ALL = {"training.keep_last": "9", "training.ema": "0.9"}


@pytest.fixture
def whole(tmp_path, book) -> Run:
    return run_small(tmp_path / "whole", book, **KEEP_ALL)[0].run


@pytest.fixture
def part(tmp_path, book) -> Run:
    """A run of the same settings, stopped at step 5, checkpoints of steps 2, 3, 4 and 5 in it."""
    stop_small(tmp_path / "part", book, 5, **KEEP_ALL)
    return Run(tmp_path / "part")


def empty(path: Path) -> None:
    path.write_bytes(b"")


def halve(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def lose_the_last_byte(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def delete(path: Path) -> None:
    path.unlink()


def take_that_of_another_step(path: Path) -> None:
    shutil.copy(path.parent.with_name("step-00000002") / path.name, path)


def make_a_folder_of_it(path: Path) -> None:
    path.unlink()
    path.mkdir()


def link_it_elsewhere(path: Path) -> None:
    target = path.parents[2] / f"moved-{path.name}"
    path.rename(target)
    path.symlink_to(target)


def make_a_pipe_of_it(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


HARMS = [
    empty, halve, lose_the_last_byte, flip_a_bit, delete, take_that_of_another_step, make_a_folder_of_it,
    link_it_elsewhere, make_a_pipe_of_it,
]  # fmt: skip


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("harm", HARMS, ids=lambda f: f.__name__)
def test_a_damaged_checkpoint_is_passed_over_set_aside_and_said(part, whole, book, capsys, name, harm):
    newest = part.checkpoint("last").folder
    harm(newest / name)
    run_small(part.folder, book, **KEEP_ALL)
    told = capsys.readouterr().err
    if name == checkpoint.MANIFEST and harm in (delete, make_a_folder_of_it, make_a_pipe_of_it):
        assert "step-00000005" not in told  # an unfinished one, as a crash leaves it
    elif name == checkpoint.MANIFEST and harm is flip_a_bit:
        pass  # a flipped bit in the manifest may hit any of its words
    else:
        assert "step-00000005" in told and "set aside as 'step-00000005.unusable'" in told
    assert weights_hash(part) == weights_hash(whole)


def test_where_none_is_whole_nothing_is_touched(part, book):
    for saved in checkpoint.find(part.checkpoints):
        flip_a_bit(saved.folder / checkpoint.WEIGHTS)
    before = contents(part.checkpoints)
    with pytest.raises(RunError, match="none of the run's 4 checkpoints can be used"):
        run_small(part.folder, book, **KEEP_ALL)
    assert contents(part.checkpoints) == before


def test_a_later_checkpoint_of_another_run_is_refused(part, whole, book, tmp_path, capsys):
    other, _ = run_small(tmp_path / "other", book, **{**KEEP_ALL, "training.seed": "7"})
    shutil.copytree(other.run.checkpoint("last").folder, part.checkpoints / "step-00000006")
    run_small(part.folder, book, **KEEP_ALL)
    assert "belongs to another run" in capsys.readouterr().err
    assert weights_hash(part) == weights_hash(whole)


def test_a_renamed_checkpoint_is_refused(part, whole, book, capsys):
    part.checkpoint("last").folder.rename(part.checkpoints / "step-00000900")
    run_small(part.folder, book, **KEEP_ALL)
    assert "describes step 5" in capsys.readouterr().err
    assert weights_hash(part) == weights_hash(whole)


@pytest.mark.parametrize(("format", "words"), [(3, "update pocketlm"), ("x", "update pocketlm"), (1, "--init-from")])
def test_another_format_says_exactly_why_not(part, book, tmp_path, format, words):
    for saved in checkpoint.find(part.checkpoints):
        path = saved.folder / checkpoint.MANIFEST
        path.write_text(json.dumps({**json.loads(path.read_text()), "format": format}))
    session = open_small(tmp_path / "fresh", book, **KEEP_ALL)
    session.close()
    with pytest.raises(RunError, match=words):
        part.checkpoint("last").restore(session.state)
    if format == 1:
        assert part.checkpoint("last").weights()


# ---------------------------------------------------------------- what is in it


def test_the_files_can_be_read_without_us(part):
    folder = part.checkpoint("last").folder
    weights, average = load_file(folder / checkpoint.WEIGHTS), load_file(folder / checkpoint.AVERAGE)
    assert weights.keys() == average.keys() and all(t.dtype == torch.float32 for t in weights.values())
    with safe_open(folder / checkpoint.TRAINING, "pt") as file:
        names = set(file.keys())
    assert {"random/cpu", "optimizer/embed.weight/exp_avg", "optimizer/embed.weight/step"} <= names
    state = json.loads((folder / checkpoint.STATE).read_text())
    assert state["progress"]["step"] == 5 and state["progress"]["position"]
    manifest = json.loads((folder / checkpoint.MANIFEST).read_text())
    assert set(manifest["files"]) == set(FILES) - {checkpoint.MANIFEST}


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_files_have_the_mode_that_the_umask_asks_for(tmp_path, book, umask):
    before = os.umask(umask)
    try:
        session, _ = run_small(tmp_path / "run", book, **KEEP_ALL)
    finally:
        os.umask(before)
    for path in session.run.checkpoint("last").folder.iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask, path.name


def test_the_copy_is_not_touched_by_the_training_that_goes_on(tmp_path, book):
    session = open_small(tmp_path / "run", book)
    state, saver = session.state, session.saver
    kept = {name: p.detach().clone() for name, p in state.model.named_parameters()}
    state.progress.step = 1
    saver.save(state)
    with torch.no_grad():
        for p in state.model.parameters():
            p.fill_(7.0)
    saver.wait()
    session.close()
    saved = session.run.checkpoint("last").weights()
    assert all(torch.equal(saved[name], kept[name]) for name in kept)


@pytest.mark.parametrize("background", ["true", "false"])
def test_background_and_foreground_write_the_same_files(tmp_path, book, background):
    session, _ = run_small(tmp_path / background, book, **{"training.save_in_background": background})
    other, _ = run_small(tmp_path / "other", book)
    for name in (checkpoint.WEIGHTS, checkpoint.TRAINING):
        assert weights_hash(session.run, file=name) == weights_hash(other.run, file=name)


# ---------------------------------------------------------------- retention


def steps_of(run: Run) -> list[int]:
    return sorted(c.step for c in checkpoint.find(run.checkpoints))


def test_best_and_last_are_kept(tmp_path, book):
    session, _ = run_small(tmp_path / "run", book, **{"training.keep_last": "1", "evaluation.every": "2"})
    assert set(steps_of(session.run)) == {session.state.progress.best_step, 6}
    assert session.run.checkpoint("best").step == session.state.progress.best_step
    assert session.run.checkpoint("last").step == 6


def test_milestones_are_kept(tmp_path, book):
    changes = {
        "training.keep_last": "1",
        "training.keep_every": "4",
        "training.save_every": "1",
        "training.steps": "10",
    }
    session, _ = run_small(tmp_path / "run", book, **changes)
    assert set(steps_of(session.run)) == {4, 8, 10, session.state.progress.best_step}


def test_the_one_resumed_from_outlives_the_first_new_one(part, book):
    stop_small(part.folder, book, 6, **{**KEEP_ALL, "training.keep_last": "1", "training.steps": "20"})
    assert {5, 6} <= set(steps_of(part))


def test_what_a_killed_writer_left_is_swept(part, book):
    (part.checkpoints / "step-00000007.partial-123").mkdir()
    (part.checkpoints / "step-00000001.removed-9").mkdir()
    run_small(part.folder, book, **KEEP_ALL)
    assert not [p.name for p in part.checkpoints.iterdir() if "partial" in p.name or "removed" in p.name]


# ---------------------------------------------------------------- the disk refuses


def file_limit(n_bytes: int):
    """A limit on the size of files, as a full disk refuses bytes: OSError in the middle of a write."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


@pytest.fixture
def no_limit():
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_training_goes_on_when_a_checkpoint_cannot_be_written(tmp_path, book, whole, no_limit, capsys):
    session = open_small(tmp_path / "run", book, **KEEP_ALL)
    real = session.saver.save

    def save(state):
        file_limit(20_000 if state.progress.step in (2, 3) else resource.RLIM_INFINITY)
        real(state)
        session.saver._thread and session.saver._thread.join()

    session.saver.save = save

    assert train(session).finished
    assert steps_of(session.run) == [4, 6]
    log = (session.run.logs / "train.log").read_text()
    assert "the checkpoint of step 2 could not be written" in log and "the checkpoint of step 3 could not" in log
    assert not list(session.run.checkpoints.glob("*.partial*"))
    assert weights_hash(session.run) == weights_hash(whole)


def test_a_run_that_cannot_save_any_more_stops_with_the_last_good_one_safe(tmp_path, book, whole, no_limit):
    stop_small(tmp_path / "run", book, 2, **KEEP_ALL)
    run = Run(tmp_path / "run")
    session = open_small(run.folder, book, **{**KEEP_ALL, "training.save_every": "1"})
    before = contents(run.checkpoints / "step-00000002")
    file_limit(20_000)

    with pytest.raises(RunError, match=r"3 checkpoints in a row could not be written.*step-00000002.*--resume"):
        train(session)
    file_limit(resource.RLIM_INFINITY)
    assert steps_of(run) == [2] and contents(run.checkpoints / "step-00000002") == before
    run_small(run.folder, book, **KEEP_ALL)
    assert weights_hash(run) == weights_hash(whole)


def test_too_little_room_is_noticed_before_anything_is_written(tmp_path, book, monkeypatch):
    session = open_small(tmp_path / "run", book)
    session.close()
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(OSError, match="MB are wanted"):
        checkpoint.write(
            checkpoint.Snapshot(1, checkpoint.tensors_of(session.state), {}), session.run.checkpoints, "run"
        )
    assert list(session.run.checkpoints.iterdir()) == []


def test_a_vanished_folder_is_not_made_anew(tmp_path, book, whole):
    """It may be a mount: what was written in its place would be lost behind it."""
    session = open_small(tmp_path / "run", book, **{**KEEP_ALL, "training.save_every": "1"})
    away = tmp_path / "away"
    session.run.checkpoints.rename(away)

    with pytest.raises(RunError, match="could not be written"):
        train(session)
    assert not session.run.checkpoints.exists()
    away.rename(session.run.checkpoints)
    run_small(tmp_path / "run", book, **KEEP_ALL)
    assert weights_hash(session.run) == weights_hash(whole)
