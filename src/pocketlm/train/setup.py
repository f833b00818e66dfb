"""From a configuration to the parts of a run, every check before the first file is written.

What belongs here: the order in which parts are made. Imports the rooms above and the rest of ``train``.

Design: a run's folder appears only after text, tokenizer, model and machine have agreed with each other, so a
refused run leaves nothing behind but the token cache, which the next one reuses.
"""

from __future__ import annotations

import hashlib
import json
import platform
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock

from pocketlm import __version__
from pocketlm.config import Config, Settings
from pocketlm.data.corpora import Corpus, open_corpus
from pocketlm.data.shards import TokenCache, prepare
from pocketlm.errors import MissingExtraError, RunError
from pocketlm.files import write_atomically
from pocketlm.model.transformer import Transformer
from pocketlm.tokenizers import Tokenizer, check_vocabulary, load_tokenizer
from pocketlm.train import checkpoint, runtime
from pocketlm.train.average import Average
from pocketlm.train.checkpoint import Checkpoint
from pocketlm.train.control import Clock, StopSignal
from pocketlm.train.events import Message, Observer, Record, notify
from pocketlm.train.observers import MetricsFile, ProgressBar, TensorBoard, TextLog
from pocketlm.train.optim import Optimizers
from pocketlm.train.origin import Origin
from pocketlm.train.phases import Phase, plan, settled
from pocketlm.train.resume import agree, identity, machine_facts, restore_newest, write_identity
from pocketlm.train.runs import Run, find_run
from pocketlm.train.runtime import Runtime
from pocketlm.train.saver import Retention, Saver
from pocketlm.train.state import TrainState

COMPILED_SHAPES = 256
"""Shapes of batches that are compiled before the rest runs uncompiled."""


@dataclass
class Session:
    """The parts of a run, ready for the loop."""

    run: Run
    config: Config
    runtime: Runtime
    tokenizer: Tokenizer
    phases: list[Phase]
    state: TrainState
    saver: Saver
    observers: Sequence[Observer]
    command: str
    """The command line that started it."""
    clock: Clock
    lock: FileLock
    notes: list[str]
    """What a person should know before the first step."""
    continued: bool
    """Whether this is the first process of a run that goes on from another one's checkpoint."""
    stop: StopSignal = field(default_factory=StopSignal)
    left_undone: bool = False
    """Whether a stop cut short what was due after the newest step."""
    failing: set[str] = field(default_factory=set)
    """What observers could not do, each said once."""

    @property
    def total_steps(self) -> int:
        """Steps of all phases."""
        return self.phases[-1].end

    @property
    def phase(self) -> Phase:
        """The phase of the step just done; the first before any."""
        return self.phase_of(max(0, self.state.progress.step - 1))

    def phase_of(self, step: int) -> Phase:
        """The phase in which ``step`` (0-based) is taken."""
        return next((phase for phase in self.phases if step < phase.end), self.phases[-1])

    def tell(self, record: Record) -> None:
        """Hand a record to every observer; one that fails is named once and costs the run nothing."""
        for observer in self.observers:
            try:
                notify(observer, record)
            except Exception as e:
                failing = f"{type(observer).__name__} could not write ({e})"
                if failing not in self.failing:
                    self.failing.add(failing)
                    with suppress(OSError, ValueError):
                        print(f"{failing}; training goes on", file=sys.stderr)

    def say(self, text: str) -> None:
        """A sentence for people."""
        self.tell(Message(self.state.progress.step, text))

    def close(self) -> None:
        """Let another process have the run."""
        self.lock.release()

    def facts(self) -> dict[str, str]:
        """What a person wants to know before it starts."""
        phase = self.phases[0]
        train, validation = phase.cache.splits["train"], phase.cache.splits["validation"]
        training = phase.config.training
        share = phase.loader.useful_share()
        facts = {
            "model": f"{self.state.model.num_parameters():,} parameters",
            "data": phase.corpus.description,
            "tokens": f"{train.n_tokens:,} to train on, {validation.n_tokens:,} held out",
            "tokenizer": f"{self.tokenizer.name}, {self.tokenizer.vocab_size:,} ids",
            "batches": f"{phase.config.data.mode}, {training.batch_size} x {training.grad_accum} x "
            f"{phase.config.window} tokens, {share:.1%} useful",
        }
        if len(self.phases) > 1:
            facts["phases"] = ", ".join(f"{phase.steps:,} steps" for phase in self.phases)
        return facts | {"machine": self.runtime.describe(), "run": str(self.run.folder)}


