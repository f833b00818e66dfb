"""Those who watch a run: the bar, the log, the metrics file, TensorBoard.

What belongs here: one class for each place that a run's records go to. Imports ``errors``, ``train.events`` and
``train.words``; TensorBoard (and with it torch) only when asked for.

Design: only ``metrics.jsonl`` needs a state for a resume, and that is saved with the checkpoint: a resumed run cuts
the file at that place and goes on, so it is the one an uninterrupted run would have written.
Averages shown are exponential with a memory of 100 steps, divided by their weight so that they are right from step 1.
"""

from __future__ import annotations

import errno
import json
import math
import os
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

from tqdm import tqdm

from pocketlm.errors import MissingExtraError
from pocketlm.train.events import End, Message, Observer, Phase, Record, Sample, Start, Step, Validation
from pocketlm.train.words import (
    clock,
    closing_lines,
    count,
    fit,
    gigabytes,
    paragraph,
    phase_line,
    sample_title,
    table,
    validation_line,
    visible,
    wrap,
)

MEMORY = 100
"""Steps that a running average remembers."""
QUIET_SECONDS, QUIET_SHARE = 30.0, 0.05
"""Without a terminal a line is due when both have passed since the last one: seconds, share of all steps."""
SAMPLE_LINES = 12
"""Lines of a sample shown while training."""


class RunningMean:
    """Exponential average over about ``memory`` values, debiased as in Adam (Kingma and Ba, 2015)."""

    def __init__(self, memory: int = MEMORY) -> None:
        self.decay = 1.0 - 1.0 / memory
        self.total = self.weight = 0.0

    def add(self, value: float) -> None:
        """Take in one value; NaN and infinity are left out, or they would stay for ever."""
        if math.isfinite(value):
            self.total = self.decay * self.total + value
            self.weight = self.decay * self.weight + 1.0

    @property
    def value(self) -> float:
        """The average; NaN before the first finite value."""
        return self.total / self.weight if self.weight else math.nan


class Progress:
    """The figures of a status line, by step."""

    def __init__(self) -> None:
        self.loss, self.seconds_per_token = RunningMean(), RunningMean()
        self.validation: float | None = None
        self.memorising = False
        self.began = time.monotonic()
        self.first: int | None = None

    def figures(self, step: Step, total: int) -> dict[str, str]:
        """Take in ``step``; what to show of it, in reading order."""
        self.first = step.step - 1 if self.first is None else self.first
        self.loss.add(step.loss)
        # Times add up and rates do not: the mean rate is one over the mean time.
        self.seconds_per_token.add(1.0 / step.tokens_per_second if step.tokens_per_second > 0 else math.nan)
        pace = (time.monotonic() - self.began) / max(1, step.step - self.first)
        figures = {"loss": f"loss {step.loss:.3f}", "average": f"avg {self.loss.value:.3f}"}
        if self.validation is not None:
            figures["validation"] = f"val {self.validation:.3f}" + (" memorising" if self.memorising else "")
        if step.skipped:
            figures["skipped"] = f"{step.skipped} skipped"
        return figures | {
            "lr": f"lr {step.lr:.1e}",
            "speed": f"{count(1.0 / self.seconds_per_token.value)} tok/s",
            "memory": gigabytes(step.memory_bytes),
            "left": f"{clock(pace * (total - step.step))} left",
        }


# ---------------------------------------------------------------- for people


