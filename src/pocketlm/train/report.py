"""A run's report: one HTML file that opens anywhere, without a network.

What belongs here: reading what a run has recorded, and saying it in sentences, tiles, curves and tables.
Imports ``errors``, ``train.observers``, ``train.words``, ``train.curves``; the page's frame is ``report.html``.

Design: everything comes from the run's own files, so a report can be written at any moment, also of a run that was
killed: 3 of them are read (config.yaml, logs/metrics.jsonl, summary.json) and each may be missing. Every word
that a user or a model wrote is escaped, and the page forbids itself to load anything.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from html import escape
from importlib import resources
from pathlib import Path
from string import Template
from typing import Any

from pocketlm.errors import RunError
from pocketlm.train.curves import Series, centred_means, chart
from pocketlm.train.observers import MEMORY
from pocketlm.train.words import count, duration, gigabytes, next_commands, perplexity, visible

SAMPLED_STEPS = 8
"""Steps whose samples are shown: first, last and evenly between."""
WORSE = 1.02
"""A last validation loss this many times the best one is worth a warning."""


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a ``metrics.jsonl``, in order; a line torn by a crash is left out. Missing file: none."""
    records = []
    for line in path.read_bytes().splitlines() if path.is_file() else []:
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and "kind" in record:
            records.append(record)
    return records


def write_report(folder: Path) -> Path:
    """Write ``folder/report.html`` from what the run has recorded so far; returns its path. Raises RunError."""
    if not folder.is_dir():
        raise RunError(f"there is no run folder '{folder}' to report on")
    recorded = Recorded(folder, _text(folder / "config.yaml"), read_metrics(folder / "logs" / "metrics.jsonl"))
    template = Template((resources.files("pocketlm.train") / "report.html").read_text(encoding="utf-8"))
    path = folder / "report.html"
    aside = path.with_suffix(".html.part")
    try:
        aside.write_text(template.substitute(_page(recorded)), encoding="utf-8")
        os.replace(aside, path)
    except OSError as e:
        raise RunError(f"the report '{path}' cannot be written: {e}") from None
    return path


@dataclass(frozen=True)
class Recorded:
    """What a run's files say."""

    folder: Path
    config: str
    records: list[dict[str, Any]]

    def kind(self, name: str) -> list[dict[str, Any]]:
        """Records of one kind, in order."""
        return [record for record in self.records if record["kind"] == name]

    @cached_property
    def summary(self) -> dict[str, Any]:
        """summary.json, over what the start of the run said; only keys that hold something."""
        start: dict[str, Any] = next(iter(self.kind("start")), {})
        said = {key: start.get(key) for key in ("name", "folder", "parameters", "total_steps")}
        said["corpus"] = start.get("facts", {}).get("data")
        try:
            final = json.loads(_text(self.folder / "summary.json"))
        except ValueError:
            final = {}
        said |= final if isinstance(final, dict) else {}
        return {key: value for key, value in said.items() if value is not None}

    @cached_property
    def best(self) -> dict[str, Any] | None:
        """The validation with the lowest loss."""
        scored = [record for record in self.kind("validation") if record["loss"] is not None]
        return min(scored, key=lambda record: float(record["loss"]), default=None)

    @cached_property
    def last(self) -> dict[str, Any]:
        """The last train record; empty before the first."""
        return next(iter(self.kind("train")[::-1]), {})

    @cached_property
    def lines_in_mean(self) -> int:
        """Train records that MEMORY steps make."""
        train = self.kind("train")
        apart = (train[-1]["step"] - train[0]["step"]) / (len(train) - 1) if len(train) > 1 else MEMORY
        return max(1, round(MEMORY / apart))

    @cached_property
    def train_loss(self) -> float:
        """Mean over the last MEMORY steps; NaN if there is no number among them."""
        losses = [r["loss"] for r in self.kind("train")[-self.lines_in_mean :] if r["loss"] is not None]
        return sum(losses) / len(losses) if losses else math.nan


# ---------------------------------------------------------------- the page


def _page(run: Recorded) -> dict[str, str]:
    """Every placeholder of report.html."""
    name = str(run.summary.get("name", run.folder.resolve().name))
    folder = str(run.summary.get("folder", run.folder))
    finished = bool(run.summary.get("finished"))
    return {
        "title": _safe(f"{name} - training report"),
        "name": _safe(name),
        "state": "" if finished else '<span class="state">not finished</span>',
        "sentence": _safe(sentence(run)),
        "notes": "".join(f'<p class="{style}">{_safe(text)}</p>' for text, style in _notes(run)),
        "tiles": "".join(_tile(*tile) for tile in _tiles(run)),
        "curves": _loss_curves(run),
        "small": "".join(_small_curves(run)),
        "samples": _samples(run),
        "commands": _safe("\n".join(next_commands({**run.summary, "folder": folder}))),
        "spent": _spent(run),
        "machine": "".join(f"<tr><th>{_safe(k)}</th><td>{_safe(v)}</td></tr>" for k, v in _machine(run).items()),
        "config": _safe(run.config),
    }


