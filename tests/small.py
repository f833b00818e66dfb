"""Small real runs for the tests: two layers of sixteen channels on bytes, seconds each."""

from __future__ import annotations

import hashlib
import json
import time
from pathlib import Path

from pocketlm.config import Config, load_config, override_layer, preset_layer
from pocketlm.train import checkpoint
from pocketlm.train.events import Observer
from pocketlm.train.loop import train
from pocketlm.train.runs import Run
from pocketlm.train.setup import Session, open_session

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


MEASURED = ("tokens_per_second", "seconds", "memory_bytes")
"""Fields of metrics.jsonl that no two runs share."""


def small_config(book: Path, *layers: dict, **changes: str) -> Config:
    pairs = {**SMALL, "data.path": str(book), "data.cache_dir": str(book.parent / "cache"), **changes}
    return load_config(preset_layer("demo"), override_layer(list(pairs.items())), *layers)


def open_small(folder: Path, book: Path, *layers: dict, **changes: str) -> Session:
    config = small_config(book, *layers, **changes)
    return open_session(config, Run(folder), command="", began=time.perf_counter(), quiet=True)


def run_small(folder: Path, book: Path, *layers: dict, **changes: str):
    session = open_small(folder, book, *layers, **changes)
    return session, train(session)


class StopAfter(Observer):
    """Asks for a stop, as a signal does, while step ``n`` is under way."""

    def __init__(self, session: Session, n: int) -> None:
        self.session, self.n = session, n

    def on_step(self, record) -> None:
        self.session.stop.requested |= record.step >= self.n


def stop_small(folder: Path, book: Path, n: int, *layers: dict, **changes: str) -> Session:
    """Run until step ``n``, stop as by Ctrl-C, leave a run to resume."""
    session = open_small(folder, book, *layers, **changes)
    session.observers = [*session.observers, StopAfter(session, n)]
    train(session)
    return session


def metrics(run: Run) -> list[dict]:
    """metrics.jsonl without what was measured and where."""
    lines = [json.loads(line) for line in (run.logs / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in x.items() if k not in MEASURED} for x in lines if x["kind"] != "start"]


def weights_hash(run: Run, which: str = "last", file: str = checkpoint.WEIGHTS) -> str:
    return hashlib.sha256((run.checkpoint(which).folder / file).read_bytes()).hexdigest()


def contents(folder: Path) -> dict[str, str]:
    """Every file under ``folder`` and its hash."""
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}
