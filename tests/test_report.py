"""The report is one safe, self-contained page, whatever a run has recorded so far."""

from __future__ import annotations

import json
import math
import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pocketlm.errors import RunError
from pocketlm.train.curves import Series, centred_means, chart, finite, nice_ticks, thin, value_range
from pocketlm.train.events import Sample, Start, Step, Validation
from pocketlm.train.observers import MetricsFile
from pocketlm.train.report import read_metrics, write_report

VOID = {"meta", "input", "br", "hr", "link", "img"}
NASTY = "</pre><script>alert('x')</script> & $name ${title} \x00\ud800 <b>"


class Page(HTMLParser):
    """Tags that close in order, their attributes, and the text a reader sees."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not {"style", "script"} & set(self.open):
            self.words.append(data)

    @property
    def text(self) -> str:
        return "".join(self.words)


def record(
    folder: Path, steps: int, *, every: int = 20, loss=lambda n: 2 + 6 * math.exp(-n / 40), nasty: str = ""
) -> None:
    """A run's folder as the loop leaves it after ``steps`` of 200 steps, without a summary."""
    (folder / "logs").mkdir(parents=True)
    metrics = MetricsFile(folder / "logs" / "metrics.jsonl", log_every=5)
    metrics.on_start(Start(f"demo{nasty}", str(folder), 0, 200, 3_200_000, {"data": f"a book{nasty}"}))
    for n in range(1, steps + 1):
        metrics.on_step(Step(n, 100 * n, n / 50, loss(n), 1e-3, 0.1, 0.7, 1000.0, 10**9, n / 10))
        if n % every == 0:
            v = loss(n) + 0.1
            best = all(v < loss(m) + 0.1 for m in range(every, n, every))
            metrics.on_validation(Validation(n, 100 * n, n / 10, v, math.exp(v), v / 2, best))
            metrics.on_sample(Sample(n, f"def {nasty}", f"f(x):\n    return{nasty}"))
    (folder / "config.yaml").write_text(f"model:\n  n_layer: 2 # {nasty!a}\n")


def page(folder: Path) -> Page:
    return Page(write_report(folder).read_text(encoding="utf-8"))


def finish(folder: Path, **changes: object) -> None:
    summary = {"name": "demo", "folder": str(folder), "finished": True, "step": 200, "total_steps": 200}
    summary |= {"parameters": 3_200_000, "corpus": "a book", "wall_seconds": 30.0, "vocab_size": 4096}
    summary |= {"seconds": {"startup": 3.0, "training": 20.0, "evaluation": 4.0, "sampling": 1.0, "saving": 1.5}}
    summary |= {"versions": {"torch": "2.13.0"}, "device": "CPU, 2 threads, fp32"}
    (folder / "summary.json").write_text(json.dumps(summary | changes))


def test_the_result_is_one_sentence_with_the_best_numbers(tmp_path):
    record(tmp_path / "run", 200)
    finish(tmp_path / "run")
    v = 2.1 + 6 * math.exp(-5)
    expected = (
        f"A 3.2M-parameter model trained on a book reached validation loss {v:.2f} (perplexity {math.exp(v):.1f}, "
        f"{v / 2:.2f} bits per byte) after 200 steps and 20 s of training."
    )
    text = page(tmp_path / "run").text
    assert expected in text
    assert "not finished" not in text
    assert "memorising" not in text


def test_a_run_that_memorises_is_told_so_and_its_best_step_counts(tmp_path):
    record(tmp_path / "run", 200, loss=lambda n: 3 + abs(n - 100) / 100)
    finish(tmp_path / "run")
    text = page(tmp_path / "run").text
    assert "reached validation loss 3.10" in text
    assert "after 100 of 200 steps and 10 s of training" in text
    assert "After step 100 validation loss rose, to 4.10 at the last" in text


@pytest.mark.parametrize("steps", [0, 1, 7, 20, 130])
def test_a_report_can_be_written_at_any_moment_without_a_summary(tmp_path, steps):
    record(tmp_path / "run", steps)
    with (tmp_path / "run" / "logs" / "metrics.jsonl").open("a") as f:
        f.write('{"kind": "tra')
    text = page(tmp_path / "run").text
    assert "A 3.2M-parameter model trained on a book" in text
    assert "not finished" in text
    assert f"It stands at step {steps - steps % 5} of 200." in text


def test_an_empty_folder_still_gives_a_page_and_a_missing_one_a_sentence(tmp_path):
    assert "has not made its first steps" in page(tmp_path).text
    with pytest.raises(RunError, match="no run folder"):
        write_report(tmp_path / "nowhere")


def test_losses_that_are_not_numbers_leave_gaps_and_a_note(tmp_path):
    record(tmp_path / "run", 100, loss=lambda n: math.nan if n > 40 else 3.0)
    text = page(tmp_path / "run").text
    assert "Some training losses are not finite numbers" in text
    assert "reached validation loss 3.10" in text
    (tmp_path / "all").mkdir()
    record(tmp_path / "all" / "run", 100, loss=lambda n: math.nan)
    assert "has not been validated yet" in page(tmp_path / "all" / "run").text


def test_no_word_of_user_or_model_becomes_markup(tmp_path):
    record(tmp_path / "run", 40, nasty=NASTY)
    clean = tmp_path / "clean"
    record(clean, 40)
    html = write_report(tmp_path / "run").read_text(encoding="utf-8")
    assert [tag for tag, _ in Page(html).tags] == [tag for tag, _ in page(clean).tags]
    assert "alert('x')</script> & $name ${title} ␀? <b>" in Page(html).text
    assert "\x00" not in html