def sentence(run: Recorded) -> str:
    """The result in plain words."""
    summary, last = run.summary, run.last
    size = f"A {count(summary['parameters'])}-parameter model" if "parameters" in summary else "A model"
    of_what = f" trained on {summary['corpus']}" if "corpus" in summary else ""
    step = last.get("step", 0)
    if not step:
        return f"{size}{of_what} has not made its first steps yet."
    if run.best is None:
        reached = f"reached training loss {_fixed(run.train_loss, 2)} after {_after(last, step)}"
        return f"{size}{of_what} {reached}; it has not been validated yet."
    b = run.best
    values = perplexity(_number(b["perplexity"], math.inf)), _fixed(b["bits_per_byte"], 2)
    words = "perplexity {}, {} bits per byte".format(*values)
    return f"{size}{of_what} reached validation loss {b['loss']:.2f} ({words}) after {_after(b, step)}."


def _after(record: dict[str, Any], steps: int) -> str:
    """'1,650 of 2,000 steps and 2 min 45 s of training'."""
    of_all = "" if record["step"] == steps else f" of {steps:,}"
    return f"{record['step']:,}{of_all} steps and {duration(record['seconds'])} of training"


def _notes(run: Recorded) -> list[tuple[str, str]]:
    """(sentence, CSS class) for what the curves mean."""
    notes = []
    scored, total = run.kind("validation"), run.summary.get("total_steps")
    if not run.summary.get("finished") and total:
        notes.append((f"It stands at step {run.last.get('step', 0):,} of {total:,}.", "note"))
    rose = run.best and scored[-1]["loss"] is not None and scored[-1]["loss"] > WORSE * run.best["loss"]
    if run.best and (rose or scored[-1].get("memorising")):
        text = (
            f"After step {run.best['step']:,} validation loss rose, to {scored[-1]['loss']:.2f} at the last: the model "
            "was memorising its text. The checkpoint of the best step is the one that is used."
        )
        notes.append((text, "note warning"))
    skipped = run.last.get("skipped", 0)
    if skipped:
        text = f"The updates of {skipped:,} steps were left out: their loss or gradient was not finite, or spiked."
        notes.append((text, "note warning"))
    elif any(record["loss"] is None for record in run.kind("train")):
        notes.append(("Some training losses are not finite numbers; the curve has gaps there.", "note warning"))
    return notes


def _tiles(run: Recorded) -> list[tuple[str, str, str]]:
    """(name, value, remark) of the final numbers."""
    summary, last, tiles = run.summary, run.last, []
    if run.best:
        b = run.best
        tiles += [
            ("validation loss", f"{b['loss']:.3f}", f"best, at step {b['step']:,}"),
            ("perplexity", perplexity(_number(b["perplexity"], math.inf)), "per token of this tokenizer"),
            ("bits per byte", _fixed(b["bits_per_byte"], 3), "comparable between tokenizers"),
        ]
    if last:
        speed = count(last["tokens"] / last["seconds"]) if last["seconds"] else "-"
        memory = summary.get("peak_memory_bytes", last["memory_bytes"])
        tiles += [
            (
                "training loss",
                _fixed(run.train_loss, 3),
                f"mean of the last {MEMORY} steps",
            ),
            ("steps", f"{last['step']:,}", f"{count(last['tokens'])} tokens, {last['epoch']:.1f} epochs"),
            ("tokens a second", speed, "of training time"),
            ("peak memory", gigabytes(memory), summary.get("device", "")),
        ]
    if "parameters" in summary:
        vocabulary = f"vocabulary of {summary['vocab_size']:,}" if "vocab_size" in summary else ""
        tiles.append(("parameters", count(summary["parameters"]), vocabulary))
    return tiles


def _tile(name: str, value: str, remark: str) -> str:
    return f"<div><dt>{_safe(name)}</dt><dd>{_safe(value)}</dd><dd>{_safe(remark)}</dd></div>"


