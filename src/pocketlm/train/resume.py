"""Going on with a run: is it the same run, and from which checkpoint.

What belongs here: the run's identity, the comparison of settings, the choice of the newest whole checkpoint.
Imports ``errors``, ``config``, ``files``, ``train.checkpoint``, ``train.phases``, ``train.runs``, ``train.state``.

Design: a setting is either fixed for the life of a run, because another value would make it another run, or may change,
and then the change is said. Where checkpoints exist and none can be used, nothing is touched and nothing starts again.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import Any

import torch

from pocketlm.config import Config
from pocketlm.errors import RunError
from pocketlm.files import write_atomically
from pocketlm.train import checkpoint
from pocketlm.train.checkpoint import Checkpoint
from pocketlm.train.phases import Phase
from pocketlm.train.runs import Run
from pocketlm.train.state import TrainState

FREE = frozenset(
    {"model.dropout", "data.cache_dir", "data.mirror"}
    | {f"training.{name}" for name in ("steps", "epochs", "device", "precision", "threads", "gradient_checkpointing")}
    | {f"training.{name}" for name in ("compile", "log_every", "save_every", "save_in_background", "keep_last")}
    | {f"training.{name}" for name in ("keep_every", "tensorboard")}
)
"""Settings that a run may change from one process to the next, beside the groups below."""
FREE_GROUPS = ("optimizer", "schedule", "sampling", "evaluation", "safety")


def changes(saved: Config, wanted: Config) -> Iterator[tuple[str, Any, Any]]:
    """(dotted name, saved, wanted) of every setting that differs, phases compared one by one."""
    for group, settings in wanted.model_dump(exclude={"phases"}).items():
        before = saved.model_dump()[group]
        yield from ((f"{group}.{name}", before[name], v) for name, v in settings.items() if v != before[name])
    if len(saved.phases) != len(wanted.phases):
        yield "phases", len(saved.phases), len(wanted.phases)
        return
    for i, (a, b) in enumerate(zip(saved.phases, wanted.phases, strict=True)):
        for group, values in a.model_dump().items():
            asked = getattr(b, group)
            for name in {**values, **asked}:
                settled = name == "steps" and name not in asked  # the length that epochs came to
                if not settled and values.get(name) != asked.get(name):
                    yield f"phases.{i}.{group}.{name}", values.get(name), asked.get(name)


def agree(run: Run, saved: Config, wanted: Config) -> list[str]:
    """What changes in the run's settings, as sentences. Raises RunError for those that must not."""
    told, refused = [], []
    for name, before, now in changes(saved, wanted):
        free = name in FREE or (name.split(".")[0] in FREE_GROUPS and name != "optimizer.name")
        if not free:
            refused.append(f"{name} {_shown(now)} (it has {_shown(before)})")
        elif name not in ("data.cache_dir", "data.mirror"):
            told.append(f"{name} is {_shown(now)} from here on (before: {_shown(before)})")
    if refused:
        raise RunError(
            f"the run '{run.folder}' cannot go on with {', '.join(refused)}: leave it as it is, or train on in a new "
            f"folder with 'pocketlm continue {run.folder} --steps N' and your changes, or start one from its weights "
            f"with 'pocketlm train --init-from {run.folder}'"
        )
    return told


# ---------------------------------------------------------------- identity


def identity(run: Run, phases: Sequence[Phase], parent: str | None) -> dict[str, Any]:
    """The run's own facts, made now or read from its folder. Raises RunError when its text has changed."""
    texts = list(dict.fromkeys(phase.cache.fingerprint for phase in phases))
    if not run.identity_path.is_file():
        return {"id": uuid.uuid4().hex, "texts": texts, "parent": parent}
    try:
        known = json.loads(run.identity_path.read_bytes())
        known_texts, known_id = known["texts"], str(known["id"])
    except (OSError, ValueError, RecursionError, KeyError, TypeError):
        raise RunError(f"'{run.identity_path}' is damaged: put it back, or start a new run") from None
    if known_texts != texts:
        raise RunError(
            f"the text or tokenizer of the run '{run.folder}' has changed since it began: put it back, or train "
            f"on with "
            f"the new text in a new folder: pocketlm continue {run.folder} --steps N --data.path TEXT"
        )
    return {**known, "id": known_id}


def write_identity(run: Run, facts: dict[str, Any]) -> None:
    """Record ``facts``. Raises OSError."""
    write_atomically(run.identity_path, json.dumps(facts, indent=2))


def machine_facts(threads: int, device: str, precision: str) -> dict[str, Any]:
    """What decides the last bit of a result."""
    return {"torch": torch.__version__, "threads": threads, "device": device, "precision": precision}


# ---------------------------------------------------------------- restoring


def restore_newest(
    found: Sequence[Checkpoint], state: TrainState, run_id: str | None, report: Callable[[str], None]
) -> Checkpoint:
    """Become the newest checkpoint that is whole and of this run; newer ones are set aside.

    Raises RunError where none is: then nothing was changed.
    """
    refused: list[Checkpoint] = []
    for candidate in found:
        try:
            candidate.restore(state, run_id=run_id)
        except RunError as e:
            report(f"{e}; trying the one before it")
            refused.append(candidate)
            continue
        for each in refused:
            with suppress(OSError):
                report(f"the checkpoint of step {each.step} is set aside as '{checkpoint.set_aside(each).name}'")
        return candidate
    raise RunError(f"none of the run's {len(found)} checkpoints can be used: see above; nothing was changed")


def _shown(value: Any) -> str:
    return "empty" if value is None else str(value)