class ProgressBar(Observer):
    """A live bar where ``stream`` is a terminal, plain lines now and then where it is not."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self.stream = stream or sys.stderr
        self.live = self.stream.isatty() and os.environ.get("TERM") != "dumb"
        self.color = self.live and not os.environ.get("NO_COLOR")
        self.bar: tqdm[Any] | None = None
        self.total = 0
        self.progress = Progress()
        self.shown_step, self.shown_at = 0, 0.0

    def on_start(self, record: Start) -> None:
        self.total, self.shown_step = record.total_steps, record.step
        self.progress = Progress()
        goes_on = f", goes on from step {record.step:,}" if record.step else ""
        self._print(f"{self._bold(visible(record.name))}  {record.total_steps:,} steps{goes_on}")
        for line in table(record.facts, self._width()):
            self._print(line)
        self._print("")
        if self.live:
            # The bar takes what the figures leave of the line; tqdm falls back to ASCII by itself.
            self.bar = tqdm(
                total=record.total_steps, initial=record.step, file=self.stream, bar_format="{bar} {desc}",
                dynamic_ncols=True, mininterval=0.2, leave=False,
            )  # fmt: skip

    def on_step(self, record: Step) -> None:
        figures = self.progress.figures(record, self.total)
        position = f"{record.step:,}/{self.total:,}"
        if self.bar is not None:
            self.bar.set_description_str(fit(position, figures, self._width() - 12), refresh=False)
            self.bar.update(record.step - self.bar.n)
        elif self._due(record.step):
            self.shown_step, self.shown_at = record.step, time.monotonic()
            self._print("  ".join(("step " + position, *figures.values())))

    def on_phase(self, record: Phase) -> None:
        for line in paragraph(phase_line(record), self._width()):
            self._print(line)

    def on_validation(self, record: Validation) -> None:
        self.progress.validation, self.progress.memorising = record.loss, record.memorising
        line = validation_line(record)
        self._print(self._bold(line) if record.best else line)

    def on_sample(self, record: Sample) -> None:
        width = self._width()
        dash = "─" if _speaks_unicode(self.stream) else "-"
        self._print((f"{dash * 2} {sample_title(record)} ")[:width].ljust(width, dash))
        given = wrap(visible(record.prompt), width - 2)
        lines = wrap(visible(record.prompt + record.text).rstrip(), width - 2)
        for i, line in enumerate(lines[:SAMPLE_LINES]):
            prompt = len(line) if i < len(given) - 1 else len(given[-1]) if i == len(given) - 1 else 0
            self._print(f"  {self._dim(line[:prompt])}{line[prompt:]}")
        if len(lines) > SAMPLE_LINES:
            self._print(f"  ({len(lines) - SAMPLE_LINES} more lines are in the log)")
        self._print(dash * width)

    def on_message(self, record: Message) -> None:
        for line in paragraph(record.text, self._width()):
            self._print(line)

    def on_end(self, record: End) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None
        self._print("")
        for line in closing_lines(record, self.total, self._width()):
            self._print(line)

    def _due(self, step: int) -> bool:
        if step == self.total or not self.shown_at:
            return True
        waited = time.monotonic() - self.shown_at >= QUIET_SECONDS
        return waited and step - self.shown_step >= QUIET_SHARE * self.total

    def _print(self, line: str) -> None:
        encoding = self.stream.encoding or "utf-8"
        tqdm.write(line.encode(encoding, "replace").decode(encoding), file=self.stream)
        self.stream.flush()

    def _width(self) -> int:
        try:
            columns = os.get_terminal_size(self.stream.fileno()).columns
        except (OSError, ValueError):
            columns = 0
        return max(40, min(columns or 80, 120))

    def _bold(self, text: str) -> str:
        return f"\x1b[1m{text}\x1b[0m" if self.color else text

    def _dim(self, text: str) -> str:
        return f"\x1b[2m{text}\x1b[0m" if self.color and text else text


class TextLog(Observer):
    """``train.log``: everything in words, each line with its time; appended by resumed runs."""

    def __init__(self, path: Path, log_every: int) -> None:
        # Line by line on disk, so that a killed run leaves its last words.
        self.file = path.open("a", encoding="utf-8", errors="replace", buffering=1)
        self.log_every, self.total, self.progress = log_every, 0, Progress()

    def on_start(self, record: Start) -> None:
        self.total, self.progress = record.total_steps, Progress()
        self._write(f"start {record.name} at step {record.step:,} of {record.total_steps:,}")
        for name, value in record.facts.items():
            self._write(f"{name}: {value}")

    def on_step(self, record: Step) -> None:
        figures = self.progress.figures(record, self.total)
        if record.step % self.log_every == 0 or record.step == self.total:
            self._write("  ".join((f"step {record.step:,}/{self.total:,}", *figures.values())))

    def on_phase(self, record: Phase) -> None:
        self._write(phase_line(record))

    def on_validation(self, record: Validation) -> None:
        self.progress.validation, self.progress.memorising = record.loss, record.memorising
        self._write(validation_line(record))

    def on_sample(self, record: Sample) -> None:
        self._write(sample_title(record))
        for line in (record.prompt + record.text).split("\n"):
            self._write(f"  | {line}")

    def on_message(self, record: Message) -> None:
        self._write(record.text)

    def on_end(self, record: End) -> None:
        if record.reason:
            self._write(record.reason)
        for line in closing_lines(record, self.total, width=120):
            if line:
                self._write(line)
        self.file.close()

    def _write(self, line: str) -> None:
        self.file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')}  {visible(line)}\n")


def _speaks_unicode(stream: TextIO) -> bool:
    return (stream.encoding or "").lower().startswith("utf")


# ---------------------------------------------------------------- for programs


class MetricsFile(Observer):
    """``metrics.jsonl``: one JSON object a line, written through at once.

    Holds the start, one ``train`` line for every ``log_every`` steps, phases, validations and samples. A train line's
    loss is the mean over the tokens of its steps (those whose loss was finite), its tokens/s those tokens over their
    time; the rest is the last step's. NaN and infinity become null. Messages and the end are in train.log and
    summary.json: an uninterrupted run would have others.

    ``saved`` is what ``state`` gave when the checkpoint was taken from which the run goes on; lines beyond it are cut
    off and the average goes on where it was, so the file becomes the one of an uninterrupted run. Lines that a full
    disk refuses are kept and written when it takes them again.
    """

    def __init__(self, path: Path, log_every: int, saved: Mapping[str, Any] | None = None) -> None:
        self.log_every, self.total = log_every, 0
        saved = saved or {"bytes": 0, "pending": [], "nats": 0.0, "nats_tokens": 0, "base": [0, 0.0], "last": None}
        self.nats: float = saved["nats"]
        self.nats_tokens: int = saved["nats_tokens"]
        self.base_tokens, self.base_seconds = saved["base"]
        self.last_step = None if saved["last"] is None else Step(**saved["last"])
        self.seen_tokens: int = self.last_step.tokens if self.last_step else self.base_tokens
        self.pending: list[str] = list(saved["pending"])
        self.file = path.open("ab", buffering=0)
        self.end = min(saved["bytes"], self.file.tell())
        self.file.truncate(self.end)

    def state(self) -> dict[str, Any]:
        return {
            "bytes": self.end,
            "pending": list(self.pending),
            "nats": self.nats,
            "nats_tokens": self.nats_tokens,
            "base": [self.base_tokens, self.base_seconds],
            "last": None if self.last_step is None else _strict(vars(self.last_step)),
        }

    def on_start(self, record: Start) -> None:
        self.total = record.total_steps
        if record.step == 0:
            self._write(record)

    def on_step(self, record: Step) -> None:
        tokens = record.tokens - self.seen_tokens
        if math.isfinite(record.loss):
            self.nats += record.loss * tokens
            self.nats_tokens += tokens
        self.seen_tokens = record.tokens
        self.last_step = record
        if record.step % self.log_every == 0 or record.step == self.total:
            self._write_mean()

    def on_phase(self, record: Phase) -> None:
        self._write(record)

    def on_validation(self, record: Validation) -> None:
        self._write(record)

    def on_sample(self, record: Sample) -> None:
        self._write(record)

    def on_end(self, record: End) -> None:
        try:
            self._write_mean()
        finally:
            self.file.close()

    def _write_mean(self) -> None:
        last = self.last_step
        if last is None:
            return
        tokens, seconds = last.tokens - self.base_tokens, last.seconds - self.base_seconds
        mean = {
            "loss": self.nats / self.nats_tokens if self.nats_tokens else math.nan,
            "tokens_per_second": tokens / seconds if seconds > 0 else 0.0,
        }
        self.base_tokens, self.base_seconds = last.tokens, last.seconds
        self.last_step, self.nats, self.nats_tokens = None, 0.0, 0
        self._write(Step(**{**vars(last), **mean}))

    def _write(self, record: Record) -> None:
        self.pending.append(json.dumps(_strict(record.to_dict()), allow_nan=False))
        data = "".join(f"{line}\n" for line in self.pending).encode()
        try:
            if self.file.write(data) != len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), self.file.name)
        except OSError:
            with suppress(OSError):
                self.file.truncate(self.end)
            raise
        self.pending = []
        self.end += len(data)


def _strict(value: Any) -> Any:
    """JSON has no NaN and no infinity."""
    if isinstance(value, dict):
        return {key: _strict(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


class TensorBoard(Observer):
    """Scalars by step, samples as text. Raises MissingExtraError at once where TensorBoard is missing."""

    def __init__(self, folder: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise MissingExtraError("tensorboard", "tensorboard", "TensorBoard logging") from None
        self.open: Callable[[int], Any] = lambda step: SummaryWriter(str(folder), purge_step=step + 1)
        self.writer: Any = None

    def on_start(self, record: Start) -> None:
        # purge_step hides what a run that was killed had written beyond the checkpoint it goes on from.
        self.writer = self.open(record.step)

    def on_step(self, record: Step) -> None:
        scalars = {"loss/train": record.loss, "optimizer/lr": record.lr, "optimizer/grad_norm": record.grad_norm}
        for name, value in (scalars | {"speed/tokens_per_second": record.tokens_per_second}).items():
            self.writer.add_scalar(name, value, record.step)

    def on_validation(self, record: Validation) -> None:
        self.writer.add_scalar("loss/validation", record.loss, record.step)
        self.writer.add_scalar("loss/bits_per_byte", record.bits_per_byte, record.step)

    def on_sample(self, record: Sample) -> None:
        # Four spaces make it Markdown's preformatted text.
        text = "".join(f"    {line}\n" for line in visible(record.prompt + record.text).split("\n"))
        self.writer.add_text(record.prompt or "sample", text, record.step)

    def on_end(self, record: End) -> None:
        self.writer.close()
