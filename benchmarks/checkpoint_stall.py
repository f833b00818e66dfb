"""What a checkpoint costs a run: none, in the background, in line.

    python benchmarks/checkpoint_stall.py --preset smollm2-135m --every 20 --out docs/results/checkpoint-stall-cpu

Trains the preset's shape on the bytes of Python's standard library, its vocabulary and with it the state as large as
the preset's. The three ways take turns in one process and on one model: stretches of ``--every`` steps with one copy
taken and one write done in each. A stretch's wall-clock is compared with that of the stretch without a checkpoint of
the same round; the page gives the medians. Writes a page (.md) and one JSON line a stretch (.jsonl).
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from pocketlm.config import load_config, preset_layer
from pocketlm.train.loop import compute_gradients, update
from pocketlm.train.runs import Run
from pocketlm.train.setup import Session, open_session, versions

WAYS = ("none", "background", "in line")


def open_preset(preset: str, batch_size: int, window: int, folder: Path) -> Session:
    """The preset's model ready to train on bytes of text."""
    changes: dict[str, Any] = {
        "tokenizer": {"name": "bytes"},
        "data": {"path": "stdlib", "mode": "stream"},
        "training": {"batch_size": batch_size, "window": window, "grad_accum": 1, "steps": 10**6, "epochs": None},
        "schedule": {"warmup_steps": 10},
    }
    config = load_config(preset_layer(preset), changes)
    return open_session(config, Run(folder), command="", began=time.perf_counter(), quiet=True)


def stretch(session: Session, steps: int, windows: Any, way: str) -> dict[str, float]:
    """``steps`` steps and, at the end, a checkpoint; wall-clock and the part spent inside ``save``."""
    state, phase = session.state, session.phases[0]
    session.saver.background = way == "background"
    stall, begin = 0.0, time.perf_counter()
    for _ in range(steps):
        batches, n_targets, position = next(windows)
        state.optimizers.configure(phase.config.optimizer, phase.lr(state.progress.step))
        compute_gradients(state, batches, n_targets, phase.config.optimizer.grad_clip)
        update(state, allowed=True)
        state.progress.step += 1
        state.progress.position = position
        session.saver.poll()
    if way != "none":
        asked = time.perf_counter()
        session.saver.save(state)
        stall = time.perf_counter() - asked
    return {"seconds": time.perf_counter() - begin, "stall": stall}


def measure(session: Session, every: int, repeats: int) -> list[dict[str, Any]]:
    """Rounds of three stretches, each round in another order."""
    windows = session.phases[0].loader.windows(session.state.progress.position, 1)
    stretch(session, 3, windows, "background")  # buffers, caches and the optimiser's state come into being
    session.saver.wait()
    rows = []
    for repeat in range(repeats):
        for place in range(len(WAYS)):
            way = WAYS[(repeat + place) % len(WAYS)]
            # The write of a first checkpoint runs under the measured stretch, as it does all through a run.
            if way == "background":
                session.saver.background = True
                session.saver.save(session.state)
            row = {"way": way, "round": repeat, "steps": every, **stretch(session, every, windows, way)}
            session.saver.wait()
            rows.append(row)
            print(f"round {repeat + 1}, {way}: {row['seconds']:.1f} s, {row['stall']:.2f} s of it in save", flush=True)
    return rows


def page(rows: list[dict[str, Any]], facts: dict[str, Any]) -> str:
    """The rows as Markdown."""
    seconds = {way: [row["seconds"] for row in rows if row["way"] == way] for way in WAYS}
    stalls = {way: [row["stall"] for row in rows if row["way"] == way] for way in WAYS}
    lines = [
        "# What a checkpoint costs",
        "",
        f"`{facts['command']}`, commit {facts['commit']}, {facts['device']}, torch {facts['versions']['torch']}.",
        "",
        f"{facts['preset']}: {facts['parameters']:,} parameters, {facts['checkpoint_bytes'] / 1e9:.2f} GB each,",
        f"one every {facts['every']} steps of {facts['batch_size']} x {facts['window']} tokens; {facts['repeats']} "
        "rounds",
        "of the three ways by turns in one process, medians. *In save* is how long training stands still; the ratio is",
        "wall-clock against the stretch without a checkpoint of the same round, so it also counts what the writer in",
        "the background takes from the cores.",
        "",
        "| checkpoint | stretch | in save | share of the stretch | wall-clock against none |",
        "|---|---|---|---|---|",
    ]
    for way in WAYS:
        ratio = statistics.median(a / b for a, b in zip(seconds[way], seconds["none"], strict=True))
        share = statistics.median(a / b for a, b in zip(stalls[way], seconds[way], strict=True))
        lines.append(
            f"| {way} | {statistics.median(seconds[way]):.1f} s | {statistics.median(stalls[way]):.2f} s | "
            f"{share:.2%} | {ratio:.4f} |"
        )
    return "\n".join([*lines, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="smollm2-135m")
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--window", type=int, default=2048)
    parser.add_argument("--every", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where checkpoints are written (default: a temporary folder)")
    parser.add_argument("--out", type=Path, required=True, help="page and rows, without suffix")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        session = open_preset(options.preset, options.batch_size, options.window, Path(folder) / "run")
        rows = measure(session, options.every, options.repeats)
        size = sum(f.stat().st_size for f in session.run.checkpoint("last").folder.iterdir())
        session.close()
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    facts = {
        "command": "python " + " ".join(sys.argv),
        "commit": commit,
        "device": session.runtime.describe(),
        "versions": versions(),
        "preset": options.preset,
        "parameters": session.state.model.num_parameters(),
        "checkpoint_bytes": size,
        "every": options.every,
        "batch_size": options.batch_size,
        "window": options.window,
        "repeats": options.repeats,
        "threads": torch.get_num_threads(),
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.with_suffix(".md").write_text(page(rows, facts))
    lines = [json.dumps({**row, **facts}) for row in rows]
    options.out.with_suffix(".jsonl").write_text("\n".join(lines) + "\n")
    print(page(rows, facts))


if __name__ == "__main__":
    main()
