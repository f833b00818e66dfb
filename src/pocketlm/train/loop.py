"""The training loop: read it top to bottom.

What belongs here: the algorithm, and the moments at which something else is due. How a batch is made, a gradient
judged, a checkpoint written or a number shown lives in the rooms it calls.

Design: between two steps the order is always the same: save, then validate, then sample. So a checkpoint is the
state right after its step; whatever fails afterwards costs nothing, and whoever resumes does it again. Evaluating,
sampling and saving stand outside the clock that gives tokens a second.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch

from pocketlm.data.loader import Batch, Position
from pocketlm.errors import PocketError, RunError
from pocketlm.evaluate.perplexity import Evaluation
from pocketlm.train import safety
from pocketlm.train.between import end_record, finish, sample, start_record, step_record, validate
from pocketlm.train.events import End
from pocketlm.train.events import Phase as PhaseRecord
from pocketlm.train.phases import Phase
from pocketlm.train.setup import Session
from pocketlm.train.state import TrainState

OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory")

Windows = Iterator[tuple[list[Batch], int, Position]]


def train(session: Session) -> End:
    """Run ``session`` to its last step, or to the end of the step in which the user interrupts.

    Raises RunError when training has diverged or cannot be saved any more; the session is closed in every case.
    """
    state, saver, clock, stop = session.state, session.saver, session.clock, session.stop
    progress = state.progress
    evaluation: Evaluation | None = None
    phase: Phase | None = None
    windows: Windows = iter(())
    try:
        session.tell(start_record(session))
        for note in list(session.notes):
            session.say(note)
        with stop:
            clock.lap("startup")
            if progress.step:  # what was due after the step of the checkpoint is done again
                evaluation = between(session, resumed=True)
            while progress.step < session.total_steps and not stop.requested and not _stops_early(session):
                if phase is None or progress.step == phase.end:
                    phase = enter(session, phase)
                    windows = phase.loader.windows(progress.position, phase.config.training.grad_accum)
                batches, n_targets, position = next(windows)
                lr = phase.lr(progress.step)
                state.optimizers.configure(phase.config.optimizer, lr)
                loss, grad_norm = gradients(session, batches, n_targets, phase.config.optimizer.grad_clip)
                verdict = safety.judge(
                    progress, loss, grad_norm, session.config.safety, scaling=state.scaler.is_enabled()
                )
                update(state, allowed=verdict.update)

                seconds = clock.lap("training")
                progress.step += 1
                progress.tokens += n_targets
                progress.seconds += seconds
                progress.position = position
                if verdict.finite:
                    progress.nats += loss * n_targets
                    progress.nats_tokens += n_targets
                session.tell(step_record(session, loss, lr, grad_norm, n_targets / seconds))
                if verdict.message:
                    session.say(verdict.message)
                if progress.skipped_in_row >= session.config.safety.max_skipped:
                    raise safety.diverged(state, batches, lr, session.runtime.precision, session.run.logs)
                clock.lap("reporting")
                evaluation = between(session) or evaluation
            if saver.saved_step != progress.step:
                save(session)
            saver.finish(state)
            clock.lap("saving")
            return finish(session, evaluation, stopped_early=_stops_early(session))
    except PocketError as e:
        session.tell(end_record(session, None, finished=False, reason=str(e)))
        raise
    finally:
        session.close()


def enter(session: Session, before: Phase | None) -> Phase:
    """The phase of the next step; where it is a new one, its text and what was learned of the old one's."""
    progress = session.state.progress
    phase = session.phase_of(progress.step)
    if progress.step == phase.first and phase.number > 1:
        before = before or session.phases[phase.number - 2]
        progress.position = phase.begin(before, progress.position)
        if not phase.has_text_of(before):
            progress.best_loss = progress.best_step = None
            progress.history = []
        settings = phase.config.optimizer
        description = phase.corpus.description
        record = PhaseRecord(progress.step, phase.number, phase.steps, settings.lr, settings.weight_decay, description)
        session.tell(record)
    return phase