def _loss_curves(run: Recorded) -> str:
    """Loss against steps, tokens and time; radio buttons choose, without a script."""
    longest = _number(run.last.get("seconds", 0.0))
    unit, unit_seconds = ("h", 3600) if longest > 7200 else ("min", 60) if longest > 120 else ("s", 1)
    axes: dict[str, tuple[str, int, Callable[[float], str]]] = {
        "step": ("step", 1, _whole),
        "tokens": ("tokens", 1, count),
        "time": ("seconds", unit_seconds, lambda t: f"{t:.3g} {unit}"),
    }
    inputs = "".join(f'<input type="radio" name="axis" id="by-{a}"{" checked" * (a == "step")}>' for a in axes)
    labels = "".join(f'<label for="by-{a}">{a}</label>' for a in axes)
    train, held, charts = run.kind("train"), run.kind("validation"), []
    smooth = centred_means([r["loss"] for r in train], run.lines_in_mean // 2)
    for axis, (key, size, words) in axes.items():
        series = [
            Series("training", [(r[key] / size, r["loss"]) for r in train], "raw"),
            Series("running mean", [(r[key] / size, mean) for r, mean in zip(train, smooth, strict=True)], "train"),
            Series("validation", [(r[key] / size, r["loss"]) for r in held], "held", dots=True),
        ]
        best = (run.best[key] / size, run.best["loss"]) if run.best else None
        drawn = chart(series, title="Loss, nats a token", x_name=axis, x_words=words, y_words=_plain, best=best)
        charts.append(f'<div class="by by-{axis}">{drawn}</div>')
    return f'{inputs}<div class="axes">against {labels}</div>{"".join(charts)}'


def _small_curves(run: Recorded) -> list[str]:
    """Learning rate, speed, gradient norm."""
    charts = []
    for title, key, words in (
        ("Learning rate", "lr", _plain),
        ("Tokens a second", "tokens_per_second", count),
        ("Gradient norm", "grad_norm", _plain),
    ):
        series = [Series(title.lower(), [(r["step"], r[key]) for r in run.kind("train")], "train")]
        charts.append(chart(series, title=title, x_name="step", x_words=_whole, y_words=words, from_zero=True))
    return charts


def _samples(run: Recorded) -> str:
    """What the model wrote, by step."""
    by_step: dict[int, list[dict[str, Any]]] = {}
    for sample in run.kind("sample"):
        by_step.setdefault(sample["step"], []).append(sample)
    steps = sorted(by_step)
    if not steps:
        return ""
    places = {round(i * (len(steps) - 1) / (SAMPLED_STEPS - 1)) for i in range(SAMPLED_STEPS)}
    losses = {record["step"]: record["loss"] for record in run.kind("validation")}
    items = []
    for step in (steps[i] for i in sorted(places)):
        loss = f"<small>validation loss {losses[step]:.2f}</small>" if losses.get(step) is not None else ""
        texts = (f"<pre><mark>{_safe(s['prompt'])}</mark>{_safe(s['text'])}</pre>" for s in by_step[step])
        items.append(f"<li><h3>Step {step:,}{loss}</h3>{''.join(texts)}</li>")
    rest = len(steps) - len(items)
    more = f'<p class="note">Samples of {rest} more steps are in logs/train.log.</p>' if rest else ""
    return f'<h2>What it wrote</h2><ol class="timeline">{"".join(items)}</ol>{more}'


def _spent(run: Recorded) -> str:
    """Where the wall time went; the parts add up to it."""
    parts = {name: _number(s) for name, s in run.summary.get("seconds", {}).items()}
    wall = max(_number(run.summary.get("wall_seconds", 0.0)), sum(parts.values()))
    if not parts or not wall > 0:
        return ""
    parts = dict(sorted(parts.items(), key=lambda part: -part[1]))
    parts["everything else"] = wall - sum(parts.values())
    parts = {name: s for name, s in parts.items() if s >= 0.0005 * wall}
    bar = "".join(f'<i class="s{i}" style="flex:{s:.3f}"></i>' for i, s in enumerate(parts.values()))
    rows = "".join(
        f'<tr><td><i class="swatch s{i}"></i>{_safe(name)}</td>'
        f'<td class="n">{duration(s)}</td><td class="n">{s / wall:.1%}</td></tr>'
        for i, (name, s) in enumerate(parts.items())
    )
    resumed = run.last.get("seconds", 0.0) > 1.02 * parts.get("training", math.inf) + 1
    note = '<p class="note">Since the run was last resumed.</p>' if resumed else ""
    total = f'<tr><td>wall time</td><td class="n">{duration(wall)}</td><td class="n"></td></tr>'
    return f'<h2>Where the time went</h2>{note}<div class="spent">{bar}</div><table>{rows}{total}</table>'


def _machine(run: Recorded) -> dict[str, str]:
    """What the numbers were measured on and with."""
    s = run.summary
    share = f"{s['useful_share']:.1%} of the batches' tokens" if "useful_share" in s else None
    rows = {"device": s.get("device"), "precision": s.get("precision"), "corpus": s.get("corpus")}
    rows |= {"tokenizer": s.get("tokenizer"), "useful": share, "command": s.get("command"), **s.get("versions", {})}
    return {name: str(value) for name, value in rows.items() if value is not None}


# ---------------------------------------------------------------- values


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def _safe(text: Any) -> str:
    """Ready for HTML, control characters shown as pictures."""
    return escape(visible(str(text)))


def _number(value: Any, missing: float = math.nan) -> float:
    """JSON's null was no finite number."""
    return missing if value is None else float(value)


def _fixed(value: float | None, digits: int) -> str:
    number = _number(value)
    return f"{number:.{digits}f}" if math.isfinite(number) else "not a number"


def _whole(n: float) -> str:
    return f"{n:,.0f}"


def _plain(value: float) -> str:
    return (
        f"{value:.6g}"
        if value == 0 or 1e-4 <= abs(value) < 1e5
        else f"{value:.0e}".replace("e-0", "e-").replace("e+0", "e")
    )
