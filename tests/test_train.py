"""Training: schedules, optimisers, exact accumulation, resume, checkpoints."""

from __future__ import annotations

import math

import pytest
import torch
from small import MODES, run_small

from pocketlm.config import ModelConfig, OptimizerConfig, ScheduleConfig
from pocketlm.data.loader import Batch
from pocketlm.model.transformer import Transformer
from pocketlm.train.loop import compute_gradients, update
from pocketlm.train.optim import Optimizers
from pocketlm.train.schedule import lr_factor
from pocketlm.train.state import TrainState

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


# ---------------------------------------------------------------- time


def test_time_is_booked_where_it_was_spent(tmp_path, book):
    _, end = run_small(tmp_path / "run", book)
    seconds = end.summary["seconds"]
    assert set(seconds) == {"startup", "training", "reporting", "evaluation", "saving", "sampling"}
    assert sum(seconds.values()) == pytest.approx(end.summary["wall_seconds"], rel=0.05, abs=0.2)
