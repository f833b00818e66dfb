"""When a checkpoint is written, by whom, and which ones stay.

What belongs here: the background writer, what happens when it fails, and retention. Imports ``errors``,
``train.checkpoint``, ``train.state``.

Design: training stands still for one copy into host memory, into buffers that are kept from one save to the next; a
thread writes the copy (the file calls and sha256 release Python's lock). At most one write is under way. A write that
fails is reported and training goes on, for a full disk may be emptied again; after ``PATIENCE`` failures in a row the
run stops, because from then on it works for nothing. Older checkpoints go only after a newer one is on the disk.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from torch import Tensor

from pocketlm.errors import RunError
from pocketlm.train import checkpoint
from pocketlm.train.checkpoint import Snapshot
from pocketlm.train.state import TrainState

PATIENCE = 3
"""Failed writes in a row after which a run stops."""
SPARE = 1.5
"""Free memory wanted for the copy, as a multiple of its size."""


@dataclass(frozen=True)
class Retention:
    """Which checkpoints stay, besides the best by validation."""

    last: int
    every: int | None = None


class Saver:
    """Writes the checkpoints of one run. ``report`` takes sentences for people, always in the training thread."""

    def __init__(
        self,
        folder: Path,
        run_id: str,
        retention: Retention,
        *,
        background: bool,
        report: Callable[[str], None],
        resumed_from: int | None = None,
    ) -> None:
        self.folder = folder
        self.run_id = run_id
        self.retention = retention
        self.background = background
        self.report = report
        self.saved_step = resumed_from
        """Step of the newest checkpoint on the disk or on its way there."""
        self._resumed_from = resumed_from
        self._buffers: dict[tuple[str, str], Tensor] = {}
        self._thread: threading.Thread | None = None
        self._problems: list[str] = []
        self._failures = 0

    def save(self, state: TrainState) -> None:
        """Take a copy of ``state`` and have it written. Raises RunError after too many failures."""
        self.wait()
        live = checkpoint.tensors_of(state)
        background = self.background and self._has_memory(live)
        snapshot = Snapshot(state.progress.step, self._copy(live) if background else _on_cpu(live), state.values())
        best_step, self.saved_step = state.progress.best_step, state.progress.step
        if background:
            self._thread = threading.Thread(
                target=self._write, args=(snapshot, best_step), daemon=True, name="checkpoint"
            )
            self._thread.start()
        else:
            self._write(snapshot, best_step)
            self.wait()

    def poll(self) -> None:
        """Say what a finished write has to say. Raises RunError after too many failures."""
        if self._thread is None or not self._thread.is_alive():
            self.wait()

    def wait(self) -> None:
        """Until the write under way is done. Raises RunError after too many failures."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        problems, self._problems = self._problems, []
        for problem in problems:
            self.report(problem)
        if self._failures >= PATIENCE:
            raise RunError(
                f"{self._failures} checkpoints in a row could not be written, so the run stops: {self._safe()}"
            )

    def finish(self, state: TrainState) -> None:
        """See to it that ``state`` is on the disk. Raises RunError when it is not."""
        self.wait()
        if self.saved_step != state.progress.step:
            self.save(state)
            self.wait()
        if self._failures:
            raise RunError(f"step {state.progress.step} could not be saved: {self._safe()}")
        self._rotate(state.progress.step, state.progress.best_step)
        self.wait()

    def _write(self, snapshot: Snapshot, best_step: int | None) -> None:
        """In the background: the write, then the removal of what need not stay. Never raises."""
        try:
            checkpoint.write(snapshot, self.folder, self.run_id)
        except Exception as e:  # whatever it is, it must not be lost with the thread
            self._failures += 1
            self.saved_step = None
            reason = e.strerror if isinstance(e, OSError) and e.strerror else f"{type(e).__name__}: {e}"
            self._problems.append(
                f"the checkpoint of step {snapshot.step} could not be written to '{self.folder}' ({reason}); training "
                "goes on and tries again at the next save"
            )
            return
        self._failures = 0
        self._rotate(snapshot.step, best_step)

    def _rotate(self, newest: int, best_step: int | None) -> None:
        found = [c for c in checkpoint.find(self.folder) if c.step <= newest]
        kept = {c.step for c in found[: self.retention.last]} | {newest, best_step, self._resumed_from}
        every = self.retention.every
        for old in found:
            if old.step not in kept and not (every and old.step % every == 0):
                try:
                    checkpoint.remove(old.folder)
                except OSError as e:
                    self._problems.append(f"the old checkpoint '{old.folder}' could not be deleted: {e.strerror or e}")

    def _copy(self, live: dict[str, dict[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
        """Into buffers of our own, which the next save uses again."""
        copied: dict[str, dict[str, Tensor]] = {}
        for file, tensors in live.items():
            for name, tensor in tensors.items():
                buffer = self._buffers.get((file, name))
                if buffer is None:
                    pinned = tensor.device.type == "cuda"
                    buffer = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=pinned)
                    self._buffers[file, name] = buffer
                buffer.copy_(tensor.detach(), non_blocking=True)
                copied.setdefault(file, {})[name] = buffer
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return copied

    def _has_memory(self, live: dict[str, dict[str, Tensor]]) -> bool:
        if self._buffers:
            return True
        size = sum(t.numel() * t.element_size() for tensors in live.values() for t in tensors.values())
        if psutil.virtual_memory().available >= SPARE * size:
            return True
        self.report(f"too little memory for a copy of the state ({size / 1e9:.1f} GB): checkpoints are written in line")
        self.background = False
        return False

    def _safe(self) -> str:
        found = checkpoint.find(self.folder)
        last = f"the last good checkpoint is '{found[0].folder}'" if found else "no checkpoint is left"
        return (
            f"{last}; make room or give the folder back, then go on with: pocketlm train --resume {self.folder.parent}"
        )


def _on_cpu(live: dict[str, dict[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
    return {file: {name: t.detach().cpu() for name, t in tensors.items()} for file, tensors in live.items()}
