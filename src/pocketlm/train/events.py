"""What a run tells those who watch it.

What belongs here: the facts an observer receives, as frozen records, and the ``Observer`` protocol.
Imports nothing of pocketlm, so that watching and training know only this page of each other.

Design: every record has a ``to_dict`` whose result is one line of ``metrics.jsonl`` (key ``kind``
tells which); report, TensorBoard and tests read those lines and nothing else.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, ClassVar


@dataclass(frozen=True)
class Record:
    """Base of the lines of metrics.jsonl."""

    kind: ClassVar[str] = ""

    def to_dict(self) -> dict[str, Any]:
        """The record as JSON-ready values, ``kind`` first."""
        return {"kind": self.kind, **asdict(self)}


@dataclass(frozen=True)
class Start(Record):
    """A run begins or goes on."""

    kind: ClassVar[str] = "start"
    name: str
    folder: str
    step: int
    """Steps already done: 0, or where a resumed run goes on."""
    total_steps: int
    parameters: int
    facts: dict[str, str]
    """Things to show once: device, precision, corpus, tokenizer, useful tokens ... in words."""


@dataclass(frozen=True)
class Step(Record):
    """One optimiser step; ``loss`` is the mean over its target tokens in nats."""

    kind: ClassVar[str] = "train"
    step: int
    tokens: int
    """Target tokens trained on since step 0."""
    epoch: float
    loss: float
    lr: float
    weight_decay: float
    """Of the matrices."""
    grad_norm: float
    tokens_per_second: float
    """Of this step; evaluation, sampling and saving are not in it."""
    memory_bytes: int
    """Peak so far: CUDA's allocated memory, or the process's resident set on a CPU."""
    seconds: float
    """Training time since step 0, without evaluation, sampling and saving."""
    skipped: int = 0
    """Steps so far whose update was left out."""


@dataclass(frozen=True)
class Phase(Record):
    """The second or a later phase of a run begins."""

    kind: ClassVar[str] = "phase"
    step: int
    """Steps done before it."""
    number: int
    """1-based."""
    steps: int
    lr: float
    """Peak."""
    weight_decay: float
    data: str


@dataclass(frozen=True)
class Validation(Record):
    """The whole held-out split scored."""

    kind: ClassVar[str] = "validation"
    step: int
    tokens: int
    seconds: float
    """Training time when it was scored."""
    loss: float
    perplexity: float
    bits_per_byte: float
    best: bool
    train_loss: float | None = None
    """Mean training loss since the validation before."""
    memorising: bool = False
    """Validation has been rising while training fell."""


@dataclass(frozen=True)
class Sample(Record):
    """One completion written by the model in training."""

    kind: ClassVar[str] = "sample"
    step: int
    prompt: str
    text: str
    """The completion alone."""


@dataclass(frozen=True)
class Message(Record):
    """A sentence for people: saved, interrupted, memorising ..."""

    kind: ClassVar[str] = "message"
    step: int
    text: str


@dataclass(frozen=True)
class End(Record):
    """The run stops: finished, or interrupted."""

    kind: ClassVar[str] = "end"
    step: int
    finished: bool
    summary: dict[str, Any]
    """The final numbers, also written to summary.json."""
    reason: str | None = None
    """What ended it, where it was neither the last step nor the user."""


class Observer:
    """Watches a run. Each method does nothing unless overridden."""

    def state(self) -> dict[str, Any]:
        """What this observer needs to go on after a resume, as JSON values; saved with every checkpoint."""
        return {}

    def on_start(self, record: Start) -> None:
        """The run begins."""

    def on_step(self, record: Step) -> None:
        """After every optimiser step."""

    def on_phase(self, record: Phase) -> None:
        """Before the first step of the second and every later phase."""

    def on_validation(self, record: Validation) -> None:
        """After every validation."""

    def on_sample(self, record: Sample) -> None:
        """After every sample."""

    def on_message(self, record: Message) -> None:
        """A sentence for people."""

    def on_end(self, record: End) -> None:
        """The run stops; release what is held."""


def notify(observer: Observer, record: Record) -> None:
    """Call the method of ``observer`` that takes this kind of record."""
    hook = {
        Start: "on_start",
        Step: "on_step",
        Phase: "on_phase",
        Validation: "on_validation",
        Sample: "on_sample",
        Message: "on_message",
        End: "on_end",
    }[type(record)]
    getattr(observer, hook)(record)