def test_the_page_loads_nothing(tmp_path):
    record(tmp_path / "run", 40)
    html = write_report(tmp_path / "run").read_text(encoding="utf-8")
    assert not any({"src", "href", "action", "xlink:href"} & set(attrs) for _, attrs in Page(html).tags)
    assert not re.search(r"https?:|@import|url\(", html)
    assert "default-src 'none'" in html


def test_the_time_spent_adds_up_to_the_wall_time(tmp_path):
    record(tmp_path / "run", 200)
    finish(tmp_path / "run")
    html = write_report(tmp_path / "run").read_text(encoding="utf-8")
    shares = [float(s) for s in re.findall(r'<td class="n">([\d.]+)%</td>', html)]
    assert sum(shares) == pytest.approx(100, abs=0.3)
    assert len(shares) == 6
    assert "everything else" in html


def test_samples_keep_their_spaces_and_only_some_steps_are_shown(tmp_path):
    record(tmp_path / "run", 200, every=5)
    html = write_report(tmp_path / "run").read_text(encoding="utf-8")
    shown = [int(s) for s in re.findall(r"<h3>Step (\d+)", html)]
    assert len(shown) == 8
    assert (shown[0], shown[-1]) == (5, 200)
    assert "<pre><mark>def </mark>f(x):\n    return</pre>" in html
    assert "Samples of 32 more steps" in html


def test_a_report_replaces_the_old_one_and_leaves_nothing_beside_it(tmp_path):
    record(tmp_path / "run", 20)
    write_report(tmp_path / "run")
    before = sorted(p.name for p in (tmp_path / "run").iterdir())
    write_report(tmp_path / "run")
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == before == ["config.yaml", "logs", "report.html"]


def test_metrics_are_read_without_the_torn_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert read_metrics(path) == []
    path.write_bytes(b'{"kind": "train", "step": 1}\n{"kind": "train", "step": 2}\n{"kind": "tr\xc3')
    assert [r["step"] for r in read_metrics(path)] == [1, 2]


# ---------------------------------------------------------------- curves


@given(st.floats(-1e3, 1e3), st.floats(1e-3, 1e6), st.integers(2, 10))
def test_ticks_are_round_inside_the_range_and_about_as_many_as_wanted(low, width, about):
    ticks = nice_ticks(low, low + width, about)
    assert about / 3 <= len(ticks) <= about + 1
    assert all(low - 1e-6 * width <= t <= low + width * (1 + 1e-6) for t in ticks)
    step = (ticks[-1] - ticks[0]) / (len(ticks) - 1) if len(ticks) > 1 else 1.0
    mantissa = step / 10 ** math.floor(math.log10(step) + 1e-6)
    assert min(abs(mantissa - m) for m in (1, 2, 2.5, 5)) < 1e-2


def test_thinning_keeps_every_spike_and_the_order():
    points = [(float(i), math.sin(i / 500)) for i in range(20_000)]
    points[7_777] = (7_777.0, 50.0)
    points[12_345] = (12_345.0, -50.0)
    kept = thin(points, 1000)
    assert len(kept) <= 1000
    assert {points[7_777], points[12_345]} <= set(kept)
    assert kept == sorted(kept)
    assert thin(points[:1000], 1000) == points[:1000]


def test_centred_means_do_not_lag_behind_a_straight_line():
    assert centred_means([float(i) for i in range(50)], reach=5) == pytest.approx([float(i) for i in range(50)])
    assert centred_means([1.0, None, 3.0], reach=1) == [1.0, None, 3.0]
    noisy = centred_means([1.0, 2.0] * 50, reach=10)
    assert max(noisy[10:-10]) - min(noisy[10:-10]) < 0.06


def test_a_spike_does_not_flatten_the_curve():
    low, high = value_range([1.0 + i / 100 for i in range(100)] + [1e6], from_zero=False)
    assert low < 1.0
    assert 2.0 <= high < 3.0


def test_a_chart_is_well_formed_and_its_line_breaks_at_gaps():
    points = [(1, 1.0), (2, 2.0), (3, math.nan), (4, None), (5, 1.5), (6, 1.0)]
    svg = chart([Series("a < b", points, "train")], title="x & y", x_name="step", x_words=str, y_words=str)
    root = ET.fromstring(svg.replace(" hidden>", ' hidden="">'))
    line = next(p.get("d") for p in root.iter("path") if p.get("class") == "train")
    assert line.count("M") == 2
    assert line.count("L") == 2
    coordinates = [float(n) for n in re.findall(r"[\d.]+", line)]
    assert all(0 <= n <= 1000 for n in coordinates)
    readings = json.loads(next(d for d in root.iter("div")).get("data-read"))
    assert readings[0][1] == "step 1 · 1.0"
    assert finite(points)[2] == (3, None)


def test_a_chart_of_one_point_or_none_does_not_divide_by_zero():
    words = {"title": "t", "x_name": "step", "x_words": str, "y_words": str}
    assert "M1000.0 500.0h0" in chart([Series("one", [(10, 3.0)], "held", dots=True)], **words)
    assert "nothing recorded yet" in chart([Series("none", [(1, math.nan)], "train")], **words)
