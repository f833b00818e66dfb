"""Checkpoints: a ``TrainState`` on disk, complete or not there at all.

What belongs here: writing, verifying and finding checkpoint folders. When to write, in which thread and what to
keep is ``train.saver``'s. Imports ``errors``, ``files``, ``train.state``.

Design: a checkpoint is written into a folder with a temporary name, flushed to the disk, described by a
manifest with the size and sha256 of every file, flushed again and renamed. A reader verifies every byte: torch
and safetensors load a flipped bit without a word. Nothing is ever unpickled.

::

    checkpoints/best.json           step and loss of the best by validation
    checkpoints/step-00000500/
        model.safetensors           weights, fp32
        average.safetensors         their moving average, where training.ema is on
        training.safetensors        optimiser state, random generators
        state.json                  step, tokens, position in the data, best so far, loss scaler, open metrics
        manifest.json               format version, run, step, size and sha256 of the others; written last
"""

from __future__ import annotations

import errno
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
from pocketlm.files import flush_folder, follow_umask, read_within, write_atomically, write_durably
from pocketlm.train.state import TrainState

FORMAT = 2
WEIGHTS, AVERAGE, TRAINING, STATE = "model.safetensors", "average.safetensors", "training.safetensors", "state.json"
MANIFEST, BEST = "manifest.json", "best.json"
ROOM = 1.1
"""Free space wanted before writing, as a multiple of what will be written."""


@dataclass(frozen=True)
class Snapshot:
    """A state at one step, in host memory."""

    step: int
    tensors: dict[str, dict[str, Tensor]]
    """File name -> tensors on the CPU."""
    values: dict[str, Any]

    @property
    def n_bytes(self) -> int:
        """Size of the tensors."""
        return sum(t.numel() * t.element_size() for tensors in self.tensors.values() for t in tensors.values())


def tensors_of(state: TrainState) -> dict[str, dict[str, Tensor]]:
    """The live tensors of ``state`` by the file that holds them."""
    files = {WEIGHTS: dict(state.model.state_dict()), TRAINING: state.training_tensors()}
    if state.average is not None:
        files[AVERAGE] = dict(state.average.tensors)
    return files


# ---------------------------------------------------------------- reading


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint folder that has its manifest."""

    folder: Path
    step: int

    def weights(self) -> dict[str, Tensor]:
        """Verified weights by name, averaged where the run keeps an average. Raises RunError when damaged."""
        name = AVERAGE if AVERAGE in self.files() else WEIGHTS
        return _tensors(self._verified(name), self.folder / name)

    def values(self) -> dict[str, Any]:
        """Verified ``state.json``. Raises RunError when damaged."""
        return _json(self._verified(STATE), self.folder / STATE)

    def run_id(self) -> str:
        """The run that wrote it. Raises RunError when damaged."""
        return str(self._manifest().get("run"))

    def files(self) -> dict[str, Any]:
        """What the manifest says of each file. Raises RunError when damaged."""
        files = self._manifest().get("files")
        if not isinstance(files, dict):
            raise RunError(f"the checkpoint file '{self.folder / MANIFEST}' is damaged: it lists no files")
        return files

    def restore(self, state: TrainState, *, run_id: str | None = None) -> None:
        """Put everything back into ``state``. Raises RunError when damaged, of another shape, or of another run."""
        manifest = self._manifest()
        if manifest["format"] != FORMAT:
            raise RunError(
                f"the checkpoint '{self.folder}' has format {manifest['format']}, which lacks the state of the metrics "
                "and was saved at another moment of the step: its weights can be used, and --init-from starts a new "
                "run from them, but only the pocketlm that wrote it can go on with it"
            )
        if run_id is not None and manifest.get("run") != run_id:
            raise RunError(f"the checkpoint '{self.folder}' belongs to another run")
        names = [WEIGHTS, TRAINING, *([AVERAGE] if AVERAGE in self.files() else [])]
        tensors = {name: _tensors(self._verified(name), self.folder / name) for name in names}
        try:
            state.restore(tensors[WEIGHTS], tensors[TRAINING], tensors.get(AVERAGE), self.values())
        except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as e:
            problem = " ".join(str(e).split())
            raise RunError(
                f"the checkpoint '{self.folder}' does not fit this run's model or optimiser: {problem}"
            ) from None

    def _manifest(self) -> dict[str, Any]:
        path = self.folder / MANIFEST
        manifest = _json(_read(path), path)
        if manifest.get("format") not in (1, FORMAT):
            raise RunError(
                f"the checkpoint '{self.folder}' has format {manifest.get('format')!r}; this pocketlm reads formats 1 "
                f"and {FORMAT}: update pocketlm"
            )
        if manifest.get("step") != self.step:
            raise RunError(f"the checkpoint file '{path}' is damaged: it describes step {manifest.get('step')!r:.40}")
        return manifest

    def _verified(self, name: str) -> bytes:
        """A file's bytes, after they matched the manifest."""
        entry, data = self.files().get(name), _read(self.folder / name)
        if entry != {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}:
            raise RunError(
                f"the checkpoint file '{self.folder / name}' is damaged: its bytes are not those of the manifest"
            )
        return data


