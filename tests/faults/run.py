"""Trains short real runs, hurts them in every way we know, and reports whether each ends as if nothing had happened.

    python tests/faults/run.py --kills 200 --out docs/results/faults-cpu
    python tests/faults/run.py --groups kill,damage --kills 20 --out /tmp/faults

Writes a page (.md) and one JSON line a trial (.jsonl); exit code 1 if any trial failed. The same ``--seed`` draws the
same faults, but not the same instants: those are the machine's. What cannot be done here (mounting a file system needs
root) is left out, and the page says so.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from bench import VARIANTS, Bench, Failure, Trial
from faults import GROUPS, NEEDS_MOUNT, may_mount, plan


def attempt(bench: Bench, trial: Trial, seed: int) -> Trial:
    """Carry a trial out; what goes wrong is written into it."""
    begin = time.monotonic()
    draw = random.Random(f"{seed} {trial.group} {trial.number}")
    try:
        GROUPS[trial.group][1](bench, trial, draw)
    except Failure as e:
        trial.failure = str(e)
    except Exception as e:  # the harness itself: no trial may pass unnoticed
        trial.failure = f"{type(e).__name__}: {e}"
    trial.seconds = time.monotonic() - begin
    return trial


def run(root: Path, groups: list[str], kills: int, seed: int, workers: int, thorough: bool = True) -> list[Trial]:
    """All trials of ``groups``, ``workers`` at a time; one line of progress a group."""
    bench = Bench(root)
    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(bench.reference, range(len(VARIANTS))))
        done: list[Trial] = []
        for group in groups:
            if group in NEEDS_MOUNT and not may_mount():
                print(f"{group}: left out, no file system can be mounted here", flush=True)
                continue
            begin = time.monotonic()
            trials = list(pool.map(lambda trial: attempt(bench, trial, seed), plan(group, kills, thorough)))
            failed = [t for t in trials if t.failure]
            print(f"{group}: {len(trials)} trials, {len(failed)} failed, {time.monotonic() - begin:.0f} s", flush=True)
            for t in failed:
                print(f"  {t.what}, variant {t.variant}: {t.failure}", flush=True)
            done += trials
    return done


def page(trials: list[Trial], command: str, seconds: float) -> str:
    """The report."""
    import torch

    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    kills = sum(len(t.happened) for t in trials if t.group == "kill")
    n_failed = sum(bool(t.failure) for t in trials)
    lines = [
        "# Runs that were hurt",
        "",
        f"`{command}`, commit {commit}, {platform.system()} {platform.machine()}, {os.cpu_count()} cores, Python "
        f"{platform.python_version()}, torch {torch.__version__}; {seconds / 60:.0f} minutes.",
        "",
        "Every trial is a real run of the command in processes of its own, in one of six settings (batching modes,",
        "fp32, bf16 and fp16 with loss scaling, AdamW and Muon, dropout, accumulation, an average of the weights,",
        "writing in line and in the background). It passes when the run can be finished, no traceback was printed, and",
        "sha256 of the final weights and every line of the metrics are those of the run that nothing happened to.",
        "",
        f"{len(trials)} trials, {kills} SIGKILLs that ended a living process, {n_failed} failures.",
        "",
        "| fault | trials | what happened | failures |",
        "|---|---|---|---|",
    ]
    for group, (what, _) in GROUPS.items():
        mine = [t for t in trials if t.group == group]
        if not mine:
            lines.append(f"| {what} | 0 | left out | - |")
            continue
        happened = Counter(h for t in mine for h in t.happened)
        if len(happened) > 4:
            happened = Counter(h.split(": ")[-1] for h in happened.elements())
        told = ", ".join(f"{n} {h}" for h, n in happened.most_common())
        lines.append(f"| {what} | {len(mine)} | {told} | {sum(bool(t.failure) for t in mine)} |")
    failed = [t for t in trials if t.failure]
    if failed:
        lines += ["", "Failures:", ""]
        lines += [
            f"- {t.group}, {t.what}, variant {t.variant}: {t.failure.splitlines()[0]}" for t in failed if t.failure
        ]
    return "\n".join([*lines, ""])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200, help="SIGKILLs at least aimed at living processes")
    parser.add_argument("--groups", default=",".join(GROUPS), help="comma-separated, default all")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 2)))
    parser.add_argument("--out", type=Path, required=True, help="page and trials, without suffix")
    options = parser.parse_args()
    begin = time.monotonic()
    root = Path(tempfile.mkdtemp(prefix="faults-"))
    try:
        trials = run(root, options.groups.split(","), options.kills, options.seed, options.workers)
    finally:
        shutil.rmtree(root, ignore_errors=True)
    text = page(trials, "python " + " ".join(sys.argv), time.monotonic() - begin)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.with_suffix(".md").write_text(text)
    lines = [json.dumps(asdict(trial)) for trial in trials]
    options.out.with_suffix(".jsonl").write_text("\n".join(lines) + "\n")
    print(text)
    return 1 if any(trial.failure for trial in trials) else 0


if __name__ == "__main__":
    sys.exit(main())
