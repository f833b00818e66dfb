"""Device and precision, decided once and passed down.

What belongs here: finding out what this machine can do. Imports ``errors``, ``config``.

Design: whether bf16 is fast is measured, not looked up: one matrix product in each precision, a few
milliseconds. Processors without bf16 instructions emulate it (slower than fp32), those with them
are 4-8 times faster than fp32, so the answer is never close.
"""

from __future__ import annotations

import ctypes
import sys
import time
from dataclasses import dataclass

import psutil
import torch

from pocketlm.config import TrainingConfig
from pocketlm.errors import ConfigError

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # from malloc.h
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Runtime:
    """Where and in which precision a model computes."""

    device: torch.device
    precision: str
    """fp32, bf16 or fp16."""

    @property
    def dtype(self) -> torch.dtype:
        """Compute dtype of matrix products."""
        return DTYPES[self.precision]

    @property
    def loss_scaling(self) -> bool:
        """Whether gradients need scaling to survive the range of fp16."""
        return self.precision == "fp16"

    def synchronize(self) -> None:
        """Wait for queued work, so that a clock read next is true."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        elif self.device.type == "mps":
            torch.mps.synchronize()

    def peak_memory(self) -> int:
        """Bytes: CUDA's peak of allocated memory, MPS's current allocation, or the process's peak resident set."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        if self.device.type == "mps":
            return torch.mps.current_allocated_memory()
        return peak_resident_bytes()

    def describe(self) -> str:
        """Device and precision in words."""
        if self.device.type == "cuda":
            return f"{torch.cuda.get_device_name(self.device)}, {self.precision}"
        if self.device.type == "mps":
            return f"Apple GPU (MPS), {self.precision}"
        return f"CPU, {torch.get_num_threads()} threads, {self.precision}"


def peak_resident_bytes() -> int:
    """Largest resident set of this process so far, in bytes (the current one where the system keeps no peak)."""
    if sys.platform.startswith(("linux", "darwin")):
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return int(peak) * (1 if sys.platform == "darwin" else 1024)
    info = psutil.Process().memory_info()
    return int(getattr(info, "peak_wset", info.rss))


def decide(config: TrainingConfig) -> Runtime:
    """The device and precision of a run. Raises ConfigError when what was asked for is not there."""
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    device = _device(config.device)
    if device.type == "cpu":
        _keep_freed_memory()
    precision = _best_precision(device) if config.precision == "auto" else config.precision
    if precision == "bf16" and device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        raise ConfigError(
            f"training.precision is bf16, which {torch.cuda.get_device_name(device)} only emulates: use fp16 or auto"
        )
    return Runtime(device, precision)


def _keep_freed_memory() -> None:
    """Ask glibc to reuse large freed blocks instead of returning them to the system.

    Activations are freed and allocated again in every step; handing out zeroed pages each time is 5 to 12% of
    a small model's step (shakespeare-char, three pairs of runs). A hint: elsewhere it does nothing.
    """
    if sys.platform.startswith("linux"):
        try:
            mallopt = ctypes.CDLL(None).mallopt
        except (OSError, AttributeError):
            return
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def _device(name: str) -> torch.device:
    has_mps = torch.backends.mps.is_available()
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if has_mps else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("training.device is cuda, but torch sees no CUDA device: use auto or cpu")
    if name == "mps" and not has_mps:
        raise ConfigError("training.device is mps, but torch sees no Apple GPU: use auto or cpu")
    return torch.device("cuda", 0) if name == "cuda" else torch.device(name)


def _best_precision(device: torch.device) -> str:
    if device.type == "cuda":
        return "bf16" if torch.cuda.get_device_capability(device) >= (8, 0) else "fp16"
    if device.type == "mps":
        return "fp32"
    return "bf16" if _product_seconds(torch.bfloat16) * 1.5 < _product_seconds(torch.float32) else "fp32"


def _product_seconds(dtype: torch.dtype, size: int = 512) -> float:
    """Best of five (size x size) products on the CPU. Draws nothing from the random generator."""
    a = torch.full((size, size), 0.5, dtype=dtype)
    best = float("inf")
    for _ in range(5):
        begin = time.perf_counter()
        a @ a
        best = min(best, time.perf_counter() - begin)
    return best