def between(session: Session, resumed: bool = False) -> Evaluation | None:
    """What is due between two steps: save, then validate, then sample."""
    config, step, clock = session.config, session.state.progress.step, session.clock
    last = step == session.total_steps
    begins = resumed and session.continued
    validates = last or begins or _due(step, config.evaluation.every)
    samples = _due(step, config.sampling.every) or (last and config.sampling.every > 0)
    if (validates or samples or _due(step, config.training.save_every)) and session.saver.saved_step != step:
        save(session)
    if validates or samples:
        session.saver.wait()
    else:
        session.saver.poll()
    clock.lap("saving")
    evaluation = None
    if validates:
        evaluation = validate(session)
        clock.lap("evaluation")
    if samples:
        sample(session)
        clock.lap("sampling")
    return evaluation


def save(session: Session) -> None:
    """Copy the state and have it written, the observers' part and the time so far with it."""
    state = session.state
    state.watching = {type(o).__name__: kept for o in session.observers if (kept := o.state())}
    session.clock.lap("saving")
    state.progress.spent = dict(session.clock.seconds)
    session.saver.save(state)


def gradients(session: Session, window: Sequence[Batch], n_targets: int, grad_clip: float) -> tuple[float, float]:
    """Clipped gradients of one step: (mean loss in nats a token, gradient norm before clipping).

    Where memory does not suffice the micro-batches are cut in two, again and again down to single rows; the gradient is
    the same. Raises RunError when not even that helps.
    """
    progress = session.state.progress
    most = max(len(batch.inputs) for batch in window)
    while True:
        try:
            cut = [piece for batch in window for piece in batch.cut(progress.pieces)]
            return compute_gradients(session.state, cut, n_targets, grad_clip)
        except (RuntimeError, MemoryError) as e:
            if not is_out_of_memory(e):
                raise
            if progress.pieces >= most:
                raise RunError(
                    f"step {progress.step + 1} does not fit into memory, not even row by row: use a smaller "
                    "--training.window or model, or --training.gradient_checkpointing; go on from the last checkpoint "
                    f"with: pocketlm train --resume {session.run.folder}"
                ) from None
        session.state.optimizers.zero_grad()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        progress.pieces *= 2
        session.say(
            f"step {progress.step + 1} did not fit into memory: micro-batches are cut into {progress.pieces} "
            "pieces from here on, with the same result"
        )


def compute_gradients(
    state: TrainState, window: Sequence[Batch], n_targets: int, grad_clip: float
) -> tuple[float, float]:
    """Gradients over the micro-batches of ``window``, ``n_targets`` of all of a step: (mean loss, gradient norm).

    The loss is summed over the targets and divided once by their number in the whole window, so the gradient
    is that of one large batch whatever the micro-batches' lengths and padding.
    """
    model, scaler = state.model, state.scaler
    device = next(model.parameters()).device
    model.train()
    total = torch.zeros((), device=device)
    for batch in window:
        batch = batch.to(device)
        loss = model.loss(batch.inputs, batch.targets, document_ids=batch.document_ids) / n_targets
        torch.autograd.backward(scaler.scale(loss))
        total += loss.detach()
    for optimizer in state.optimizers.parts:
        scaler.unscale_(optimizer)
    grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip or math.inf)
    return float(total), float(grad_norm)


def update(state: TrainState, *, allowed: bool) -> None:
    """Take the optimiser's step with the gradients, or leave it out; forget them either way."""
    if allowed:
        for optimizer in state.optimizers.parts:
            state.scaler.step(optimizer)
        if state.average is not None:
            state.average.update(state.model, state.progress.step + 1)
    state.scaler.update()
    state.optimizers.zero_grad()


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocator gave up; torch's CPU allocator says so in words only."""
    named = isinstance(error, MemoryError | torch.OutOfMemoryError)
    return named or any(words in str(error).lower() for words in OUT_OF_MEMORY)


def _stops_early(session: Session) -> bool:
    return safety.should_stop_early(session.state.progress.history, session.config.safety.early_stop)


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
