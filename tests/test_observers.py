"""Watchers tell the truth: to people on a terminal or a pipe, and to programs in metrics.jsonl."""

from __future__ import annotations

import io
import json
import math
import os
import re
import resource
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from pocketlm.errors import MissingExtraError
from pocketlm.train.events import End, Message, Observer, Record, Sample, Start, Step, Validation
from pocketlm.train.observers import MetricsFile, ProgressBar, RunningMean, TensorBoard, TextLog
from pocketlm.train.words import clock, count, duration, fit, perplexity, visible

TOTAL = 60


def start(step: int = 0) -> Start:
    return Start("demo", "runs/demo", step, TOTAL, 1234, {"data": "a book", "machine": "CPU, 2 threads, fp32"})


def step(n: int, loss: float | None = None) -> Step:
    """Step ``n`` of a run whose steps differ in tokens, loss and time, all exact in binary."""
    tokens = sum(64 * (1 + i % 3) for i in range(1, n + 1))
    seconds = sum(0.25 * (1 + i % 2) for i in range(1, n + 1))
    loss = 4.0 - n / 64 if loss is None else loss
    return Step(n, tokens, n / 16, loss, 1e-3, 0.1, 0.5, 64 * (1 + n % 3) / (0.25 * (1 + n % 2)), 10**9, seconds)


def validation(n: int) -> Validation:
    return Validation(n, step(n).tokens, step(n).seconds, 3.0, math.exp(3.0), 1.5, best=True)


def end(n: int) -> End:
    return End(n, n == TOTAL, {"folder": "runs/demo", "best_loss": 3.0, "best_step": 24, "wall_seconds": 200.0})


def play(observer: Observer, first: int, last: int, close: bool = True) -> None:
    """What the loop tells from step ``first`` to ``last``."""
    observer.on_start(start(first - 1))
    for n in range(first, last + 1):
        observer.on_step(step(n))
        if n % 12 == 0:
            observer.on_validation(validation(n))
            observer.on_sample(Sample(n, "Once ", "upon a\ntime"))
    if close:
        if last < TOTAL:
            observer.on_message(Message(last, f"stopped after step {last}"))
        observer.on_end(end(last))


def lines(path: Path) -> list[dict]:
    return [json.loads(line, parse_constant=pytest.fail) for line in path.read_text().splitlines()]


# ---------------------------------------------------------------- metrics.jsonl


def test_a_train_line_is_the_token_weighted_mean_of_its_steps(tmp_path):
    path = tmp_path / "metrics.jsonl"
    play(MetricsFile(path, log_every=10), 1, TOTAL)
    train = [r for r in lines(path) if r["kind"] == "train"]
    assert [r["step"] for r in train] == list(range(10, TOTAL + 1, 10))
    for r in train:
        window = range(r["step"] - 9, r["step"] + 1)
        weights = {n: step(n).tokens - step(n - 1).tokens for n in window}
        assert r["loss"] == pytest.approx(sum(step(n).loss * w for n, w in weights.items()) / sum(weights.values()))
        time = step(r["step"]).seconds - step(r["step"] - 10).seconds
        assert r["tokens_per_second"] == pytest.approx(sum(weights.values()) / time)
        assert (r["lr"], r["tokens"], r["seconds"]) == (1e-3, step(r["step"]).tokens, step(r["step"]).seconds)


def saved_and_restored(metrics: MetricsFile, step: int) -> dict | None:
    """The observer's state by way of a checkpoint; before the first step there is none."""
    return json.loads(json.dumps(metrics.state(), allow_nan=False)) if step else None


@pytest.mark.parametrize("stop", [0, 7, 20, 24, 33, 55, 59])
def test_an_interrupted_and_resumed_run_writes_the_file_of_an_uninterrupted_one(tmp_path, stop):
    whole, halves = tmp_path / "whole.jsonl", tmp_path / "halves.jsonl"
    play(MetricsFile(whole, log_every=10), 1, TOTAL)
    first = MetricsFile(halves, log_every=10)
    play(first, 1, stop, close=False)
    saved = saved_and_restored(first, stop)
    first.on_end(end(stop))
    play(MetricsFile(halves, 10, saved), stop + 1, TOTAL)
    assert halves.read_bytes() == whole.read_bytes()


@pytest.mark.parametrize("saved_at", [0, 20, 23])
@pytest.mark.parametrize("killed_at", [24, 38, 60])
def test_a_killed_run_resumed_from_an_older_checkpoint_writes_the_same_file(tmp_path, saved_at, killed_at):
    whole, killed = tmp_path / "whole.jsonl", tmp_path / "killed.jsonl"
    play(MetricsFile(whole, log_every=10), 1, TOTAL)
    first = MetricsFile(killed, log_every=10)
    play(first, 1, saved_at, close=False)
    saved = saved_and_restored(first, saved_at)
    for n in range(saved_at + 1, killed_at + 1):
        first.on_step(step(n))
    with killed.open("ab") as f:
        f.write(b'{"kind": "train", "step": 40, "los')
    play(MetricsFile(killed, 10, saved), saved_at + 1, TOTAL)
    assert killed.read_bytes() == whole.read_bytes()


