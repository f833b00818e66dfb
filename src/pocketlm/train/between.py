"""What stands between two steps and at the end: validating, sampling, the records and the final numbers.

What belongs here: work that looks at the model and changes nothing about training. Imports ``data``, ``evaluate``,
``generate`` and the rest of ``train`` but the loop.

Design: none of it may cost a run anything. Whatever goes wrong, memory included, becomes a sentence; a stop that is
asked for meanwhile ends it at once, because the checkpoint is already on the disk and a resume does it again.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch

from pocketlm.evaluate.perplexity import Evaluation, evaluate
from pocketlm.files import write_atomically
from pocketlm.generate.text import complete
from pocketlm.train import checkpoint, safety
from pocketlm.train.control import StopRequested
from pocketlm.train.events import End, Sample, Start, Step, Validation
from pocketlm.train.report import write_report
from pocketlm.train.setup import Session, versions


@contextmanager
def survived(session: Session, what: str) -> Iterator[None]:
    """Turn any exception of the work inside into a sentence; training goes on."""
    step = session.state.progress.step
    try:
        yield
    except StopRequested:
        session.left_undone = True
        session.say(f"{what} at step {step:,} is left for the resume")
    except Exception as e:
        problem = " ".join(str(e).split()) or "no reason given"
        session.say(
            f"{what} at step {step:,} failed ({type(e).__name__}: {problem:.300}); nothing is lost: the run "
            f"goes on, and the checkpoint of step {session.saver.saved_step} is safe"
        )


def validate(session: Session) -> Evaluation | None:
    """Score the whole held-out split, note whether it is the best so far and whether the model memorises."""
    progress = session.state.progress
    with survived(session, "validation"):
        result = score(session, "validation")
        progress.validated_step = progress.step
        progress.validation_loss = result.loss if math.isfinite(result.loss) else None
        best = math.isfinite(result.loss) and (progress.best_loss is None or result.loss < progress.best_loss)
        if best:
            progress.best_loss, progress.best_step = result.loss, progress.step
        train_loss = progress.nats / progress.nats_tokens if progress.nats_tokens else None
        progress.nats, progress.nats_tokens = 0.0, 0
        was_memorising = safety.memorising(progress.history)
        if math.isfinite(result.loss) and train_loss is not None:
            progress.history.append({"step": progress.step, "validation": result.loss, "train": train_loss})
        memorising = safety.memorising(progress.history)
        session.tell(
            Validation(
                progress.step, progress.tokens, progress.seconds, result.loss, result.perplexity,
                result.bits_per_byte, best, train_loss, memorising is not None,
            )
        )  # fmt: skip
        if memorising and not was_memorising:
            session.say(memorising)
        if best:
            checkpoint.note_best(session.run.checkpoints, progress.best_step, progress.best_loss)
        return result
    return None


def score(session: Session, split: str) -> Evaluation:
    """Evaluate the weights that are used by the protocol of the phase, in smaller batches where memory is short."""
    phase = session.phase
    config, state = phase.config, session.state
    batch_size = config.evaluation.batch_size or 2 * config.training.batch_size
    while True:
        try:
            with state.averaged():
                return evaluate(
                    state.model,
                    phase.cache.splits[split],
                    name=split,
                    context=config.context,
                    stride=config.evaluation.stride or config.context,
                    batch_size=batch_size,
                    within_documents=config.data.mode != "stream",
                    device=session.runtime.device,
                    check=session.stop.check,
                )
        except (torch.OutOfMemoryError, MemoryError):
            if batch_size == 1:
                raise
        batch_size //= 2
        session.say(f"validation did not fit into memory: tried again with {batch_size} windows at once")


def sample(session: Session) -> None:
    """Complete the configured prompts. Uses a generator of its own, so training does not notice."""
    config, state = session.config.sampling, session.state
    # Compiled blocks would be compiled again for every length.
    compiled = session.config.training.compile
    stance = torch.compiler.set_stance("force_eager") if compiled else nullcontext()
    with survived(session, "sampling"), stance, state.averaged():
        for prompt in config.prompts:
            pieces = []
            for piece in complete(
                state.model,
                session.tokenizer,
                prompt,
                max_tokens=config.max_tokens,
                temperature=config.temperature,
                top_k=config.top_k,
                seed=config.seed,
            ):
                session.stop.check()
                pieces.append(piece)
            session.tell(Sample(state.progress.step, prompt, "".join(pieces)))


# ---------------------------------------------------------------- records


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
    progress, phase = session.state.progress, session.phase
    per_epoch = phase.loader.batches_in_epoch(progress.position.epoch)
    return Step(
        step=progress.step,
        tokens=progress.tokens,
        epoch=progress.position.epoch + progress.position.index / per_epoch,
        loss=loss,
        lr=lr,
        weight_decay=phase.config.optimizer.weight_decay,
        grad_norm=grad_norm,
        tokens_per_second=tokens_per_second,
        memory_bytes=session.runtime.peak_memory(),
        seconds=progress.seconds,
        skipped=progress.skipped,
    )


def end_record(session: Session, evaluation: Evaluation | None, *, finished: bool, reason: str | None = None) -> End:
    """The final numbers of a run, or of a stretch of it."""
    return End(session.state.progress.step, finished, summarize(session, evaluation, finished), reason)


def finish(session: Session, evaluation: Evaluation | None, *, stopped_early: bool) -> End:
    """Write the final numbers and the report, and say goodbye."""
    progress, run = session.state.progress, session.run
    finished = (progress.step == session.total_steps or stopped_early) and not session.left_undone
    if finished and progress.step < session.total_steps:
        session.say(
            f"stopped early at step {progress.step:,}: {session.config.safety.early_stop} validations in a row "
            f"brought no new best after step {progress.best_step:,}"
        )
    elif not finished:
        session.say(f"stopped after step {progress.step} and saved; go on with: pocketlm train --resume {run.folder}")
    end = end_record(session, evaluation, finished=finished)
    with survived(session, "writing summary.json"):
        write_atomically(run.summary_path, json.dumps(end.summary, indent=2))
    session.tell(end)
    with survived(session, "writing the report"):
        write_report(run.folder)
    return end


def summarize(session: Session, evaluation: Evaluation | None, finished: bool) -> dict[str, Any]:
    """The final numbers, JSON-ready."""
    state, progress, clock = session.state, session.state.progress, session.clock
    return {
        "name": session.run.name,
        "folder": str(session.run.folder),
        "finished": finished,
        "step": progress.step,
        "total_steps": session.total_steps,
        "parameters": state.model.num_parameters(),
        "corpus": session.phase.corpus.description,
        "tokenizer": session.tokenizer.name,
        "vocab_size": session.tokenizer.vocab_size,
        "tokens": progress.tokens,
        "skipped_steps": progress.skipped,
        "useful_share": session.phase.loader.useful_share(),
        "best_loss": progress.best_loss,
        "best_step": progress.best_step,
        "validation_loss": progress.validation_loss,
        "validation": evaluation.to_dict() if evaluation else None,
        "memorising": safety.memorising(progress.history) is not None,
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
