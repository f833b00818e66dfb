"""What all faults share: short real runs, how they are started and hurt, and what they must come to.

A trial passes when the run ends, no traceback was ever printed, and the final weights' sha256 and every line of the
metrics are those of a run with the same settings that nothing happened to.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

CHILD = Path(__file__).with_name("child.py")
MEASURED = ("tokens_per_second", "seconds", "memory_bytes")
FILES = ("model.safetensors", "training.safetensors", "state.json", "manifest.json")
STEPS = 36
COMMON = {
    "model.n_layer": "2", "model.n_head": "4", "model.n_embd": "128", "model.block_size": "64",
    "tokenizer.name": "bytes", "data.document": "line", "training.steps": str(STEPS), "training.batch_size": "4",
    "training.device": "cpu", "training.threads": "1", "training.save_every": "3", "training.log_every": "5",
    "evaluation.every": "8", "evaluation.batch_size": "8", "sampling.every": "12", "sampling.max_tokens": "4",
    "schedule.warmup_steps": "4",
}  # fmt: skip
VARIANTS: list[dict[str, str]] = [
    {"data.mode": mode, "training.precision": precision, **rest}
    for mode, precision, rest in (
        ("stream", "fp32", {}),
        ("pack", "bf16", {"model.dropout": "0.1", "training.grad_accum": "2"}),
        ("bucket", "fp32", {"optimizer.name": "muon", "training.save_every": "2"}),
        ("pad", "fp16", {"model.dropout": "0.1", "training.ema": "0.9"}),
        ("stream", "bf16", {"training.grad_accum": "3", "training.save_every": "5", "training.keep_last": "1"}),
        ("pack", "fp32", {"optimizer.name": "muon", "model.dropout": "0.1", "training.save_in_background": "false"}),
    )
]


class Failure(AssertionError):
    """What a trial must not show."""


@dataclass
class Trial:
    """One run that was hurt."""

    group: str
    what: str
    variant: int = 0
    number: int = 0
    happened: list[str] = field(default_factory=list)
    failure: str | None = None
    seconds: float = 0.0


@dataclass(frozen=True)
class Result:
    """How a process ended."""

    code: int
    output: str

    def expect(self, *codes: int) -> Result:
        """Itself; Failure for another exit code or a traceback."""
        if "Traceback" in self.output or "Fatal Python error" in self.output:
            raise Failure(f"a traceback was printed:\n{self.output[-3000:]}")
        if self.code not in codes:
            raise Failure(f"exit code {self.code}, not {' or '.join(map(str, codes))}:\n{self.output[-3000:]}")
        return self


class Bench:
    """A folder for runs, one text, one token cache, and the reference of every variant."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.text = root / "book.txt"
        self.text.parent.mkdir(parents=True, exist_ok=True)
        self.text.write_text("".join(f"{a} times {b} is {a * b}.\n" for a in range(2, 32) for b in range(2, 40)))
        self._count = 0
        self._lock = threading.Lock()
        self.reference = cache(self._reference)

    def folder(self, name: str = "run") -> Path:
        """A fresh folder for a run; not created yet."""
        with self._lock:
            self._count += 1
            place = self.root / f"{self._count:04d}"
        place.mkdir()
        return place / name

    def start(
        self, out: Path, variant: int, wrong: dict[str, Any] | None = None, *, env: dict[str, str] | None = None,
        extra: dict[str, str] | None = None, umask: int = -1,
    ) -> Process:  # fmt: skip
        """The training command in a process of its own."""
        settings = {**COMMON, **VARIANTS[variant], **(extra or {})}
        args = [x for name, value in settings.items() for x in (f"--{name}", value)]
        program = [sys.executable, str(CHILD), json.dumps(wrong)] if wrong else [sys.executable, "-m", "pocketlm"]
        command = [*program, "train", str(self.text), "--out", str(out), *args]
        environment = {**os.environ, "POCKETLM_CACHE": str(self.root / "cache"), "OMP_NUM_THREADS": "1"} | (env or {})
        environment = {k: v for k, v in environment.items() if v is not None}
        return Process(command, environment, out, umask)

    def run(self, out: Path, variant: int, wrong: dict[str, Any] | None = None, **more: Any) -> Result:
        """The command to its end."""
        return self.start(out, variant, wrong, **more).result()

    def finish(self, out: Path, variant: int, **more: Any) -> None:
        """Resume until the end, and compare with the reference."""
        self.run(out, variant, **more).expect(0)
        self.compare(out, variant)

    def compare(self, out: Path, variant: int) -> None:
        """Failure where weights or metrics are not those of the undisturbed run."""
        weights, metrics = self.reference(variant)
        if final_hash(out) != weights:
            raise Failure("the final weights differ from the undisturbed run's")
        for seen, wanted in zip(metrics_of(out), metrics, strict=False):
            if seen != wanted:
                raise Failure(f"the metrics differ: {seen} instead of {wanted}")
        if len(metrics_of(out)) != len(metrics):
            raise Failure(f"the metrics have {len(metrics_of(out))} lines instead of {len(metrics)}")

    def see_to_the_end(self, out: Path, variant: int, **more: Any) -> None:
        """Resume until the end unless it has come, and compare with the reference."""
        if is_finished(out):
            self.compare(out, variant)
        else:
            self.finish(out, variant, **more)

    def stopped(self, variant: int, step: int) -> Path:
        """A run that was stopped at ``step``, copied from one that is made once."""
        source = self._stopped(variant, step)
        out = self.folder()
        shutil.copytree(source, out)
        return out

    @cache  # noqa: B019 - one bench lives as long as the program
    def _stopped(self, variant: int, step: int) -> Path:
        out = self.folder()
        self.run(out, variant, {"stop_at": step}, extra={"training.keep_last": "3"}).expect(130)
        return out

    def _reference(self, variant: int) -> tuple[str, list[dict[str, Any]]]:
        out = self.folder()
        self.run(out, variant).expect(0)
        return final_hash(out), metrics_of(out)


