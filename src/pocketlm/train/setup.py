"""From a configuration to the parts of a run, every check before the first file is written.

What belongs here: the order in which parts are made. Imports the rooms above and the rest of ``train``.

Design: a run's folder appears only after text, tokenizer, model and machine have agreed with each other, so a
refused run leaves nothing behind but the token cache, which the next one reuses.
"""

from __future__ import annotations

import hashlib
import platform
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch

from pocketlm import __version__
from pocketlm.config import Config, Settings
from pocketlm.data.corpora import Corpus, open_corpus
from pocketlm.data.loader import Loader
from pocketlm.data.shards import TokenCache, prepare
from pocketlm.errors import MissingExtraError, RunError
from pocketlm.model.transformer import Transformer
from pocketlm.tokenizers import Tokenizer, check_vocabulary, load_tokenizer
from pocketlm.train import checkpoint, runtime
from pocketlm.train.checkpoint import Checkpoint
from pocketlm.train.events import Observer
from pocketlm.train.observers import MetricsFile, ProgressBar, TensorBoard, TextLog
from pocketlm.train.optim import Optimizers
from pocketlm.train.runs import Run
from pocketlm.train.runtime import Runtime
from pocketlm.train.state import TrainState


@dataclass
class Session:
    """The parts of a run, ready for the loop."""

    run: Run
    config: Config
    runtime: Runtime
    corpus: Corpus
    tokenizer: Tokenizer
    cache: TokenCache
    loader: Loader
    state: TrainState
    total_steps: int
    observers: Sequence[Observer]
    command: str
    """The command line that started it."""
    began: float
    """``time.perf_counter()`` when the process began its work."""

    def facts(self) -> dict[str, str]:
        """What a person wants to know before it starts."""
        train, validation = self.cache.splits["train"], self.cache.splits["validation"]
        training = self.config.training
        share = self.loader.useful_share()
        return {
            "model": f"{self.state.model.num_parameters():,} parameters",
            "data": self.corpus.description,
            "tokens": f"{train.n_tokens:,} to train on, {validation.n_tokens:,} held out",
            "tokenizer": f"{self.tokenizer.name}, {self.tokenizer.vocab_size:,} ids",
            "batches": f"{self.config.data.mode}, {training.batch_size} x {training.grad_accum} x "
            f"{self.config.window} tokens, {share:.1%} useful",
            "machine": self.runtime.describe(),
            "run": str(self.run.folder),
        }


def open_session(config: Config, run: Run, *, command: str, began: float, quiet: bool = False) -> Session:
    """Make or reopen the parts of ``run``. Raises PocketError; writes into the run's folder last."""
    if config.training.tensorboard and find_spec("tensorboard") is None:
        raise MissingExtraError("tensorboard", "tensorboard", "training.tensorboard")
    machine = runtime.decide(config.training)
    found = checkpoint.find(run.checkpoints)
    corpus, tokenizer, cache = open_text(config, run.tokenizer() if found else None)
    vocab = config.model.vocab_size or tokenizer.vocab_size
    config = _with(config, "model", vocab_size=vocab)
    check_vocabulary(tokenizer, config.model)

    torch.manual_seed(config.training.seed)
    loader = Loader(
        cache.splits["train"],
        mode=config.data.mode,
        block_size=config.window,
        batch_size=config.training.batch_size,
        seed=config.training.seed,
    )
    total = config.training.steps or steps_for_epochs(loader, config.training.epochs or 1.0, config.training.grad_accum)
    config = _with(config, "training", steps=total, device=machine.device.type, precision=machine.precision)
    state = _new_state(config, machine)
    if found:
        _check_data(run, cache)
        _restore_newest(found, state)
        if state.progress.step >= total:
            raise RunError(
                f"the run '{run.folder}' is finished, at step {state.progress.step:,} of {total:,}: "
                "give a larger --training.steps to train on"
            )

    _write_folder(run, config, tokenizer, cache)
    if config.training.compile:
        compile_blocks(state.model)
    observers: list[Observer] = [] if quiet else [ProgressBar()]
    observers += [
        TextLog(run.logs / "train.log", log_every=config.training.log_every),
        MetricsFile(run.logs / "metrics.jsonl", log_every=config.training.log_every, step=state.progress.step),
    ]
    if config.training.tensorboard:
        observers.append(TensorBoard(run.logs / "tensorboard"))
    return Session(run, config, machine, corpus, tokenizer, cache, loader, state, total, observers, command, began)


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


def _restore_newest(found: Sequence[Checkpoint], state: TrainState) -> None:
    """Go on from the newest checkpoint that is whole. Raises RunError where none is: a run never starts over them."""
    for candidate in found:
        try:
            candidate.restore(state)
            return
        except RunError as e:
            print(f"{e}; trying the one before it", file=sys.stderr)
    raise RunError(f"none of the run's {len(found)} checkpoints can be read: see above; nothing was changed")


def compile_blocks(model: Transformer) -> None:
    """Compile the blocks, all from one piece of code; where nothing compiles, say so and leave them."""
    try:
        torch.compile(lambda x: x + 1)(torch.ones(1, device=next(model.parameters()).device))
    except Exception as e:  # whatever a missing compiler makes of it
        print(f"training.compile has no effect: {type(e).__name__}, is there a compiler?", file=sys.stderr)
        return
    for block in model.blocks:
        block.compile()


def steps_for_epochs(loader: Loader, epochs: float, grad_accum: int) -> int:
    """Optimiser steps that ``epochs`` passes need; a fraction counts in micro-batches of its epoch."""
    whole = int(epochs)
    batches = sum(loader.batches_in_epoch(epoch) for epoch in range(whole))
    batches += round((epochs - whole) * loader.batches_in_epoch(whole))
    return max(1, -(-batches // grad_accum))


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
    return TrainState(model, Optimizers(model, config.optimizer), scaler)


def _with(config: Config, group: str, **changes: object) -> Config:
    settings: Settings = getattr(config, group)
    return config.model_copy(update={group: settings.replace(**changes)})


def _check_data(run: Run, cache: TokenCache) -> None:
    """Going on with other text would be another run."""
    recorded = run.folder / "data.txt"
    if recorded.is_file() and recorded.read_text().split()[:1] != [cache.fingerprint]:
        raise RunError(
            f"the text or tokenizer of the run '{run.folder}' has changed since it began: "
            "put it back, or start a new run"
        )


def _write_folder(run: Run, config: Config, tokenizer: Tokenizer, cache: TokenCache) -> None:
    try:
        run.logs.mkdir(parents=True, exist_ok=True)
        run.checkpoints.mkdir(exist_ok=True)
        tokenizer.save(run.tokenizer_folder)
        checkpoint.write_atomically(run.folder / "data.txt", f"{cache.fingerprint}\n")
        checkpoint.write_atomically(run.config_path, config.to_yaml())
    except OSError as e:
        raise RunError(f"the run's folder '{run.folder}' cannot be written: {e}") from None
