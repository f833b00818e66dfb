"""Nothing that is not finite reaches the weights; spikes and memorisation are told; failures beside it are survived."""

from __future__ import annotations

import json
import math
import statistics

import pytest
import torch
from safetensors.torch import load_file
from small import metrics, open_small, run_small, stop_small, weights_hash

from pocketlm.config import SafetyConfig
from pocketlm.errors import RunError
from pocketlm.model.transformer import Transformer
from pocketlm.train.loop import gradients, train
from pocketlm.train.runs import Run
from pocketlm.train.safety import WINDOW, judge, memorising, should_stop_early, z_score
from pocketlm.train.state import Progress


def spoil(session, factor, when) -> None:
    """Multiply the training loss of the steps for which ``when(step)`` holds, as an overflow would."""
    model = session.state.model
    real = type(model).loss

    def loss(self, *args, **kwargs):
        value = real(self, *args, **kwargs)
        return value * factor if self.training and when(session.state.progress.step + 1) else value

    model.loss = loss.__get__(model)


def log_of(run: Run) -> str:
    return (run.logs / "train.log").read_text()


# ---------------------------------------------------------------- not finite


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_step_that_is_not_finite_is_left_out_and_counted(tmp_path, book, bad, optimizer):
    session = open_small(tmp_path / "run", book, **{"training.save_every": "1", "optimizer.name": optimizer})
    spoil(session, bad, lambda step: step == 3)
    train(session)
    run = session.run
    assert session.state.progress.skipped == 1 and session.state.progress.skipped_in_row == 0
    assert all(torch.isfinite(t).all() for t in run.checkpoint("last").weights().values())
    assert "its update is left out (1 so far)" in log_of(run)
    losses = {x["step"]: (x["loss"], x["skipped"]) for x in metrics(run) if x["kind"] == "train"}
    assert losses[3] == (None, 1) and losses[4][0] > 0


def test_left_out_means_that_the_weights_do_not_move_at_all(tmp_path, book):
    session = open_small(tmp_path / "run", book, **{"training.save_every": "1", "training.keep_last": "9"})
    spoil(session, math.nan, lambda step: step == 3)
    train(session)
    assert weights_hash(session.run, "3") == weights_hash(session.run, "2") != weights_hash(session.run, "4")


def test_gradients_that_overflow_with_a_finite_loss_are_left_out(tmp_path, book):
    session = open_small(tmp_path / "run", book)
    weight = session.state.model.blocks[0].mlp.down.weight
    weight.register_hook(lambda g: g * math.inf if session.state.progress.step == 2 else g)
    train(session)
    assert session.state.progress.skipped == 1
    assert "the gradient is not finite (loss" in log_of(session.run)


def test_a_run_that_diverges_stops_with_a_diagnosis_and_keeps_the_batch(tmp_path, book):
    changes = {"training.steps": "40", "safety.max_skipped": "4", "training.precision": "bf16"}
    changes["training.keep_last"] = "9"
    session = open_small(tmp_path / "run", book, **changes)
    spoil(session, math.nan, lambda step: step > 10)
    with pytest.raises(RunError) as stopped:
        train(session)
    told = str(stopped.value)
    for words in ("has diverged: 4 steps in a row, up to step 14", "Learning rate", "--optimizer.lr", "--resume"):
        assert words in told
    run = session.run
    kept = load_file(run.logs / "diverged-step-00000014.safetensors")
    assert kept["0/inputs"].shape == kept["1/inputs"].shape == (3, 32)
    assert json.loads((run.logs / "diverged-step-00000014.json").read_text())["precision"] == "bf16"
    assert weights_hash(run) == weights_hash(run, "10") and told in log_of(run)
    assert not (run.folder / "summary.json").exists()
    run_small(run.folder, book, **changes)  # the cause is gone: it goes on
    assert run.checkpoint("last").step == 40


def test_the_diagnosis_names_the_precision_where_it_is_the_cause(tmp_path, book):
    """Activations beyond fp16's 65,504 are infinite there and finite in fp32."""
    changes = {"training.precision": "fp16", "safety.max_skipped": "3", "training.steps": "9"}
    session = open_small(tmp_path / "run", book, **changes)
    with torch.no_grad():
        session.state.model.blocks[0].mlp.down.weight.mul_(1e8)
    with pytest.raises(RunError, match=r"in fp32 the loss of the same batch is finite .* so fp16 is the cause"):
        train(session)


def test_an_overflow_while_fp16_finds_its_scale_is_no_alarm(tmp_path, book):
    session = open_small(tmp_path / "run", book, **{"training.precision": "fp16"})
    session.state.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
    session.config = session.config.model_copy(update={"safety": SafetyConfig(max_skipped=1000)})
    train(session)
    assert session.state.progress.skipped > 0
    assert "left out" not in log_of(session.run)
    assert session.state.scaler.get_scale() < 2.0**127


