"""The command under test in a process of its own, with one thing in its world gone wrong.

    python child.py '{"fail": "evaluation", "error": "MemoryError"}' train book.txt --out run ...

Wrongs: ``fail`` (evaluation, sampling or writer) with ``error`` and ``times``; ``clock`` (time.time jumps);
``file_limit`` (bytes, as a full disk refuses them); ``stop_at`` (SIGTERM to itself while that step is under way).
"""

from __future__ import annotations

import errno
import json
import os
import random
import resource
import signal
import sys
import time


def error_of(name: str) -> Exception:
    import torch

    known = {
        "RuntimeError": RuntimeError("a defect somewhere"),
        "OutOfMemoryError": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB"),
        "MemoryError": MemoryError(),
        "ENOSPC": OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
    }
    return known[name]


def failing(real, error: Exception, times: int, applies=lambda *a: True):
    """``real``, but for the first ``times`` calls to which ``applies``."""
    left = [times]

    def call(*args, **kwargs):
        if left[0] and applies(*args):
            left[0] -= 1
            raise error
        return real(*args, **kwargs)

    return call


def fail(where: str, error: str, times: int) -> None:
    from pocketlm.generate import engine
    from pocketlm.model.transformer import Transformer
    from pocketlm.train import checkpoint

    if where == "evaluation":
        Transformer.loss = failing(Transformer.loss, error_of(error), times, lambda model, *a: not model.training)
    elif where == "sampling":
        engine.next_token = failing(engine.next_token, error_of(error), times)
    else:
        checkpoint.save_file = failing(checkpoint.save_file, error_of(error), times)


def jumping_clock() -> None:
    real, jumps = time.time, random.Random(0)
    time.time = lambda: real() + jumps.uniform(-1e7, 1e7)


def stop_at(step: int) -> None:
    from pocketlm.train.observers import MetricsFile

    real = MetricsFile.on_step

    def on_step(self, record) -> None:
        real(self, record)
        if record.step == step:
            os.kill(os.getpid(), signal.SIGTERM)

    MetricsFile.on_step = on_step


def main() -> int:
    wrong = json.loads(sys.argv[1])
    if wrong.get("clock"):
        jumping_clock()
    if "fail" in wrong:
        fail(wrong["fail"], wrong["error"], wrong.get("times", 10**9))
    if "stop_at" in wrong:
        stop_at(wrong["stop_at"])
    from pocketlm.cli import main as command

    if "file_limit" in wrong:
        resource.setrlimit(resource.RLIMIT_FSIZE, (wrong["file_limit"], wrong["file_limit"]))
    return command(sys.argv[2:])


if __name__ == "__main__":
    sys.exit(main())
