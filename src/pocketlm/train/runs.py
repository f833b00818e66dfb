"""A run's folder: what lies where, how one is made and found.

What belongs here: paths and their meaning. Imports ``errors``, ``files``, ``config``, ``tokenizers``,
``train.checkpoint``.

::

    runs/demo-20261120-221500/
        config.yaml        the effective configuration; enough to repeat the run
        run.json           the run's own number, the fingerprint of its text, the run it continues
        tokenizer/         tokenizer.json and friends
        checkpoints/       the best and the last
        logs/              train.log, metrics.jsonl, tensorboard/
        summary.json       final numbers
        report.html        curves, samples, numbers; opens without a network
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from pocketlm.config import Config, file_layer, load_config
from pocketlm.errors import RunError
from pocketlm.files import PICKLE_ADVICE, foreign_owner, is_pickle
from pocketlm.tokenizers import Tokenizer
from pocketlm.train import checkpoint
from pocketlm.train.checkpoint import Checkpoint

RUNS = Path("runs")


@dataclass(frozen=True)
class Run:
    """A run folder."""

    folder: Path

    @property
    def name(self) -> str:
        """The folder's own name."""
        return self.folder.resolve().name

    @property
    def config_path(self) -> Path:
        """The effective configuration."""
        return self.folder / "config.yaml"

    @property
    def tokenizer_folder(self) -> Path:
        """The tokenizer that the model was trained with."""
        return self.folder / "tokenizer"

    @property
    def checkpoints(self) -> Path:
        """One folder a checkpoint."""
        return self.folder / "checkpoints"

    @property
    def logs(self) -> Path:
        """train.log, metrics.jsonl, tensorboard/."""
        return self.folder / "logs"

    @property
    def identity_path(self) -> Path:
        """The run's own number, and the fingerprints of its texts."""
        return self.folder / "run.json"

    @property
    def summary_path(self) -> Path:
        """Final numbers."""
        return self.folder / "summary.json"

    def config(self) -> Config:
        """The effective configuration. Raises ConfigError."""
        return load_config(file_layer(self.config_path))

    def lock(self) -> FileLock:
        """Claim the folder, which exists. Raises RunError when another process or another user has it."""
        if owner := foreign_owner(self.folder):
            raise RunError(
                f"the run's folder '{self.folder}' belongs to {owner}, who may change what is in it: copy it to "
                f"a folder "
                "of your own and train there"
            )
        lock = FileLock(self.folder / ".lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise RunError(
                f"the run '{self.folder}' is being trained by another process: wait for it, stop it, or name "
                f"another folder"
            ) from None
        except (OSError, NotImplementedError) as e:
            raise RunError(f"the run's folder '{self.folder}' cannot be written: {e}") from None
        return lock

    def tokenizer(self) -> Tokenizer:
        """The run's tokenizer. Raises TokenizerError."""
        return Tokenizer.from_folder(self.tokenizer_folder)

    def checkpoint(self, which: str = "best") -> Checkpoint:
        """``best`` (by validation loss), ``last`` or a step's number. Raises RunError."""
        found = checkpoint.find(self.checkpoints)
        if not found:
            raise RunError(f"the run '{self.folder}' has no checkpoint yet")
        if which == "best":
            return checkpoint.best(self.checkpoints)
        if which == "last":
            return found[0]
        for candidate in found:
            if which.isdigit() and candidate.step == int(which):
                return candidate
        steps = ", ".join(str(c.step) for c in found)
        raise RunError(f"the run '{self.folder}' has no checkpoint '{which}': use best, last or a step of {steps}")


def find_run(name: str, root: Path = RUNS) -> Run:
    """A run by its folder, its name under ``root``, or ``latest``. Raises RunError."""
    if name == "latest":
        mine = (path for path in root.glob("*/config.yaml") if not foreign_owner(path.parent))
        found = sorted(mine, key=lambda path: path.stat().st_mtime_ns)
        if not found:
            raise RunError(f"there is no run in '{root}' yet: train one with 'pocketlm train'")
        return Run(found[-1].parent)
    if is_pickle(Path(name)):
        raise RunError(f"'{name}' {PICKLE_ADVICE}")
    for folder in (Path(name), root / name):
        if (folder / "config.yaml").is_file():
            return Run(folder)
    if Path(name).is_file():
        raise RunError(f"'{name}' is a file, not a run: name the run's folder")
    if Path(name).is_dir():
        raise RunError(f"'{name}' is a folder but not a run: it has no config.yaml")
    known = ", ".join(sorted(path.parent.name for path in root.glob("*/config.yaml"))[-5:])
    raise RunError(f"there is no run '{name}'" + (f"; newest runs in '{root}': {known}" if known else ""))


def new_run(name: str, root: Path = RUNS) -> Run:
    """A folder for a new run, named after ``name`` and the time; not created yet."""
    stem = f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
    folder = root / stem
    number = 2
    while folder.exists():
        folder = root / f"{stem}-{number}"
        number += 1
    return Run(folder)