class Process:
    """A training process; its output is collected while it runs."""

    def __init__(self, command: list[str], env: dict[str, str], out: Path, umask: int = -1) -> None:
        self.out = out
        self.born = time.monotonic()
        self._log = out.with_name(f"{out.name}-output-{time.monotonic_ns()}.txt")
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(command, env=env, stdout=log, stderr=log, umask=umask)

    def alive(self) -> bool:
        return self.process.poll() is None

    def send(self, number: int) -> bool:
        """Whether the signal hit a living process."""
        if not self.alive():
            return False
        self.process.send_signal(number)
        return True

    def kill(self) -> bool:
        """SIGKILL; whether it ended a living process."""
        return self.send(signal.SIGKILL) and self.process.wait() == -signal.SIGKILL

    def result(self, timeout: float = 180) -> Result:
        try:
            self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise Failure(f"it hung for {timeout:.0f} s:\n{self._log.read_text(errors='replace')[-3000:]}") from None
        return Result(self.process.returncode, self._log.read_text(errors="replace"))

    def wait_for(self, happened, *, poll: float = 0.001) -> bool:
        """Until ``happened()``; whether the process is still alive then."""
        while self.alive():
            if happened():
                return self.alive()
            time.sleep(poll)
        return False

    def is_writing(self) -> bool:
        return any(self.out.glob("checkpoints/*.partial-*"))

    def has_begun(self) -> bool:
        """Whether this process has logged its start."""
        log = self.out / "logs" / "train.log"
        try:
            return log.stat().st_mtime > time.time() - (time.monotonic() - self.born) and "  run: " in log.read_text()
        except FileNotFoundError:
            return False


def is_finished(out: Path) -> bool:
    """Whether a process came to the run's end; it may have been hit after that."""
    summary = out / "summary.json"
    return summary.exists() and json.loads(summary.read_text())["finished"]


def final_hash(out: Path) -> str:
    return hashlib.sha256((out / "checkpoints" / f"step-{STEPS:08d}" / "model.safetensors").read_bytes()).hexdigest()


def metrics_of(out: Path) -> list[dict[str, Any]]:
    """Lines of metrics.jsonl without what was measured, and without the line that names the folder."""
    lines = [json.loads(line) for line in (out / "logs" / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in MEASURED} for line in lines if line["kind"] != "start"]


def checkpoints_of(out: Path) -> list[Path]:
    """Complete checkpoints, newest first."""
    found = (p for p in (out / "checkpoints").glob("step-*") if p.name[5:].isdigit())
    return sorted((p for p in found if (p / "manifest.json").is_file()), reverse=True)


def contents(folder: Path) -> dict[str, str]:
    files = (p for p in folder.rglob("*") if p.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}
