"""The faults, a function for each group: what is done to a run and what must come of it.

Every function takes (bench, trial, random) for one trial, hurts a run, and raises Failure where it did not survive.
``plan`` says which trials there are.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import stat
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from bench import (
    FILES,
    STEPS,
    VARIANTS,
    Bench,
    Failure,
    Process,
    Trial,
    checkpoints_of,
    contents,
    final_hash,
    is_finished,
)

KILLS_PER_RUN = 5
Random = random.Random


# ---------------------------------------------------------------- processes that end


def strike(process: Process, random: Random, trial: Trial, number: int) -> bool:
    """Send ``number`` at a random instant, half of the time in the middle of a write; whether it hit."""
    kind = random.choices(("writing", "training", "start-up"), (0.55, 0.35, 0.10))[0]
    if kind == "start-up":
        time.sleep(random.uniform(0.1, 2.5))
    else:
        process.wait_for(process.has_begun)
    if kind == "training":
        time.sleep(random.uniform(0.0, 1.0))
    if kind == "writing":
        for _ in range(random.randint(1, 4)):
            process.wait_for(lambda: not process.is_writing())
            process.wait_for(process.is_writing, poll=0.0005)
        time.sleep(random.uniform(0.0, 0.010))
    hit = process.kill() if number == signal.SIGKILL else process.send(number)
    if hit:
        where = "in a write" if process.is_writing() else "in training" if process.has_begun() else "in start-up"
        trial.happened.append(where)
    return hit


def kill(bench: Bench, trial: Trial, random: Random) -> None:
    """SIGKILL again and again; then the run is finished."""
    out = bench.folder()
    for _ in range(KILLS_PER_RUN):
        if is_finished(out):
            break
        process = bench.start(out, trial.variant)
        if not strike(process, random, trial, signal.SIGKILL):
            process.result().expect(0)
            break
    bench.see_to_the_end(out, trial.variant)


def stop(bench: Bench, trial: Trial, random: Random) -> None:
    """A signal that asks for an end: saved at a step's boundary, exit code 130, and on."""
    out = bench.folder()
    number = getattr(signal, trial.what)
    for _ in range(3):
        if is_finished(out):
            break
        process = bench.start(out, trial.variant)
        if not strike(process, random, trial, number):
            process.result().expect(0)
            break
        # Before training begins a signal just ends the process, as it ends any other.
        started = trial.happened[-1] != "in start-up"
        result = process.result()
        # Nor is there anybody to catch it when all is done and Python is on its way out.
        done = "finished at step" in result.output
        result.expect(*((130, 0) if started and not done else (130, 0, -number)))
    bench.see_to_the_end(out, trial.variant)


# ---------------------------------------------------------------- files that are not what they were


