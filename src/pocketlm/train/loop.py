"""The training loop: read it top to bottom.

What belongs here: the algorithm, and the moments at which something else is due. How a batch is made, a
loss computed, a checkpoint written or a number shown lives in the rooms it calls.

Design: evaluating, sampling and saving stand between steps and outside the clock that gives tokens a second.
"""

from __future__ import annotations

import json
import math
import signal
import time
from collections.abc import Sequence
from contextlib import nullcontext
from itertools import islice
from types import FrameType
from typing import Any

import torch

from pocketlm.data.loader import Batch
from pocketlm.evaluate.perplexity import Evaluation, evaluate
from pocketlm.generate.text import complete
from pocketlm.train import checkpoint
from pocketlm.train.events import End, Message, Record, Sample, Start, Step, Validation
from pocketlm.train.report import write_report
from pocketlm.train.schedule import lr_factor
from pocketlm.train.setup import Session, versions
from pocketlm.train.state import TrainState


def train(session: Session) -> End:
    """Run ``session`` to its last step, or to the end of the step in which the user interrupts."""
    config, state, clock = session.config, session.state, Clock(session.began)
    progress, total = state.progress, session.total_steps
    tell(session, start_record(session))
    batches = session.loader.batches(progress.position)
    evaluation: Evaluation | None = None
    with StopSignal() as stop:
        clock.lap("startup")
        while progress.step < total and not stop.requested:
            window = list(islice(batches, config.training.grad_accum))
            lr = config.optimizer.lr * lr_factor(progress.step, total, config.schedule)
            state.optimizers.set_lr(lr)
            loss, grad_norm = train_step(state, [batch for batch, _ in window], config.optimizer.grad_clip)

            seconds = clock.lap("training")
            tokens = sum(batch.n_targets for batch, _ in window)
            progress.step += 1
            progress.tokens += tokens
            progress.seconds += seconds
            progress.position = window[-1][1]
            tell(session, step_record(session, loss, lr, grad_norm, tokens / seconds))
            clock.lap("reporting")

            last = progress.step == total
            due_validation = last or _due(progress.step, config.evaluation.every)
            if due_validation:
                evaluation = validate(session)
                clock.lap("evaluation")
            if last or _due(progress.step, config.training.save_every) or progress.best_step == progress.step:
                checkpoint.save(state, session.run.checkpoints, keep_last=config.training.keep_last)
                clock.lap("saving")
            if _due(progress.step, config.sampling.every) or (last and config.sampling.every):
                sample(session)
                clock.lap("sampling")

        if progress.step < total:
            checkpoint.save(state, session.run.checkpoints, keep_last=config.training.keep_last)
            clock.lap("saving")
    return finish(session, clock, evaluation)


def train_step(state: TrainState, window: Sequence[Batch], grad_clip: float) -> tuple[float, float]:
    """One optimiser step over the micro-batches of ``window``: (mean loss in nats a token, gradient norm).

    The loss is summed over the targets and divided once by their number in the whole window, so the gradient
    is that of one large batch whatever the micro-batches' lengths and padding.
    """
    model, optimizers, scaler = state.model, state.optimizers, state.scaler
    n_targets = sum(batch.n_targets for batch in window)
    device = next(model.parameters()).device
    model.train()
    total = torch.zeros((), device=device)
    for batch in window:
        batch = batch.to(device)
        loss = model.loss(batch.inputs, batch.targets, document_ids=batch.document_ids) / n_targets
        torch.autograd.backward(scaler.scale(loss))
        total += loss.detach()
    for optimizer in optimizers.parts:
        scaler.unscale_(optimizer)
    grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip or math.inf)
    for optimizer in optimizers.parts:
        scaler.step(optimizer)
    scaler.update()
    optimizers.zero_grad()
    return float(total), float(grad_norm)


def validate(session: Session) -> Evaluation:
    """Score the whole held-out split, and note whether it is the best so far."""
    progress = session.state.progress
    result = score(session, "validation")
    progress.validated_step, progress.validation_loss = progress.step, result.loss
    best = math.isfinite(result.loss) and (progress.best_loss is None or result.loss < progress.best_loss)
    if best:
        progress.best_loss, progress.best_step = result.loss, progress.step
    record = Validation(
        progress.step, progress.tokens, progress.seconds, result.loss, result.perplexity, result.bits_per_byte, best
    )
    tell(session, record)
    return result


def score(session: Session, split: str) -> Evaluation:
    """Evaluate the model as it is now by the run's protocol."""
    config = session.config
    return evaluate(
        session.state.model,
        session.cache.splits[split],
        name=split,
        context=config.context,
        stride=config.evaluation.stride or config.context,
        batch_size=config.evaluation.batch_size or 2 * config.training.batch_size,
        within_documents=config.data.mode != "stream",
        device=session.runtime.device,
    )