# ---------------------------------------------------------------- spikes


def test_the_z_score_is_that_of_the_formula():
    recent = [3.0 + 0.1 * math.sin(i) for i in range(WINDOW)]
    expected = (4.0 - statistics.fmean(recent)) / statistics.pstdev(recent)
    assert z_score(4.0, recent) == pytest.approx(expected)
    assert z_score(4.0, recent[:10]) == 0.0 and z_score(4.0, [3.0] * WINDOW) == 0.0


@pytest.mark.parametrize("skip", [False, True])
def test_a_spike_is_told_and_left_out_on_request(skip):
    progress, config = Progress(), SafetyConfig(skip_spikes=skip)
    for step in range(WINDOW + 20):
        progress.step = step
        verdict = judge(progress, 3.0 + 0.1 * math.sin(step), 1.0 + 0.1 * math.cos(step), config, scaling=False)
        assert verdict.update and verdict.message is None
    verdict = judge(progress, 9.0, 1.0, config, scaling=False)
    assert verdict.update is not skip and verdict.finite
    assert verdict.message.startswith(f"spike at step {WINDOW + 20}: loss 9 is ")
    assert len(progress.recent_losses) == WINDOW and progress.skipped == skip
    assert "gradient norm" in judge(progress, 3.0, 50.0, config, scaling=False).message


def test_a_resumed_run_judges_as_an_uninterrupted_one(tmp_path, book):
    """The window of losses is part of the state: the same spike is left out."""
    changes = {"training.steps": "90", "safety.skip_spikes": "true", "safety.spike_zscore": "1.5"}
    changes |= {"optimizer.lr": "0.1", "schedule.name": "constant"}
    whole, _ = run_small(tmp_path / "whole", book, **changes)
    assert whole.state.progress.skipped > 0
    stop_small(tmp_path / "part", book, 60, **changes)
    part, _ = run_small(tmp_path / "part", book, **changes)
    assert part.state.progress.skipped == whole.state.progress.skipped
    assert weights_hash(part.run) == weights_hash(whole.run)


# ---------------------------------------------------------------- memorisation


def history(*pairs: tuple[float, float]) -> list[dict[str, float]]:
    return [{"step": 100 * i, "validation": v, "train": t} for i, (v, t) in enumerate(pairs, 1)]


def test_memorising_is_validation_rising_twice_while_training_falls():
    falling = history((4.0, 4.1), (3.5, 3.4), (3.4, 3.0))
    assert memorising(falling) is None
    assert memorising(falling + history((3.5, 2.8))) is None, "once may be chance"
    told = memorising(
        [*falling, {"step": 400, "validation": 3.5, "train": 2.8}, {"step": 500, "validation": 3.6, "train": 2.5}]
    )
    assert "since step 300 validation loss has risen from 3.400 to 3.600" in told and "from 3.000 to 2.500" in told
    diverging = [
        *falling,
        {"step": 400, "validation": 3.5, "train": 3.8},
        {"step": 500, "validation": 3.6, "train": 3.9},
    ]
    assert memorising(diverging) is None, "both rise: something else is wrong"


def test_early_stop_counts_validations_without_a_new_best():
    values = history((4.0, 4.0), (3.0, 3.0), (3.1, 2.9), (3.2, 2.8))
    assert should_stop_early(values, 2) and not should_stop_early(values, 3) and not should_stop_early(values, None)


MEMORISING = {
    "training.steps": "400", "evaluation.every": "40", "training.save_every": "1000", "optimizer.lr": "0.03",
    "training.precision": "fp32", "model.n_embd": "64", "sampling.every": "0",
}  # fmt: skip


@pytest.fixture
def noise(tmp_path):
    """A text that can be learned by heart and by nothing else."""
    generator = torch.Generator().manual_seed(0)
    letters = torch.randint(97, 123, (1200,), generator=generator).tolist()
    path = tmp_path / "noise.txt"
    path.write_text("".join(map(chr, letters)))
    return path


def test_a_memorising_run_says_so_in_log_and_report_and_keeps_the_best(tmp_path, noise, capsys):
    session, end = run_small(tmp_path / "run", noise, **{**MEMORISING, "data.document": "file"})
    progress = session.state.progress
    assert progress.best_step < 400 and end.summary["memorising"] is True
    assert log_of(session.run).count("the model is memorising its training text") == 1
    assert any(x.get("memorising") for x in metrics(session.run))
    assert "was memorising" in (session.run.folder / "report.html").read_text()
    assert session.run.checkpoint("best").step == progress.best_step


