"""Characters of Shakespeare against the clock: nanoGPT's CPU recipe and the shakespeare-char preset, in turn.

Run it on a quiet machine, from the repository:

    python benchmarks/shakespeare.py --shakespeare input.txt --nanogpt PATH --repeats 3

PATH is a checkout of karpathy/nanoGPT with its data prepared (python data/shakespeare_char/prepare.py). Each
process is timed whole, start-up included. nanoGPT's own figure is its last line "val loss" (20 random batches);
ours is the whole held-out tenth. Prints a table, and one JSON line for programs.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

NANOGPT = (
    "train.py config/train_shakespeare_char.py --device=cpu --compile=False --eval_iters=20 --log_interval=100 "
    "--block_size=64 --batch_size=12 --n_layer=4 --n_head=4 --n_embd=128 --max_iters=2000 --lr_decay_iters=2000 "
    "--dropout=0.0"
)


def timed(command: list[str], folder: Path) -> tuple[float, str]:
    begin = time.perf_counter()
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    return time.perf_counter() - begin, done.stdout


def run_nanogpt(checkout: Path) -> tuple[float, float]:
    seconds, out = timed([sys.executable, *NANOGPT.split()], checkout)
    return seconds, float(re.findall(r"val loss ([\d.]+)", out)[-1])


def run_ours(text: Path, extra: list[str]) -> tuple[float, float]:
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "run"
        # An empty cache each time: tokenising is part of the process.
        where = ["--out", str(out), "--data.path", str(text), "--data.cache_dir", f"{scratch}/cache"]
        command = [sys.executable, "-m", "pocketlm", "train", "shakespeare-char", *where, *extra]
        seconds, _ = timed(command, Path.cwd())
        return seconds, json.loads((out / "summary.json").read_text())["validation_loss"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shakespeare", type=Path, required=True, help="the text, 1,115,394 bytes")
    parser.add_argument("--nanogpt", type=Path, help="a prepared checkout; without it only ours runs")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path, help="also write the JSON line here")
    options, extra = parser.parse_known_args()
    rows: dict[str, list[tuple[float, float]]] = {}
    for _ in range(options.repeats):
        if options.nanogpt:
            rows.setdefault("nanoGPT, CPU recipe", []).append(run_nanogpt(options.nanogpt))
        rows.setdefault("pocketlm shakespeare-char", []).append(run_ours(options.shakespeare.resolve(), extra))
    print(f"{'':<28} {'wall s (median)':>16} {'validation loss':>16}   each")
    for name, runs in rows.items():
        wall, loss = (statistics.median(column) for column in zip(*runs, strict=True))
        each = ", ".join(f"{s:.1f} s {v:.4f}" for s, v in runs)
        print(f"{name:<28} {wall:>16.1f} {loss:>16.4f}   {each}")
    import torch

    command = ["python benchmarks/shakespeare.py --shakespeare input.txt", "--nanogpt DIR"][: 1 + bool(options.nanogpt)]
    command += [f"--repeats {options.repeats}", *extra]
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    line = json.dumps(
        {
            "benchmark": "shakespeare",
            "command": " ".join(command),
            "commit": commit,
            "machine": f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads",
            "torch": torch.__version__,
            "rows": {name: [{"wall_seconds": s, "validation_loss": v} for s, v in runs] for name, runs in rows.items()},
        }
    )
    print(line)
    if options.json:
        options.json.write_text(line + "\n")


if __name__ == "__main__":
    main()
