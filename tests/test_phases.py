"""Phases: the second starts exactly where the first ended, with its own settings in force at its first step."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from small import SMALL, contents, metrics, open_small, run_small, small_config, stop_small, weights_hash

from pocketlm.cli import main
from pocketlm.config import load_preset
from pocketlm.errors import PocketError, RunError
from pocketlm.train import checkpoint
from pocketlm.train.loop import train
from pocketlm.train.origin import continued
from pocketlm.train.runs import Run
from pocketlm.train.setup import open_session

SECOND = {"training": {"steps": 4}, "optimizer": {"lr": 1e-4, "weight_decay": 0.02}, "schedule": {"warmup_steps": 0}}
TWO = {"phases": [{"training": {"steps": 5}}, SECOND]}


def trained(run: Run) -> dict[int, dict]:
    return {x["step"]: x for x in metrics(run) if x["kind"] == "train"}


def continue_small(source: Run, folder: Path, steps: int, layer: dict, which: str = "last"):
    config, origin = continued(source, which, steps, layer)
    session = open_session(config, Run(folder), command="", began=0.0, quiet=True, origin=origin)
    return session, train(session)


def test_the_first_step_of_a_phase_has_its_learning_rate_and_weight_decay(tmp_path, book):
    session = open_small(tmp_path / "run", book, TWO)
    decays = []
    real = session.state.optimizers.parts[0].step

    def step(*args, **kwargs):
        decays.append({(g["lr"], g["weight_decay"]) for g in session.state.optimizers.parts[0].param_groups})
        return real(*args, **kwargs)

    session.state.optimizers.parts[0].step = step
    train(session)
    steps = trained(session.run)
    assert max(steps) == 9 and (steps[6]["lr"], steps[6]["weight_decay"]) == (1e-4, 0.02)
    assert steps[5]["weight_decay"] == 0.1
    assert decays[5] == {(1e-4, 0.02), (1e-4, 0.0)}, "what the optimiser used, norms still undecayed"
    said = next(x for x in metrics(session.run) if x["kind"] == "phase")
    assert (said["step"], said["number"], said["steps"], said["lr"]) == (5, 2, 4, 1e-4)


def test_the_first_phase_is_a_run_of_its_own_and_the_second_starts_where_it_ended(tmp_path, book):
    """The schedule of a phase ends with it; weights, moments, generators and place in the text go on."""
    alone, _ = run_small(tmp_path / "alone", book, **{"training.steps": "5", "training.keep_last": "9"})
    both, _ = run_small(tmp_path / "both", book, TWO, **{"training.keep_last": "9", "training.save_every": "1"})
    for file in (checkpoint.WEIGHTS, checkpoint.TRAINING):
        assert weights_hash(both.run, "5", file) == weights_hash(alone.run, "5", file)
    positions = [both.run.checkpoint(str(n)).values()["progress"]["position"]["index"] for n in range(1, 10)]
    assert positions == list(range(2, 20, 2)), "the data goes on without a gap"


def test_continuing_a_run_is_one_phase_more(tmp_path, book):
    both, _ = run_small(tmp_path / "both", book, TWO)
    alone, _ = run_small(tmp_path / "alone", book, **{"training.steps": "5"})
    before = contents(alone.run.folder)
    session, end = continue_small(alone.run, tmp_path / "more", 4, {k: v for k, v in SECOND.items() if k != "training"})
    assert contents(alone.run.folder) == before, "the original is only read"
    assert (end.step, end.finished) == (9, True)
    assert weights_hash(session.run) == weights_hash(both.run)
    assert [x for x in metrics(session.run) if x["kind"] == "train"] == [
        x for x in metrics(both.run) if x["kind"] == "train"
    ]
    assert json.loads(session.run.identity_path.read_text())["parent"].endswith("alone/checkpoints/step-00000005")


def test_a_continued_run_is_validated_before_its_first_step(tmp_path, book):
    alone, _ = run_small(tmp_path / "alone", book, **{"training.steps": "5"})
    session, _ = continue_small(alone.run, tmp_path / "more", 1, {})
    scores = {x["step"]: x["loss"] for x in metrics(session.run) if x["kind"] == "validation"}
    assert scores[5] == alone.state.progress.validation_loss


def test_without_a_word_a_continued_run_has_a_tenth_of_the_rate(tmp_path, book):
    alone, _ = run_small(tmp_path / "alone", book, **{"training.steps": "5", "optimizer.lr": "0.02"})
    config, _ = continued(alone.run, "last", 3, {})
    assert config.phase(1).optimizer.lr == pytest.approx(0.002)
    assert config.phase(1).schedule.warmup_steps == 0


def test_an_unfinished_run_is_continued_from_where_it_stands(tmp_path, book):
    stop_small(tmp_path / "run", book, 3, TWO)
    session, end = continue_small(Run(tmp_path / "run"), tmp_path / "more", 2, {})
    assert [phase.steps for phase in session.phases] == [3, 2]
    assert end.step == 5


@pytest.mark.parametrize("stop", [4, 5, 6])
def test_a_stop_on_the_edge_of_two_phases_is_bit_identical(tmp_path, book, stop):
    second = {**SECOND, "training": {"steps": 4, "batch_size": 2, "grad_accum": 1}}
    phases = {"phases": [TWO["phases"][0], second]}
    whole, _ = run_small(tmp_path / "whole", book, phases)
    stop_small(tmp_path / "part", book, stop, phases)
    run_small(tmp_path / "part", book, phases)
    assert weights_hash(Run(tmp_path / "part")) == weights_hash(whole.run)
    assert metrics(Run(tmp_path / "part")) == metrics(whole.run)


def test_a_phase_may_have_another_text_and_batch(tmp_path, book):
    other = tmp_path / "other.txt"
    other.write_text("".join(f"{n} is not {n + 1}\n" for n in range(500)))
    second = {"training": {"steps": 3, "batch_size": 2}, "data": {"path": str(other), "mode": "pack"}}
    session, _ = run_small(tmp_path / "run", book, {"phases": [{"training": {"steps": 3}}, second]})
    assert session.phases[1].loader.batches_in_epoch(0) != session.phases[0].loader.batches_in_epoch(0)
    assert "other.txt" in next(x for x in metrics(session.run) if x["kind"] == "phase")["data"]
    assert session.state.progress.position.index == 6 and session.state.progress.best_step == 6


def test_a_phase_with_other_batches_of_the_same_text_begins_a_new_epoch(tmp_path, book):
    second = {"training": {"steps": 1, "batch_size": 2}}
    session, _ = run_small(tmp_path / "run", book, {"phases": [{"training": {"steps": 3}}, second]})
    assert session.state.progress.position.epoch == 1


def test_phases_survive_their_own_yaml(tmp_path, book):
    session, _ = run_small(tmp_path / "run", book, TWO)
    assert session.run.config().phase(1) == small_config(book, TWO).phase(1).model_copy(
        update={"training": session.run.config().phase(1).training, "model": session.run.config().model}
    )


def test_the_shakespeare_preset_has_the_two_phases_of_its_source():
    preset = load_preset("smollm2-80m-shakespeare")
    first, second = preset.phase(0), preset.phase(1)
    assert (first.training.steps, first.optimizer.lr, first.optimizer.weight_decay) == (5000, 3e-4, 0.01)
    assert (second.training.steps, second.optimizer.lr, second.optimizer.weight_decay) == (50, 1e-4, 0.02)


# ---------------------------------------------------------------- from another run's weights


def command(tmp_path: Path, book: Path, *extra: str) -> list[str]:
    flags = {k: v for k, v in SMALL.items() if not k.startswith(("model", "tokenizer"))}
    flags["data.cache_dir"] = str(tmp_path / "cache")
    return ["train", str(book), *(x for name, value in flags.items() for x in (f"--{name}", value)), *extra]


def test_init_from_starts_at_step_0_with_the_best_weights_and_the_tokenizer(tmp_path, book, capsys):
    first, _ = run_small(tmp_path / "first", book, **{"model.n_kv_head": "1"})
    other = tmp_path / "other.txt"
    other.write_text("".join(f"{n} is not {n + 1}\n" for n in range(500)))
    out = tmp_path / "second"
    assert main(command(tmp_path, other, "--init-from", str(first.run.folder), "--out", str(out))) == 0
    second = Run(out)
    config = second.config()
    assert config.model.n_kv_head == 1 and config.model.n_layer == 2
    assert (second.tokenizer_folder / "tokenizer.json").read_text() == (
        first.run.tokenizer_folder / "tokenizer.json"
    ).read_text()
    assert trained(second)[1]["step"] == 1 and trained(second)[1]["tokens"] < 300
    session = open_session(config, Run(tmp_path / "third"), command="", began=0.0, quiet=True)
    session.close()
    best = first.run.checkpoint("best").weights()
    assert all(torch.equal(session.state.model.state_dict()[name], best[name]) for name in best)
    assert session.state.progress.step == 0


@pytest.mark.parametrize("extra", [("--model.n_layer", "5"), ("--tokenizer.name", "char")])
def test_init_from_refuses_another_shape_or_tokenizer(tmp_path, book, capsys, extra):
    first, _ = run_small(tmp_path / "first", book)
    out = tmp_path / "second"
    assert main(command(tmp_path, book, "--init-from", str(first.run.folder), "--out", str(out), *extra)) == 2
    told = capsys.readouterr().err
    assert extra[0][2:] in told and "takes shape and tokenizer from the run" in told
    assert not out.exists()


# ---------------------------------------------------------------- the command


def test_continue_on_the_command_line(tmp_path, book, capsys):
    first, _ = run_small(tmp_path / "first", book)
    out = tmp_path / "more"
    words = ["continue", str(first.run.folder), "--steps", "3", "--optimizer.lr", "1e-4", "--out", str(out)]
    assert main(words) == 0
    assert "phase 2: 3 steps after step 6, learning rate 1.0e-04" in capsys.readouterr().err
    assert main(words) == 2
    assert "is finished" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        (["--model.n_layer", "5"], "its shape is fixed"),
        (["--tokenizer.name", "char"], "belong to its tokenizer"),
        (["--training.steps", "5"], "its length is --steps"),
        (["--optimizer.name", "muon"], "optimizer.name"),
        (["--checkpoint", "99"], "no checkpoint '99'"),
        (["--steps", "0"], "--steps"),
    ],
)
def test_what_continue_refuses(tmp_path, book, capsys, extra, words):
    first, _ = run_small(tmp_path / "first", book)
    out = tmp_path / "more"
    assert main(["continue", str(first.run.folder), "--steps", "3", "--out", str(out), *extra]) == 2
    told = capsys.readouterr().err
    assert words in told and told.count("\n") == 1
    assert not out.exists()


def test_a_run_with_phases_gets_more_steps_by_continue_only(tmp_path, book, capsys):
    stop_small(tmp_path / "run", book, 3, TWO)
    assert main(["train", "--resume", str(tmp_path / "run"), "--training.steps", "50"]) == 2
    assert "have lengths of their own" in capsys.readouterr().err


def test_only_the_first_phases_can_be_asked_for(tmp_path, book, capsys):
    assert main(["train", "smollm2-80m-shakespeare", "--phases", "3"]) == 2
    assert "--phases 3 asks for more than the configuration has: 2" in capsys.readouterr().err


def test_errors_have_the_phase_in_them(book):
    with pytest.raises(PocketError, match=r"phases\.1\.optimizer\.lr: .*finite|phases\.1\.optimizer\.lr: .*greater"):
        small_config(book, {"phases": [{}, {"optimizer": {"lr": -1}}]})


def test_a_changed_phase_is_refused_on_resume(tmp_path, book):
    stop_small(tmp_path / "run", book, 3, TWO)
    other = {"phases": [TWO["phases"][0], {**SECOND, "optimizer": {"lr": 5e-4}}]}
    with pytest.raises(RunError, match=r"phases\.1\.optimizer\.lr"):
        run_small(tmp_path / "run", book, other)
