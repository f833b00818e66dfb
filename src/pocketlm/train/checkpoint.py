"""Checkpoints: a ``TrainState`` on disk, complete or not there at all.

What belongs here: writing, verifying, finding and rotating checkpoint folders. Imports ``errors``, ``train.state``.

Design: a checkpoint is written into a folder with a temporary name, flushed to the disk, described by a
manifest with the size and sha256 of every file, flushed again and renamed. A reader verifies every byte: torch
and safetensors load a flipped bit without a word. Nothing is ever unpickled.

::

    checkpoints/step-00000500/
        model.safetensors       weights, fp32
        training.safetensors    optimiser state, random generators
        state.json              step, tokens, position in the data, best so far, loss scaler
        manifest.json           format version, size and sha256 of the others; written last
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save_file
from torch import Tensor

from pocketlm.errors import RunError
from pocketlm.train.state import TrainState

FORMAT = 1
WEIGHTS, TRAINING, STATE, MANIFEST = "model.safetensors", "training.safetensors", "state.json", "manifest.json"


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint folder that has its manifest."""

    folder: Path
    step: int

    def weights(self) -> dict[str, Tensor]:
        """Verified weights by name. Raises RunError when damaged."""
        return _tensors(self._verified(WEIGHTS), self.folder / WEIGHTS)

    def values(self) -> dict[str, Any]:
        """Verified ``state.json``. Raises RunError when damaged."""
        return _json(self._verified(STATE), self.folder / STATE)

    def restore(self, state: TrainState) -> None:
        """Put everything back into ``state``. Raises RunError when damaged or of another shape."""
        training = _tensors(self._verified(TRAINING), self.folder / TRAINING)
        try:
            state.restore(self.weights(), training, self.values())
        except (KeyError, TypeError, RuntimeError) as e:
            problem = " ".join(str(e).split())
            raise RunError(
                f"the checkpoint '{self.folder}' does not fit this run's model or optimiser: {problem}"
            ) from None

    def _verified(self, name: str) -> bytes:
        """A file's bytes, after they matched the manifest."""
        manifest = _json(_read(self.folder / MANIFEST), self.folder / MANIFEST)
        if manifest.get("format") != FORMAT:
            raise RunError(
                f"the checkpoint '{self.folder}' has format {manifest.get('format')!r}; "
                f"this pocketlm reads format {FORMAT}"
            )
        entry = manifest.get("files", {}).get(name)
        data = _read(self.folder / name)
        if not isinstance(entry, dict) or entry != _digest(data):
            raise RunError(
                f"the checkpoint file '{self.folder / name}' is damaged: its bytes are not those of the manifest"
            )
        return data


def save(state: TrainState, folder: Path, *, keep_last: int) -> Checkpoint:
    """Write ``state`` under ``folder`` (a run's checkpoints) and drop what need not be kept.

    Kept are the best by validation loss, and the newest ``keep_last``. Raises RunError when the disk refuses.
    """
    step = state.progress.step
    final = folder / f"step-{step:08d}"
    partial = folder / f"{final.name}.partial-{os.getpid()}"
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        _save_tensors(state.model.state_dict(), partial / WEIGHTS)
        _save_tensors(state.training_tensors(), partial / TRAINING)
        write_durably(partial / STATE, _dump(state.values()))
        files = {name: _digest((partial / name).read_bytes()) for name in (WEIGHTS, TRAINING, STATE)}
        write_durably(partial / MANIFEST, _dump({"format": FORMAT, "step": step, "files": files}))
        _flush_folder(partial)
        if final.exists():
            shutil.rmtree(final)
        partial.rename(final)
        _flush_folder(folder)
    except OSError as e:
        shutil.rmtree(partial, ignore_errors=True)
        raise RunError(f"the checkpoint of step {step} could not be written to '{folder}': {e}") from None
    _rotate(folder, keep_last, state.progress.best_step)
    return Checkpoint(final, step)


def find(folder: Path) -> list[Checkpoint]:
    """Complete checkpoints under ``folder``, newest first. Unfinished ones have no manifest under a final name."""
    found = []
    for path in folder.glob("step-*"):
        digits = path.name.removeprefix("step-")
        if digits.isdigit() and (path / MANIFEST).is_file():
            found.append(Checkpoint(path, int(digits)))
    return sorted(found, key=lambda c: c.step, reverse=True)


def best(checkpoints: list[Checkpoint]) -> Checkpoint:
    """The checkpoint with the lowest validation loss; the newest where none was validated."""

    def loss(checkpoint: Checkpoint) -> float:
        progress = checkpoint.values()["progress"]
        validated = progress["validated_step"] == checkpoint.step
        return float(progress["validation_loss"]) if validated else float("inf")

    return min(checkpoints, key=lambda c: (loss(c), -c.step))


def write_durably(path: Path, data: bytes) -> None:
    """Write a file and flush it to the disk."""
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def write_atomically(path: Path, text: str) -> None:
    """Replace a text file in one step: a reader sees the old one or the new one."""
    partial = path.with_name(f"{path.name}.partial-{os.getpid()}")
    write_durably(partial, text.encode())
    partial.replace(path)


def _rotate(folder: Path, keep_last: int, best_step: int | None) -> None:
    for checkpoint in find(folder)[keep_last:]:
        if checkpoint.step != best_step:
            shutil.rmtree(checkpoint.folder, ignore_errors=True)


def _save_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, path)
    # safetensors neither flushes nor respects the umask (it leaves mode 0600).
    umask = os.umask(0)
    os.umask(umask)
    path.chmod(0o666 & ~umask)
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _flush_folder(folder: Path) -> None:
    """Make names durable; Windows has no such call and needs none."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _digest(data: bytes) -> dict[str, Any]:
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def _dump(values: Mapping[str, Any]) -> bytes:
    return json.dumps(values, indent=2).encode()


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as e:
        raise RunError(f"the checkpoint file '{path}' cannot be read: {e.strerror or e}") from None


def _json(data: bytes, path: Path) -> dict[str, Any]:
    try:
        values = json.loads(data)
    except (ValueError, RecursionError):
        raise RunError(f"the checkpoint file '{path}' is damaged: it is not JSON") from None
    if not isinstance(values, dict):
        raise RunError(f"the checkpoint file '{path}' is damaged: it holds no mapping")
    return values


def _tensors(data: bytes, path: Path) -> dict[str, Tensor]:
    try:
        return dict(load(data))
    except (SafetensorError, ValueError) as e:
        raise RunError(f"the checkpoint file '{path}' is damaged: {e}") from None