def truncate(path: Path, random: Random, share: str) -> None:
    data = path.read_bytes()
    path.write_bytes(
        data[: {"0 bytes": 0, "1 byte": 1, "50 %": len(data) // 2, "all but 1 byte": len(data) - 1}[share]]
    )


def flip(path: Path, random: Random, _: str) -> None:
    data = bytearray(path.read_bytes())
    data[random.randrange(len(data))] ^= 1 << random.randrange(8)
    path.write_bytes(data)


def delete(path: Path, random: Random, _: str) -> None:
    path.unlink()


def swap(path: Path, random: Random, _: str) -> None:
    other = next(p for p in checkpoints_of(path.parents[2]) if p != path.parent) / path.name
    shutil.copy(other, path)


HARMS: dict[str, Callable[[Path, Random, str], None]] = {
    **{f"cut to {share}": truncate for share in ("0 bytes", "1 byte", "50 %", "all but 1 byte")},
    "one bit flipped": flip,
    "deleted": delete,
    "taken from another step": swap,
}


def damage(bench: Bench, trial: Trial, random: Random) -> None:
    """One file of the newest checkpoint is hurt: the one before it is used, and the line says so."""
    name, harm = trial.what.split(": ")
    out = bench.stopped(trial.variant, 20)
    newest = checkpoints_of(out)[0]
    HARMS[harm](newest / name, random, harm.removeprefix("cut to "))
    result = bench.run(out, trial.variant, extra={"training.keep_last": "3"}).expect(0)
    if newest.name not in result.output and not (name == "manifest.json" and harm in ("deleted", "one bit flipped")):
        raise Failure(f"nobody said that {newest.name} is damaged:\n{result.output[-2000:]}")
    bench.compare(out, trial.variant)


def all_bad(bench: Bench, trial: Trial, random: Random) -> None:
    """No checkpoint is whole: one sentence, exit code 2, nothing touched."""
    out = bench.stopped(trial.variant, 20)
    for found in checkpoints_of(out):
        flip(found / "model.safetensors", random, "")
    before = contents(out / "checkpoints")
    result = bench.run(out, trial.variant, extra={"training.keep_last": "3"}).expect(2)
    if contents(out / "checkpoints") != before or "nothing was changed" not in result.output:
        raise Failure(f"the checkpoints were touched:\n{result.output[-2000:]}")


def foreign(bench: Bench, trial: Trial, random: Random) -> None:
    """A later checkpoint of another run lies in the folder: refused by the run's number."""
    out, other = bench.stopped(trial.variant, 20), bench.stopped(trial.variant, 29)
    shutil.copytree(checkpoints_of(other)[0], out / "checkpoints" / checkpoints_of(other)[0].name)
    result = bench.run(out, trial.variant, extra={"training.keep_last": "3"}).expect(0)
    if "belongs to another run" not in result.output:
        raise Failure(f"the other run's checkpoint was not noticed:\n{result.output[-2000:]}")
    bench.compare(out, trial.variant)


# ---------------------------------------------------------------- a disk that refuses


class Tmpfs:
    """A small file system of its own, where this user may mount one."""

    def __init__(self, place: Path, size: str = "64m") -> None:
        self.place = place
        place.mkdir(parents=True, exist_ok=True)
        subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(place)], check=True, capture_output=True
        )

    def read_only(self, on: bool) -> None:
        """Retried while a file is open for writing."""
        for _ in range(2000):
            mode = "ro" if on else "rw"
            done = subprocess.run(["mount", "-o", f"remount,{mode}", str(self.place)], capture_output=True)
            if done.returncode == 0:
                return
            time.sleep(0.002)
        raise Failure("the file system could not be remounted")

    def __enter__(self) -> Tmpfs:
        return self

    def __exit__(self, *_: object) -> None:
        subprocess.run(["umount", "-l", str(self.place)], check=False, capture_output=True)


def may_mount() -> bool:
    if os.geteuid() != 0:
        return False
    probe = Path(f"/tmp/pocketlm-probe-{os.getpid()}")
    try:
        with Tmpfs(probe):
            return True
    except (subprocess.CalledProcessError, OSError):
        return False
    finally:
        probe.rmdir()


def file_limit(bench: Bench, trial: Trial, random: Random) -> None:
    """No file may grow beyond a random size: the run goes on or stops; with room again it ends as it should."""
    out = bench.folder() if random.random() < 0.5 else bench.stopped(trial.variant, 20)
    limit = int(10 ** random.uniform(2.5, 6.8))
    result = bench.run(out, trial.variant, {"file_limit": limit}).expect(0, 2)
    trial.happened.append(f"files of at most {limit:,} bytes: exit {result.code}")
    bench.see_to_the_end(out, trial.variant)


def full_disk(bench: Bench, trial: Trial, random: Random) -> None:
    """The disk fills at a random instant and is emptied a little later."""
    place = bench.folder("disk")
    with Tmpfs(place):
        out = place / "run"
        process = bench.start(out, trial.variant)
        process.wait_for(process.has_begun)
        time.sleep(random.uniform(0.0, 0.6))
        ballast = place / "ballast"
        try:
            with ballast.open("wb", buffering=0) as file:
                while True:
                    file.write(bytes(2**16))
        except OSError:
            pass
        time.sleep(random.choice((0.1, 0.5, 3.0)))
        ballast.unlink()
        result = process.result().expect(0, 2)
        trial.happened.append(f"exit {result.code}")
        bench.see_to_the_end(out, trial.variant)