def test_early_stop_ends_the_run_and_a_resume_agrees(tmp_path, noise):
    changes = {**MEMORISING, "data.document": "file", "safety.early_stop": "2"}
    whole, end = run_small(tmp_path / "whole", noise, **changes)
    assert end.finished and end.step < 400
    assert "stopped early at step" in log_of(whole.run)
    stop_small(tmp_path / "part", noise, end.step - 10, **changes)
    part, again = run_small(tmp_path / "part", noise, **changes)
    assert again.step == end.step and weights_hash(part.run) == weights_hash(whole.run)
    with pytest.raises(RunError, match="is finished"):
        run_small(tmp_path / "part", noise, **changes)


# ---------------------------------------------------------------- nothing beside training may cost a run


@pytest.mark.parametrize(
    "error",
    [RuntimeError("a bug"), torch.OutOfMemoryError("CUDA out of memory"), MemoryError(), OSError(5, "I/O error")],
)
@pytest.mark.parametrize("where", ["evaluation", "sampling", "report"])
def test_errors_beside_training_are_survived(tmp_path, book, monkeypatch, error, where):
    from pocketlm.generate import engine
    from pocketlm.train import between

    whole, _ = run_small(tmp_path / "whole", book)

    def fail(*args, **kwargs):
        raise error

    if where == "evaluation":
        real = Transformer.loss
        monkeypatch.setattr(Transformer, "loss", lambda m, *a, **k: (real if m.training else fail)(m, *a, **k))
    elif where == "sampling":
        monkeypatch.setattr(engine, "next_token", fail)
    else:
        monkeypatch.setattr(between, "write_report", fail)
    session, end = run_small(tmp_path / "run", book)
    assert end.finished and weights_hash(session.run) == weights_hash(whole.run)
    what = {"evaluation": "validation", "sampling": "sampling", "report": "writing the report"}[where]
    if where != "report":  # by then the log is closed
        assert f"{what} at step 3 failed ({type(error).__name__}: " in log_of(session.run)


def test_validation_that_does_not_fit_is_tried_in_smaller_batches(tmp_path, book, monkeypatch):
    _, end = run_small(tmp_path / "whole", book)
    real = Transformer.loss

    def loss(model, tokens, *args, **kwargs):
        if not model.training and len(tokens) > 2:
            raise torch.OutOfMemoryError("too much")
        return real(model, tokens, *args, **kwargs)

    monkeypatch.setattr(Transformer, "loss", loss)
    session, other = run_small(tmp_path / "run", book)
    assert other.summary["validation_loss"] == pytest.approx(end.summary["validation_loss"], rel=1e-6)
    assert "tried again with" in log_of(session.run)


@pytest.mark.parametrize("mode", ["stream", "pack", "bucket", "pad"])
def test_a_step_that_does_not_fit_is_cut_in_pieces_with_the_same_gradient(tmp_path, book, monkeypatch, mode):
    session = open_small(tmp_path / "run", book, **{"data.mode": mode, "training.batch_size": "5"})
    session.close()
    phase = session.phases[0]
    batches, n_targets, _ = next(phase.loader.windows(session.state.progress.position, 2))
    model = session.state.model
    loss, norm = gradients(session, batches, n_targets, 1.0)
    wanted = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    real = Transformer.loss

    def small_only(self, tokens, *args, **kwargs):
        if len(tokens) > 2:
            raise RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried")
        return real(self, tokens, *args, **kwargs)

    monkeypatch.setattr(Transformer, "loss", small_only)
    assert gradients(session, batches, n_targets, 1.0) == pytest.approx((loss, norm), rel=1e-5)
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, wanted[name], rtol=1e-4, atol=1e-6)
    assert session.state.progress.pieces >= 2


def test_an_error_that_is_no_lack_of_memory_is_not_hidden(tmp_path, book, monkeypatch):
    session = open_small(tmp_path / "run", book)

    def fail(*args, **kwargs):
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(Transformer, "loss", fail)
    with pytest.raises(RuntimeError, match="shapes do not match"):
        train(session)
    assert session.state.progress.pieces == 1


def test_an_observer_that_fails_is_named_and_costs_nothing(tmp_path, book, capsys):
    whole, _ = run_small(tmp_path / "whole", book)
    session = open_small(tmp_path / "run", book)
    log = next(o for o in session.observers if type(o).__name__ == "TextLog")
    log.file.close()
    assert train(session).finished
    assert capsys.readouterr().err.count("TextLog could not write") == 1
    assert weights_hash(session.run) == weights_hash(whole.run)