def open_session(
    config: Config,
    run: Run,
    *,
    command: str,
    began: float,
    quiet: bool = False,
    origin: Origin | None = None,
) -> Session:
    """Make or reopen the parts of ``run``. Raises PocketError; writes into the run's folder last.

    origin: for a new run, the checkpoint of another one that it goes on from, optimiser and all.
    """
    if config.training.tensorboard and find_spec("tensorboard") is None:
        raise MissingExtraError("tensorboard", "tensorboard", "training.tensorboard")
    clock = Clock(began)
    lock = run.lock() if run.config_path.is_file() else None
    try:
        return _open(config, run, clock, lock, command=command, quiet=quiet, origin=origin)
    except BaseException:
        if lock is not None:
            lock.release()
        raise


def _open(
    config: Config, run: Run, clock: Clock, lock: FileLock | None, *, command: str, quiet: bool, origin: Origin | None
) -> Session:
    notes: list[str] = []
    found = checkpoint.find(run.checkpoints)
    saved = run.config() if found else None
    machine = runtime.decide(config.training)
    source = run if found else origin.run if origin else None
    corpus, tokenizer, cache = open_text(_first(config), source.tokenizer() if source else None)
    vocab = config.model.vocab_size or tokenizer.vocab_size
    config = _with(config, "model", vocab_size=vocab)
    check_vocabulary(tokenizer, config.model)

    torch.manual_seed(config.training.seed)
    phases = plan(config, tokenizer, (corpus, cache))
    config = _with(settled(config, phases), "training", device=machine.device.type, precision=machine.precision)
    if saved is not None:
        notes += agree(run, saved, config)
    facts = identity(run, phases, origin.name if origin else None)
    state = _new_state(config, machine)
    restored: Checkpoint | None = None
    if found:
        restored = restore_newest(found, state, facts["id"], lambda text: print(text, file=sys.stderr))
    elif origin is not None:
        origin.restore(state)
    elif config.training.init_from is not None:
        _load_weights(state, config.training.init_from)
    if _is_finished(run, state, phases[-1].end):
        raise RunError(
            f"the run '{run.folder}' is finished, at step {state.progress.step:,} of {phases[-1].end:,}: train "
            f"on in a new "
            f"folder with 'pocketlm continue {run.folder} --steps N', or give a larger --training.steps"
        )
    now = machine_facts(torch.get_num_threads(), machine.device.type, machine.precision)
    notes += _other_machine(state.machine, now)
    state.machine = now

    lock = _write_folder(run, config, tokenizer, facts, state, lock)
    if config.training.compile:
        compile_blocks(state.model)
    if origin is not None and restored is None:
        origin.copy_metrics(run, state)
    metrics = MetricsFile(run.logs / "metrics.jsonl", config.training.log_every, state.watching.get("MetricsFile"))
    observers: list[Observer] = [] if quiet else [ProgressBar()]
    observers += [TextLog(run.logs / "train.log", log_every=config.training.log_every), metrics]
    if config.training.tensorboard:
        observers.append(TensorBoard(run.logs / "tensorboard"))
    clock.add(state.progress.spent)
    saver = Saver(
        run.checkpoints,
        facts["id"],
        Retention(config.training.keep_last, config.training.keep_every),
        background=config.training.save_in_background,
        report=lambda text: session.say(text),
        resumed_from=restored.step if restored else None,
    )
    session = Session(
        run, config, machine, tokenizer, phases, state, saver, observers, command, clock, lock, notes,
        continued=origin is not None and restored is None,
    )  # fmt: skip
    return session


def open_text(config: Config, tokenizer: Tokenizer | None) -> tuple[Corpus, Tokenizer, TokenCache]:
    """The corpus, its tokenizer (a resumed run's own, or made now) and its tokens. Raises PocketError."""
    data = config.data
    corpus = open_corpus(data, mirror=data.mirror_folder)
    tokenizer = tokenizer or _tokenizer(config, corpus, data.cache_folder, data.mirror_folder)
    return corpus, tokenizer, prepare(corpus, tokenizer, data.cache_folder)


def versions() -> dict[str, str]:
    """Software that decides a run's numbers."""
    return {
        "pocketlm": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": sys.platform,
    }


