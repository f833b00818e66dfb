"""Training on from another run's checkpoint in a folder of its own.

What belongs here: the configuration of such a run, and what it takes over. Imports ``errors``, ``config``,
``train.checkpoint``, ``train.runs``, ``train.state``.

Design: what goes on is the old run with one phase more. Its steps, moments, random generators, place in the text and
metrics are taken over as they stand; the old folder is only read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pocketlm.config import PHASE_SETTINGS, Config, PhaseConfig, load_config
from pocketlm.errors import ConfigError, RunError
from pocketlm.train.checkpoint import Checkpoint
from pocketlm.train.runs import Run
from pocketlm.train.state import TrainState

AFTERWARDS = 0.1
"""Peak learning rate of an added phase, as a share of the last one's, when nothing else is asked for."""
FIXED = {
    "model": "its shape is fixed",
    "tokenizer": "its weights belong to its tokenizer",
    "optimizer.name": "its moments belong to its optimiser",
    "training.seed": "it decides the order of the text that is still to come",
}


@dataclass(frozen=True)
class Origin:
    """A checkpoint of another run."""

    run: Run
    checkpoint: Checkpoint

    @property
    def name(self) -> str:
        """Where it lies, for the record."""
        return str(self.checkpoint.folder.resolve())

    def restore(self, state: TrainState) -> None:
        """Become its state; the best so far, which stays in the old folder, is forgotten. Raises RunError."""
        self.checkpoint.restore(state)
        progress = state.progress
        progress.best_loss = progress.best_step = progress.validated_step = progress.validation_loss = None
        progress.history = []

    def copy_metrics(self, run: Run, state: TrainState) -> None:
        """The curve so far, up to the checkpoint. Raises RunError."""
        source, target = self.run.logs / "metrics.jsonl", run.logs / "metrics.jsonl"
        try:
            data = source.read_bytes() if source.is_file() else b""
            target.write_bytes(data[: state.watching.get("MetricsFile", {}).get("bytes", 0)])
        except OSError as e:
            raise RunError(f"the metrics of '{self.run.folder}' cannot be copied: {e}") from None


def continued(run: Run, which: str, steps: int, layer: Mapping[str, Mapping[str, Any]]) -> tuple[Config, Origin]:
    """(configuration, origin) of ``steps`` more steps after checkpoint ``which`` of ``run``, with ``layer``'s changes.

    Unless ``layer`` says otherwise the added phase has no warm-up and a tenth of the last phase's peak learning rate.
    Raises PocketError.
    """
    config, origin = run.config(), Origin(run, run.checkpoint(which))
    for name in (f"{group}.{name}" for group, values in layer.items() for name in values):
        why = FIXED.get(name, FIXED.get(name.split(".")[0]))
        if why and name != "model.dropout":
            raise ConfigError(f"a run cannot be continued with another {name}: {why}")
    done = origin.checkpoint.step
    past = _past(config, done)
    if not past:
        raise RunError(f"the checkpoint '{origin.checkpoint.folder}' is at step 0: there is nothing to continue")
    last = config.phase(len(past) - 1) if config.phases else config
    own = {
        group: {n: v for n, v in layer.get(group, {}).items() if n in names} for group, names in PHASE_SETTINGS.items()
    }
    rest = {group: {n: v for n, v in values.items() if n not in own.get(group, {})} for group, values in layer.items()}
    before = past[-1].model_dump()
    added = {group: {**before[group], **own[group]} for group in PHASE_SETTINGS}
    lr = last.optimizer.lr * max(AFTERWARDS, last.schedule.min_lr_ratio)
    added["optimizer"] = {**before["optimizer"], "lr": lr, **own["optimizer"]}
    added["schedule"] = {**before["schedule"], "warmup_steps": 0, **own["schedule"]}
    added["training"] = {**{n: v for n, v in added["training"].items() if n != "epochs"}, "steps": steps}
    phases = [phase.model_dump() for phase in (*past, PhaseConfig(**added))]
    return load_config(config.model_dump(exclude={"phases"}), {**rest, "phases": phases}), origin


def _past(config: Config, done: int) -> list[PhaseConfig]:
    """The phases up to step ``done``, the last one cut off there."""
    past: list[PhaseConfig] = []
    first = 0
    for i, phase in enumerate(config.phases or (PhaseConfig(),)):
        settings = config.phase(i) if config.phases else config
        steps = min(settings.training.steps or 0, done - first)
        if steps > 0:
            past.append(phase.model_copy(update={"training": {**phase.training, "steps": steps}}))
        first += steps
    return past