def read_only(bench: Bench, trial: Trial, random: Random) -> None:
    """The checkpoints' file system turns read-only under the run, and writable again later."""
    out = bench.folder()
    process = bench.start(out, trial.variant, {"stop_at": 6})
    process.result().expect(130)
    kept = out / "kept"
    (out / "checkpoints").rename(kept)
    with Tmpfs(out / "checkpoints") as disk:
        shutil.copytree(kept, out / "checkpoints", dirs_exist_ok=True)
        if trial.what == "before the start":
            disk.read_only(True)
            result = bench.run(out, trial.variant).expect(2)
        else:
            process = bench.start(out, trial.variant)
            process.wait_for(process.has_begun)
            time.sleep(random.uniform(0.0, 0.3))
            disk.read_only(True)
            result = process.result().expect(0, 2)
        trial.happened.append(f"exit {result.code}")
        disk.read_only(False)
        bench.see_to_the_end(out, trial.variant)


def vanished(bench: Bench, trial: Trial, random: Random) -> None:
    """The checkpoints' folder is gone from one moment to the next, as a mount that drops; later it is back."""
    out = bench.folder()
    process = bench.start(out, trial.variant)
    process.wait_for(lambda: len(checkpoints_of(out)) >= 1)
    away = out.with_name("away")
    process.wait_for(lambda: not process.is_writing())
    (out / "checkpoints").rename(away)
    result = process.result().expect(0, 2)
    trial.happened.append(f"exit {result.code}")
    if (out / "checkpoints").exists():
        raise Failure("the folder was made anew")
    away.rename(out / "checkpoints")
    bench.see_to_the_end(out, trial.variant)


# ---------------------------------------------------------------- work beside training that fails


def exception(bench: Bench, trial: Trial, random: Random) -> None:
    """Evaluation, sampling or the writer raises: told, survived, and the weights are the same."""
    where, error = trial.what.split(": ")
    times = 2 if where == "writer" else 10**9
    out = bench.folder()
    result = bench.run(out, trial.variant, {"fail": where, "error": error, "times": times}).expect(0)
    word = {"evaluation": "validation at step", "sampling": "sampling at step", "writer": "could not be written"}[where]
    if word not in result.output:
        raise Failure(f"nobody said that the {where} failed:\n{result.output[-2000:]}")
    weights, _ = bench.reference(trial.variant)
    if where == "writer":
        bench.compare(out, trial.variant)
    elif weights != final_hash(out):
        raise Failure("the final weights differ from the undisturbed run's")


# ---------------------------------------------------------------- the rest of the world


def clock(bench: Bench, trial: Trial, random: Random) -> None:
    """The date jumps by months, back and forth, at every look."""
    out = bench.folder()
    bench.run(out, trial.variant, {"clock": True, "stop_at": random.randrange(2, STEPS)}).expect(130)
    bench.run(out, trial.variant, {"clock": True}).expect(0)
    bench.compare(out, trial.variant)


def two(bench: Bench, trial: Trial, random: Random) -> None:
    """Two processes want one run: one trains, the other says so and leaves."""
    out = bench.folder()
    first = bench.start(out, trial.variant)
    time.sleep(random.uniform(0.0, 0.5))
    second = bench.start(out, trial.variant)
    results = sorted((first.result(), second.result()), key=lambda r: r.code)
    results[0].expect(0)
    refused = results[1].expect(2)
    if not any(words in refused.output for words in ("by another process", "another process has just", "is finished")):
        raise Failure(f"the second process did not say why:\n{refused.output[-2000:]}")
    bench.compare(out, trial.variant)


def edges(bench: Bench, trial: Trial, random: Random) -> None:
    """Stops at chosen steps: twice inside an epoch, at its edge, right before the end, after the end."""
    out = bench.folder()
    for step in map(int, trial.what.split(", ")):
        bench.run(out, trial.variant, {"stop_at": step}).expect(130, 0)
    result = bench.run(out, trial.variant).expect(0, 2)
    if result.code == 2 and "is finished" not in result.output:
        raise Failure(result.output[-2000:])
    bench.compare(out, trial.variant)
    if "is finished" not in bench.run(out, trial.variant).expect(2).output:
        raise Failure("a finished run was trained again")