def find(folder: Path) -> list[Checkpoint]:
    """Complete checkpoints under ``folder``, newest first. Unfinished ones have no manifest under a final name."""
    found = []
    for path in folder.glob("step-*"):
        digits = path.name.removeprefix("step-")
        if digits.isascii() and digits.isdigit() and (path / MANIFEST).is_file():
            found.append(Checkpoint(path, int(digits)))
    return sorted(found, key=lambda c: c.step, reverse=True)


def best(folder: Path) -> Checkpoint:
    """The checkpoint with the lowest validation loss; the newest where none was validated. Raises RunError."""
    found = find(folder)
    if not found:
        raise RunError(f"there is no checkpoint in '{folder}'")
    with_loss = _json(_read(folder / BEST), folder / BEST) if (folder / BEST).exists() else {}
    return next((c for c in found if c.step == with_loss.get("step")), found[0])


# ---------------------------------------------------------------- writing


def write(snapshot: Snapshot, folder: Path, run_id: str) -> Checkpoint:
    """Write ``snapshot`` under ``folder``, which exists. Raises OSError; then nothing of it is left behind."""
    final = folder / f"step-{snapshot.step:08d}"
    partial = folder / f"{final.name}.partial-{os.getpid()}"
    _expect_room(folder, snapshot.n_bytes)
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        for name, tensors in snapshot.tensors.items():
            _write_tensors(tensors, partial / name)
        write_durably(partial / STATE, _dump(snapshot.values))
        files = {name: _digest(partial / name) for name in (*snapshot.tensors, STATE)}
        manifest = {"format": FORMAT, "run": run_id, "step": snapshot.step, "files": files}
        write_durably(partial / MANIFEST, _dump(manifest))
        flush_folder(partial)
        if final.exists():
            remove(final)
        partial.rename(final)
        flush_folder(folder)
    except (OSError, SafetensorError) as e:
        shutil.rmtree(partial, ignore_errors=True)
        raise e if isinstance(e, OSError) else OSError(errno.EIO, str(e)) from None
    return Checkpoint(final, snapshot.step)


def note_best(folder: Path, step: int | None, loss: float | None) -> None:
    """Record which checkpoint is the best by validation; None: none yet. Raises OSError."""
    if step is None:
        (folder / BEST).unlink(missing_ok=True)
    else:
        write_atomically(folder / BEST, json.dumps({"step": step, "loss": loss}))


def set_aside(checkpoint: Checkpoint) -> Path:
    """Rename a checkpoint that cannot be used, so that it is kept and never counted again. Raises OSError."""
    place = checkpoint.folder.with_name(f"{checkpoint.folder.name}.unusable")
    if place.exists():
        remove(place)
    return checkpoint.folder.rename(place)


def remove(folder: Path) -> None:
    """Delete a checkpoint folder; a crash on the way leaves no half one under its name. Raises OSError."""
    doomed = folder.rename(folder.with_name(f"{folder.name}.removed-{os.getpid()}"))
    shutil.rmtree(doomed)


def sweep(folder: Path) -> None:
    """Delete what a killed writer left behind. Only for the process that holds the run's lock."""
    for pattern in ("*.partial-*", "*.removed-*"):
        for path in folder.glob(pattern):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def _expect_room(folder: Path, n_bytes: int) -> None:
    free, wanted = shutil.disk_usage(folder).free, int(ROOM * n_bytes)
    if free < wanted:
        raise OSError(errno.ENOSPC, f"{wanted / 1e6:,.1f} MB are wanted and {free / 1e6:,.1f} MB are free", str(folder))


def _write_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, path)
    # The library neither flushes nor lets others read the file, whatever the umask (safetensors 0.8).
    follow_umask(path)
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _digest(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(2**22):
            digest.update(block)
    return {"bytes": path.stat().st_size, "sha256": digest.hexdigest()}


def _dump(values: Mapping[str, Any]) -> bytes:
    return json.dumps(values, indent=2).encode()


def _read(path: Path) -> bytes:
    try:
        return read_within(path, path.parent)
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
    except (SafetensorError, ValueError, KeyError, TypeError) as e:
        raise RunError(f"the checkpoint file '{path}' is damaged: {e}") from None