def sample(session: Session) -> None:
    """Complete the configured prompts. Uses a generator of its own, so training does not notice."""
    config, state = session.config.sampling, session.state
    # Compiled blocks would be compiled again for every length.
    compiled = session.config.training.compile
    with torch.compiler.set_stance("force_eager") if compiled else nullcontext():
        for prompt in config.prompts:
            pieces = complete(
                state.model,
                session.tokenizer,
                prompt,
                max_tokens=config.max_tokens,
                temperature=config.temperature,
                top_k=config.top_k,
                seed=config.seed,
            )
            tell(session, Sample(state.progress.step, prompt, "".join(pieces)))


def finish(session: Session, clock: Clock, evaluation: Evaluation | None) -> End:
    """Write the final numbers and the report, and say goodbye."""
    progress, run = session.state.progress, session.run
    finished = progress.step == session.total_steps
    if not finished:
        text = f"stopped after step {progress.step} and saved; go on with: pocketlm train --resume {run.folder}"
        tell(session, Message(progress.step, text))
    summary = summarize(session, clock, evaluation)
    checkpoint.write_atomically(run.summary_path, json.dumps(summary, indent=2))
    end = End(progress.step, finished, summary)
    tell(session, end)
    write_report(run.folder)
    return end


def summarize(session: Session, clock: Clock, evaluation: Evaluation | None) -> dict[str, Any]:
    """The final numbers of a run."""
    state, progress = session.state, session.state.progress
    return {
        "name": session.run.name,
        "folder": str(session.run.folder),
        "finished": progress.step == session.total_steps,
        "step": progress.step,
        "total_steps": session.total_steps,
        "parameters": state.model.num_parameters(),
        "corpus": session.corpus.description,
        "tokenizer": session.tokenizer.name,
        "vocab_size": session.tokenizer.vocab_size,
        "tokens": progress.tokens,
        "useful_share": session.loader.useful_share(),
        "best_loss": progress.best_loss,
        "best_step": progress.best_step,
        "validation_loss": progress.validation_loss,
        "validation": evaluation.to_dict() if evaluation else None,
        "tokens_per_second": progress.tokens / progress.seconds if progress.seconds else None,
        "wall_seconds": clock.total(),
        "seconds": clock.seconds,
        "peak_memory_bytes": session.runtime.peak_memory(),
        "device": session.runtime.describe(),
        "precision": session.runtime.precision,
        "versions": versions(),
        "command": session.command,
        "prompt": next(filter(None, session.config.sampling.prompts), None),
    }


def start_record(session: Session) -> Start:
    """The run's facts, told once."""
    model, progress = session.state.model, session.state.progress
    return Start(
        name=session.run.name,
        folder=str(session.run.folder),
        step=progress.step,
        total_steps=session.total_steps,
        parameters=model.num_parameters(),
        facts=session.facts(),
    )


def step_record(session: Session, loss: float, lr: float, grad_norm: float, tokens_per_second: float) -> Step:
    """The step just done."""
    progress = session.state.progress
    per_epoch = session.loader.batches_in_epoch(progress.position.epoch)
    return Step(
        step=progress.step,
        tokens=progress.tokens,
        epoch=progress.position.epoch + progress.position.index / per_epoch,
        loss=loss,
        lr=lr,
        grad_norm=grad_norm,
        tokens_per_second=tokens_per_second,
        memory_bytes=session.runtime.peak_memory(),
        seconds=progress.seconds,
    )


def tell(session: Session, record: Record) -> None:
    """Hand a record to every observer."""
    hook = {
        Start: "on_start",
        Step: "on_step",
        Validation: "on_validation",
        Sample: "on_sample",
        Message: "on_message",
        End: "on_end",
    }[type(record)]
    for observer in session.observers:
        getattr(observer, hook)(record)


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


class Clock:
    """Where wall-clock time goes: each lap books the time since the last one."""

    def __init__(self, began: float) -> None:
        self.began = self.last = began
        self.seconds: dict[str, float] = {}

    def lap(self, name: str) -> float:
        """Book the time since the last lap under ``name``; returns it."""
        now = time.perf_counter()
        passed, self.last = now - self.last, now
        self.seconds[name] = self.seconds.get(name, 0.0) + passed
        return passed

    def total(self) -> float:
        """Seconds since the beginning."""
        return time.perf_counter() - self.began


class StopSignal:
    """Ctrl-C and SIGTERM ask for a stop after the current step; a second Ctrl-C quits at once."""

    def __init__(self) -> None:
        self.requested = False

    def __enter__(self) -> StopSignal:
        self._previous = {number: signal.signal(number, self._on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