def test_lines_that_a_full_disk_refused_are_written_when_it_takes_them_again(tmp_path):
    """The limit on a file's size stands for the disk; half a line is never left behind."""
    whole, path = tmp_path / "whole.jsonl", tmp_path / "metrics.jsonl"
    play(MetricsFile(whole, log_every=10), 1, TOTAL)
    metrics = MetricsFile(path, log_every=10)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    metrics.on_start(start())
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (600, limits[1]))
        refused = 0
        for n in range(1, 24):
            try:
                metrics.on_step(step(n))
                if n % 12 == 0:
                    metrics.on_validation(validation(n))
            except OSError:
                refused += 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert refused
    assert path.read_bytes() == whole.read_bytes()[: path.stat().st_size]
    assert path.read_bytes().endswith(b"\n")
    saved = saved_and_restored(metrics, 23)
    metrics.on_sample(Sample(12, "Once ", "upon a\ntime"))  # takes the refused lines along
    assert len(lines(path)) == 5
    again = MetricsFile(path, 10, saved)
    again.on_sample(Sample(12, "Once ", "upon a\ntime"))
    assert [r["kind"] for r in lines(path)] == ["start", "train", "validation", "train", "sample"]


def test_the_last_steps_are_written_also_off_the_grid(tmp_path):
    path = tmp_path / "metrics.jsonl"
    play(MetricsFile(path, log_every=25), 1, TOTAL)
    assert [r["step"] for r in lines(path) if r["kind"] == "train"] == [25, 50, 60]


def test_what_is_not_finite_is_left_out_of_the_mean_and_null_in_json(tmp_path):
    path = tmp_path / "metrics.jsonl"
    metrics = MetricsFile(path, log_every=2)
    for n, loss in ((1, 2.0), (2, math.nan), (3, math.inf), (4, 1.0), (5, 2.0), (6, 2.0)):
        metrics.on_step(step(n, loss))
    metrics.on_step(step(7, math.nan))
    metrics.on_step(step(8, math.nan))
    assert lines(path)[-1]["loss"] is None
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
    metrics.on_validation(Validation(6, 1, 1.0, 900.0, math.inf, math.nan, False))
    assert [r["loss"] for r in lines(path)] == [2.0, 1.0, 2.0, 900.0]
    assert lines(path)[-1]["perplexity"] is None


def test_lines_are_on_disk_at_once_and_start_is_told_once(tmp_path):
    path = tmp_path / "metrics.jsonl"
    metrics = MetricsFile(path, log_every=10)
    metrics.on_start(start())
    assert [r["kind"] for r in lines(path)] == ["start"]
    MetricsFile(path, log_every=10).on_start(start())
    assert [r["kind"] for r in lines(path)] == ["start"]


# ---------------------------------------------------------------- people


def test_the_running_mean_is_right_from_the_first_value_and_forgets():
    mean = RunningMean(memory=100)
    assert math.isnan(mean.value)
    for _ in range(3):
        mean.add(5.0)
        assert mean.value == pytest.approx(5.0)
    mean.add(math.nan)
    assert mean.value == pytest.approx(5.0)
    for _ in range(2000):
        mean.add(1.0)
    assert mean.value == pytest.approx(1.0)


def test_a_pipe_gets_few_plain_lines_and_all_that_matters():
    stream = io.StringIO()
    play(ProgressBar(stream), 1, TOTAL)
    text = stream.getvalue()
    assert "\x1b" not in text
    assert "\r" not in text
    steps = re.findall(r"^step (\d+)/60 ", text, flags=re.M)
    assert steps == ["1", "60"]
    assert "step 24  validation loss 3.000  perplexity 20.1  1.500 bits/byte  best so far" in text
    assert "data     a book" in text
    assert "  Once upon a\n  time\n" in text
    assert "finished at step 60 of 60 after 3 min 20 s" in text
    assert 'pocketlm generate runs/demo "Once upon a time"' in text
    assert max(len(line) for line in text.splitlines() if "left" not in line) <= 80


SCRIPT = """
import sys
sys.path.insert(0, {tests!r})
from test_observers import *
play(ProgressBar(), 1, 37)
"""


def terminal(columns: int, **environment: str) -> str:
    """What a real terminal of this width receives from a run that stops at step 37."""
    import fcntl
    import pty
    import struct
    import termios

    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    received = bytearray()

    def read() -> None:
        try:
            while data := os.read(ours, 65536):
                received.extend(data)
        except OSError:  # the other side has hung up
            pass

    reader = threading.Thread(target=read)
    reader.start()
    kept = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "COLUMNS")}
    code = SCRIPT.format(tests=str(Path(__file__).parent))
    env = {**kept, "TERM": "xterm", "PYTHONIOENCODING": "utf-8", **environment}
    subprocess.run([sys.executable, "-c", code], stderr=theirs, env=env, check=True)
    os.close(theirs)
    reader.join()
    os.close(ours)
    return received.decode()