def surroundings(bench: Bench, trial: Trial, random: Random) -> None:
    """Locale, home folder, odd paths, umask."""
    env = {"locale C": {"LC_ALL": "C", "PYTHONUTF8": "0"}, "no home": {"HOME": None}}.get(trial.what, {})
    name = "a run: ünïcode 🚀 'quoted'" if trial.what == "odd path" else "run"
    umask = {"umask 077": 0o077, "umask 022": 0o022}.get(trial.what, -1)
    out = bench.folder(name)
    bench.run(out, trial.variant, {"stop_at": 10}, env=env, umask=umask).expect(130)
    bench.finish(out, trial.variant, env=env, umask=umask)
    if umask != -1:
        modes = {stat.S_IMODE((checkpoints_of(out)[0] / name).stat().st_mode) for name in FILES}
        if modes != {0o666 & ~umask}:
            raise Failure(f"modes {sorted(map(oct, modes))} under umask {umask:o}")


GROUPS: dict[str, tuple[str, Callable[[Bench, Trial, Random], None]]] = {
    "kill": ("SIGKILL at random instants, five times a run", kill),
    "stop": ("SIGTERM, SIGINT, SIGHUP at random instants", stop),
    "damage": ("a file of the newest checkpoint cut, flipped, deleted, swapped", damage),
    "all-bad": ("no checkpoint is whole", all_bad),
    "foreign": ("a later checkpoint of another run in the folder", foreign),
    "file-limit": ("no file may grow beyond a random size", file_limit),
    "full-disk": ("the disk fills at a random instant, and is emptied", full_disk),
    "read-only": ("the checkpoints' file system turns read-only", read_only),
    "vanished": ("the checkpoints' folder vanishes", vanished),
    "exception": ("evaluation, sampling or the writer raises", exception),
    "clock": ("the date jumps", clock),
    "two": ("two processes on one run", two),
    "edges": ("stops at chosen steps", edges),
    "surroundings": ("locale, home, odd paths, umask", surroundings),
}
NEEDS_MOUNT = ("full-disk", "read-only")


def plan(group: str, kills: int, thorough: bool) -> Iterator[Trial]:
    """The trials of a group. ``kills`` sets how many runs are killed; a quick plan has one or two of each group."""
    every = range(len(VARIANTS))
    if group == "kill":
        whats = [f"run {i + 1}" for i in range(-(-kills // KILLS_PER_RUN))]
    elif group == "stop":
        whats = ["SIGTERM", "SIGINT", "SIGHUP"] * (8 if thorough else 1)
    elif group == "damage":
        whats = (
            [f"{name}: {harm}" for harm in HARMS for name in FILES] if thorough else [f"{FILES[0]}: one bit flipped"]
        )
    elif group == "exception":
        errors = ("RuntimeError", "OutOfMemoryError", "MemoryError")
        whats = [f"{where}: {error}" for where in ("evaluation", "sampling") for error in errors]
        whats = [*whats, "writer: ENOSPC", "writer: RuntimeError"] if thorough else ["evaluation: OutOfMemoryError"]
    elif group == "edges":
        whats = ["1", "5, 7", "17, 18, 19", "35", "36"] if thorough else ["5, 7"]
    elif group == "surroundings":
        whats = ["locale C", "no home", "odd path", "umask 077", "umask 022"] if thorough else ["odd path"]
    elif group == "read-only":
        whats = ["before the start", *["while it runs"] * 5] if thorough else ["before the start"]
    else:
        many = {"file-limit": 24, "full-disk": 12, "vanished": 6, "clock": 6, "two": 4}
        whats = [f"trial {i + 1}" for i in range(many.get(group, 3) if thorough else 1)]
    for i, what in enumerate(whats):
        yield Trial(group, what, every[(i + i // len(every)) % len(every)], number=i)
