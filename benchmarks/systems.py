"""The four systems on their own text and tokenizers: some steps, an interruption, a resume, a whole validation.

    python benchmarks/systems.py --mirror DIR --steps 20 --out docs/results/systems-cpu

DIR holds copies of WikiText-2, Shakespeare and the tokenizers (docs/data.md). Each preset trains as it ships but for
the number of steps, the warm-up (shortened to fit) and, where a CPU would need minutes for a step, the batch; the
page says what was changed. Half-way through, the process gets SIGINT as by Ctrl-C and the run is resumed. Writes a
page with a table (.md) and one JSON line a system (.jsonl), every step's loss in it.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

SYSTEMS: dict[str, list[str]] = {
    "smollm2-80m-shakespeare": ["--phases", "1"],
    "gpt-125m-wikitext2": [],
    "smolm-135": ["--data.path", "shakespeare"],
    "smollm2-135m": ["--training.batch_size", "2", "--training.grad_accum", "1"],
}


def run(preset: str, extra: list[str], folder: Path, steps: int, environment: dict[str, str]) -> dict[str, Any]:
    """Train, interrupt, resume; returns the row of the table."""
    warmup = ["--schedule.warmup_steps", str(steps // 2)]
    quiet = ["--training.log_every", "1", "--evaluation.every", "0", "--sampling.every", "0"]
    changes = ["--training.steps", str(steps), *warmup, *quiet, *extra]
    command = [sys.executable, "-m", "pocketlm", "train"]
    metrics = folder / "logs" / "metrics.jsonl"
    process = subprocess.Popen([*command, preset, "--out", str(folder), *changes], env=environment)
    while process.poll() is None and not (metrics.exists() and metrics.read_text().count('"train"') >= steps // 2):
        time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    assert process.wait() == 130, f"{preset}: an interrupted run must say so"
    subprocess.run([*command, "--resume", str(folder)], env=environment, check=True)

    summary = json.loads((folder / "summary.json").read_text())
    trained = [json.loads(line) for line in metrics.read_text().splitlines()]
    trained = [line for line in trained if line["kind"] == "train"]
    assert [line["step"] for line in trained] == list(range(1, steps + 1)), "no step is lost or done twice"
    return {
        "system": preset,
        "parameters": summary["parameters"],
        "ln_vocabulary": math.log(summary["vocab_size"]),
        "first_loss": trained[0]["loss"],
        "last_loss": trained[-1]["loss"],
        "validation_loss": summary["validation_loss"],
        "tokens": summary["tokens"],
        "tokens_per_second": sorted(line["tokens_per_second"] for line in trained)[steps // 2],
        "peak_memory_bytes": summary["peak_memory_bytes"],
        "device": summary["device"],
        "versions": summary["versions"],
        "changed": " ".join(changes),
        "losses": [round(line["loss"], 4) for line in trained],
    }


def page(rows: list[dict[str, Any]], command: str) -> str:
    """The rows as Markdown."""
    lines = [
        "# The four systems on a CPU",
        "",
        f"`{command}`, commit {rows[0]['commit']}, {rows[0]['device']}, torch {rows[0]['versions']['torch']}.",
        "",
        "Each was interrupted half-way with SIGINT and resumed. Losses are nats a token, validation is the whole",
        "held-out split; tokens/s is the median step's, without evaluation and saving; memory is the process's peak.",
        "",
        "| system | parameters | ln V | first loss | last loss | validation | tokens/s | memory |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        losses = [f"{row[key]:.2f}" for key in ("ln_vocabulary", "first_loss", "last_loss", "validation_loss")]
        speed, memory = f"{row['tokens_per_second']:,.0f}", f"{row['peak_memory_bytes'] / 2**30:.1f} GiB"
        cells = [row["system"], f"{row['parameters']:,}", *losses, speed, memory]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "Changed from the presets:", ""]
    lines += [f"- {row['system']}: `{row['changed']}`" for row in rows]
    lines += ["", "Every step's loss:", ""]
    lines += [f"- {row['system']}: {' '.join(f'{loss:.2f}' for loss in row['losses'])}" for row in rows]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mirror", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--out", type=Path, required=True, help="without suffix")
    parser.add_argument("--only", choices=list(SYSTEMS), action="append")
    options = parser.parse_args()
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    command = f"python benchmarks/systems.py --mirror DIR --steps {options.steps} --out {options.out}"
    options.out.parent.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        cache = {"POCKETLM_MIRROR": str(options.mirror.resolve()), "POCKETLM_CACHE": f"{scratch}/cache"}
        for preset in options.only or SYSTEMS:
            row = run(preset, SYSTEMS[preset], Path(scratch) / preset, options.steps, {**os.environ, **cache})
            rows.append({**row, "commit": commit})
            options.out.with_suffix(".jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
            options.out.with_suffix(".md").write_text(page(rows, command))


if __name__ == "__main__":
    main()