@pytest.mark.skipif(sys.platform == "win32", reason="no pseudo-terminals on Windows")
def test_a_terminal_gets_a_bar_that_fits_and_a_dim_prompt():
    text = terminal(80)
    assert "\x1b[2mOnce \x1b[0mupon a" in text
    assert "pocketlm train --resume runs/demo" in text
    drawn = [re.sub(r"\x1b\[[0-9;]*[mA]", "", part) for part in re.split(r"[\r\n]", text)]
    assert any(part.startswith("█") and re.search(r"\d/60  loss ", part) for part in drawn)
    assert max(map(len, drawn)) <= 80


@pytest.mark.skipif(sys.platform == "win32", reason="no pseudo-terminals on Windows")
def test_colour_and_unicode_are_left_out_where_they_are_not_wanted():
    text = terminal(60, NO_COLOR="1", PYTHONIOENCODING="ascii")
    assert "\x1b[2m" not in text
    assert "\x1b[1m" not in text
    assert text.isascii()
    assert "upon a" in text
    assert "\r" not in terminal(60, TERM="dumb").replace("\r\n", "\n")


def test_a_narrow_line_keeps_loss_and_drops_the_rest_one_by_one():
    figures = {"loss": "loss 3.123", "average": "avg 3.1", "lr": "lr 1.0e-03", "memory": "1.2 GB", "left": "3:20 left"}
    texts = [fit("900/2,000", figures, width) for width in range(120, 10, -1)]
    assert all(len(text) <= max(width, 21) for text, width in zip(texts, range(120, 10, -1), strict=True))
    assert texts[0] == "900/2,000  loss 3.123  avg 3.1  lr 1.0e-03  1.2 GB  3:20 left"
    assert texts[-1] == "900/2,000  loss 3.123"


def test_the_log_holds_everything_and_is_appended(tmp_path):
    path = tmp_path / "train.log"
    play(TextLog(path, log_every=10), 1, 33)
    play(TextLog(path, log_every=10), 34, TOTAL)
    text = path.read_text()
    assert all(re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d  ", line) for line in text.splitlines())
    assert re.findall(r"  step (\d+)/60 ", text) == ["10", "20", "30", "40", "50", "60"]
    assert text.count("validation loss 3.000  perplexity") == 5
    assert text.count("| Once upon a\n") == 5
    assert "stopped after step 33" in text
    assert "start demo at step 33 of 60" in text


def test_text_of_a_model_cannot_steer_the_terminal(tmp_path):
    stream, path = io.StringIO(), tmp_path / "train.log"
    bar, log = ProgressBar(stream), TextLog(path, log_every=1)
    sample = Sample(1, "a\x1b[2J", "b\x1b]0;title\x07\r\x9b31m\ud800\tc")
    bar.on_sample(sample)
    log.on_sample(sample)
    assert not set(stream.getvalue() + path.read_text()) & set("\x1b\x07\r\x9b\ud800")
    assert visible("tab\tand\r\nline") == "tab\tand\nline"


@pytest.mark.parametrize(
    ("said", "words"),
    [
        (count(950), "950"),
        (count(999.7), "1k"),
        (count(12345), "12.3k"),
        (count(134_515_008), "135M"),
        (count(1.5e9), "1.5G"),
        (duration(9.97), "10 s"),
        (duration(59.7), "1 min 00 s"),
        (duration(200), "3 min 20 s"),
        (duration(7501), "2 h 05 min"),
        (duration(100000), "1 d 3 h"),
        (clock(3723), "1:02:03"),
        (perplexity(24.94), "24.9"),
        (perplexity(50257.3), "50,257"),
        (perplexity(math.inf), "infinite"),
    ],
)
def test_numbers_read_as_people_say_them(said, words):
    assert said == words


# ---------------------------------------------------------------- TensorBoard


def test_tensorboard_holds_the_same_numbers(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    play(TensorBoard(tmp_path), 1, 13)
    events = accumulator.EventAccumulator(str(tmp_path)).Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss/train")] == [(n, step(n).loss) for n in range(1, 14)]
    assert [e.step for e in events.Scalars("loss/validation")] == [12]


def test_a_missing_tensorboard_is_a_sentence_with_the_pip_line(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(MissingExtraError, match=re.escape("pip install 'pocketlm[tensorboard]'")):
        TensorBoard(tmp_path)


def test_watching_imports_no_torch():
    code = "import sys, pocketlm.train.observers, pocketlm.train.report\nassert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_record_has_a_hook():
    hooks = {name for name in vars(Observer) if name.startswith("on_")}
    assert len(hooks) == len(Record.__subclasses__())
