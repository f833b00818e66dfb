"""A run in words: numbers, sentences and foreign text as people read them.

What belongs here: pure functions from values to strings, shared by the bar, the log and the report.
Imports ``train.events``.

Design: at most three significant digits where a number is only glanced at (1.23M tokens, 12.3k tokens/s), and
text written by a model never reaches a terminal with its control characters alive.
"""

from __future__ import annotations

import math
import shlex
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pocketlm.train.events import End, Phase, Sample, Validation


def count(n: float) -> str:
    """950, 12.3k, 4.56M, 1.2G: three significant digits."""
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(n) >= 0.9995 * size:
            return f"{n / size:.3g}{unit}"
    return f"{n:.0f}"


def duration(seconds: float) -> str:
    """0.4 s, 45 s, 3 min 20 s, 2 h 05 min, 1 d 4 h."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    days, h = divmod(hours, 24)
    if days:
        return f"{days} d {h} h"
    if hours:
        return f"{hours} h {m:02d} min"
    return f"{m} min {s:02d} s" if m else f"{s} s"


def clock(seconds: float) -> str:
    """3:20 or 1:02:03."""
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02d}:{s:02d}" if hours else f"{m}:{s:02d}"


def perplexity(value: float) -> str:
    """24.9, 187, 50,257; 'infinite' where exp overflowed."""
    if math.isinf(value):
        return "infinite"
    return f"{value:.1f}" if value < 99.95 else f"{value:,.0f}"


def gigabytes(n_bytes: float) -> str:
    """1.2 GB, in units of 10^9 bytes."""
    return f"{n_bytes / 1e9:.{1 if n_bytes < 99.95e9 else 0}f} GB"


def visible(text: str) -> str:
    """``text`` with control characters as pictures (U+2400...) and lone surrogates as '?'; \\n and \\t stay.

    A model may write an escape sequence that would recolour, retitle or clear the reader's terminal.
    """
    text = text.replace("\r\n", "\n").encode("utf-8", "replace").decode("utf-8")
    return "".join(_picture(ord(c)) if _is_control(c) else c for c in text)


def _is_control(c: str) -> bool:
    return (c < " " and c not in "\n\t") or "\x7f" <= c <= "\x9f"


def _picture(code: int) -> str:
    return chr(0x2400 + code) if code < 32 else "\u2421" if code == 127 else "\ufffd"


# ---------------------------------------------------------------- sentences and lines


def validation_line(record: Validation) -> str:
    """'step 500  validation loss 3.214  perplexity 24.9  1.23 bits/byte  best so far'."""
    best = "  best so far" if record.best else ""
    return (
        f"step {record.step:,}  validation loss {record.loss:.3f}  perplexity {perplexity(record.perplexity)}"
        f"  {record.bits_per_byte:.3f} bits/byte{best}"
    )


def phase_line(record: Phase) -> str:
    """'phase 2: 50 steps after step 5,000, learning rate 1.0e-04, weight decay 0.02, Shakespeare'."""
    return (
        f"phase {record.number}: {record.steps:,} steps after step {record.step:,}, learning rate {record.lr:.1e}, "
        f"weight decay {record.weight_decay:g}, {record.data}"
    )


def sample_title(record: Sample) -> str:
    """'step 500, the model goes on from "def "'."""
    if not record.prompt:
        return f"step {record.step:,}, the model writes"
    start = " ".join(visible(record.prompt).split())
    return f'step {record.step:,}, the model goes on from "{start if len(start) <= 32 else start[:31] + "…"}"'


def closing_lines(record: End, total: int, width: int) -> list[str]:
    """The last words of a run: what came out, where it is, what to do with it."""
    summary = record.summary
    state = "finished" if record.finished else "stopped"
    wall = summary.get("wall_seconds")
    lines = [f"{state} at step {record.step:,} of {total:,}" + (f" after {duration(wall)}" if wall is not None else "")]
    facts = {}
    if summary.get("best_loss") is not None:
        best = summary["best_loss"]
        facts["best"] = f"validation loss {best:.3f}, perplexity {perplexity(math.exp(min(best, 700.0)))}"
        facts["best"] += f", at step {summary['best_step']:,}" if summary.get("best_step") is not None else ""
    if summary.get("tokens_per_second"):
        facts["speed"] = f"{summary['tokens_per_second']:,.0f} tokens/s"
    if summary.get("peak_memory_bytes"):
        facts["memory"] = f"{gigabytes(summary['peak_memory_bytes'])} at most"
    folder = summary.get("folder")
    if folder:
        facts["run"] = folder
        facts["report"] = str(Path(folder) / "report.html")
    lines += table(facts, width)
    if folder:
        lines += ["", "next:", *(f"  {command}" for command in next_commands(summary))]
    return lines


def next_commands(summary: Mapping[str, Any]) -> list[str]:
    """What a person may want to do with the run of this summary, its own first prompt as the example."""
    run = shlex.quote(str(summary.get("folder", "latest")))
    go_on = [] if summary.get("finished") else [f"pocketlm train --resume {run}"]
    prompt = str(summary.get("prompt") or "Once upon a time").replace('"', "'")
    return [*go_on, f'pocketlm generate {run} "{prompt}"', f"pocketlm eval {run}"]


def table(rows: dict[str, str], width: int) -> list[str]:
    """'  name   value' lines, values aligned and wrapped to ``width``; a long word (a path) stays whole."""
    indent = max((len(name) for name in rows), default=0) + 4
    lines: list[str] = []
    for name, value in rows.items():
        wrapped = paragraph(value, max(20, width - indent))
        lines += [f"  {name}".ljust(indent) + wrapped[0], *(" " * indent + more for more in wrapped[1:])]
    return lines


def fit(position: str, figures: dict[str, str], width: int) -> str:
    """As many figures as ``width`` holds; the ones that change least leave first."""
    shown = dict(figures)
    for name in ("memory", "lr", "validation", "average", "speed", "left"):
        if len("  ".join((position, *shown.values()))) <= width:
            break
        shown.pop(name, None)
    return "  ".join((position, *shown.values()))


def wrap(text: str, width: int) -> list[str]:
    """``text`` in pieces of at most ``width`` characters, every space kept; the start of a text wraps to a start."""
    lines = [line.expandtabs(4) for line in text.split("\n")]
    return [line[i : i + width] for line in lines for i in range(0, max(1, len(line)), width)]


def paragraph(text: str, width: int) -> list[str]:
    """A sentence in lines of at most ``width``; paths and options are never broken."""
    return textwrap.wrap(visible(text), width, break_long_words=False, break_on_hyphens=False) or [""]
