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
    grad_norm: float
    tokens_per_second: float
    """Of this step; evaluation, sampling and saving are not in it."""
    memory_bytes: int
    """Peak so far: CUDA's allocated memory, or the process's resident set on a CPU."""
    seconds: float
    """Training time since step 0, without evaluation, sampling and saving."""


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


class Observer:
    """Watches a run. Each method does nothing unless overridden."""

    def on_start(self, record: Start) -> None:
        """The run begins."""

    def on_step(self, record: Step) -> None:
        """After every optimiser step."""

    def on_validation(self, record: Validation) -> None:
        """After every validation."""

    def on_sample(self, record: Sample) -> None:
        """After every sample."""

    def on_message(self, record: Message) -> None:
        """A sentence for people."""

    def on_end(self, record: End) -> None:
        """The run stops; release what is held."""