def compile_blocks(model: Transformer) -> None:
    """Compile the blocks, all from one piece of code; where nothing compiles, say so and leave them.

    Every shape is compiled for itself: code made for several would depend on which of them came first, and a resumed
    run meets them in another order.
    """
    try:
        torch.compile(lambda x: x + 1)(torch.ones(1, device=next(model.parameters()).device))
    except Exception as e:  # whatever a missing compiler makes of it
        print(f"training.compile has no effect: {type(e).__name__}, is there a compiler?", file=sys.stderr)
        return
    limits = torch._dynamo.config  # type: ignore[attr-defined]
    for name in ("recompile_limit", "cache_size_limit", "accumulated_recompile_limit", "accumulated_cache_size_limit"):
        if hasattr(limits, name):
            setattr(limits, name, COMPILED_SHAPES * len(model.blocks))
    for block in model.blocks:
        block.compile(dynamic=False)


def _first(config: Config) -> Config:
    return config.phase(0) if config.phases else config


def _tokenizer(config: Config, corpus: Corpus, cache_dir: Path, mirror: Path | None) -> Tokenizer:
    """The named tokenizer; one that is trained on the corpus is kept beside the token cache."""
    if config.tokenizer.name != "bpe":
        return load_tokenizer(config.tokenizer, mirror=mirror, texts=lambda: _all_text(corpus))
    key = hashlib.sha256(f"{corpus.fingerprint()} {config.tokenizer.vocab_size}".encode()).hexdigest()[:16]
    folder = cache_dir / f"bpe-{key}"
    if (folder / "tokenizer_config.json").is_file():
        return Tokenizer.from_folder(folder, name="bpe")
    tokenizer = load_tokenizer(config.tokenizer, mirror=mirror, texts=lambda: corpus.documents("train"))
    with suppress(OSError):  # the run's folder gets it anyway
        tokenizer.save(folder)
    return tokenizer


def _all_text(corpus: Corpus) -> Iterator[str]:
    """Every split: a character tokenizer must know the characters of the held-out text too."""
    for split in corpus.splits:
        yield from corpus.documents(split)


def _new_state(config: Config, machine: Runtime) -> TrainState:
    model = Transformer(config.model).to(machine.device)
    model.compute_dtype = machine.dtype
    model.gradient_checkpointing = config.training.gradient_checkpointing
    scaler = torch.amp.GradScaler(machine.device.type, enabled=machine.loss_scaling)
    average = Average(model, config.training.ema) if config.training.ema else None
    return TrainState(model, Optimizers(model, config.optimizer), scaler, average=average)


def _load_weights(state: TrainState, source: str) -> None:
    """Start from the best weights of another run. Raises RunError when they have another shape."""
    run = find_run(source)
    try:
        state.model.load_state_dict(run.checkpoint("best").weights())
    except RuntimeError as e:
        raise RunError(
            f"the weights of '{run.folder}' do not fit this model: {' '.join(str(e).split())}; leave out the "
            "--model settings that differ"
        ) from None
    if state.average is not None:
        state.average.load(state.model.state_dict())


def _is_finished(run: Run, state: TrainState, total: int) -> bool:
    """Whether the last process of this run came to its end, validation and report included."""
    try:
        summary = json.loads(run.summary_path.read_bytes())
        ended = bool(summary["finished"]) and summary["step"] == state.progress.step
        return ended and (state.progress.step >= total or summary["total_steps"] == total)
    except (OSError, ValueError, RecursionError, KeyError, TypeError):
        return False


def _other_machine(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    other = [f"{name} {now[name]} (before: {before[name]})" for name in now if before and before.get(name) != now[name]]
    return [f"another machine, so the last bits may differ: {', '.join(other)}"] if other else []


def _with(config: Config, group: str, **changes: object) -> Config:
    settings: Settings = getattr(config, group)
    return config.model_copy(update={group: settings.replace(**changes)})


def _write_folder(
    run: Run, config: Config, tokenizer: Tokenizer, facts: dict[str, Any], state: TrainState, lock: FileLock | None
) -> FileLock:
    """Write what a run begins with, under its lock."""
    progress = state.progress
    try:
        run.logs.mkdir(parents=True, exist_ok=True)
        if lock is None:
            lock = run.lock()
            if run.config_path.is_file():
                raise RunError(f"another process has just begun the run '{run.folder}': give the command again")
        run.checkpoints.mkdir(exist_ok=True)
        checkpoint.sweep(run.checkpoints)
        checkpoint.note_best(run.checkpoints, progress.best_step, progress.best_loss)
        tokenizer.save(run.tokenizer_folder)
        write_identity(run, facts)
        write_atomically(run.config_path, config.to_yaml())
        return lock
    except OSError as e:
        raise RunError(f"the run's folder '{run.folder}' cannot be written: {e}") from None
