"""``pocketlm train`` and ``pocketlm continue``.

What belongs here: from a command line to a configuration and a run's folder. Imports every room, lazily.
"""

from __future__ import annotations

import difflib
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pocketlm.cli.arguments import localised, new_parser, parse_with_settings, positive, whole
from pocketlm.errors import ConfigError, RunError

if TYPE_CHECKING:
    from pocketlm.config import Config
    from pocketlm.train.runs import Run


def train(args: list[str], began: float) -> int:
    from pocketlm.config import override_layer

    parser = new_parser("train", "Train a model. Without arguments: the demo preset on Python's standard library.")
    parser.add_argument(
        "what", nargs="?", help="a preset (see 'pocketlm presets'), a text file or folder, or a YAML file"
    )
    parser.add_argument(
        "--config", type=Path, metavar="FILE", help="your own settings as YAML, over those of the preset"
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="the run's folder (default: runs/NAME-TIME)")
    parser.add_argument("--resume", metavar="RUN", help="go on with a run: its folder, its name or latest")
    parser.add_argument("--init-from", metavar="RUN", help="start from a run's best weights, with its tokenizer")
    parser.add_argument("--phases", type=whole, metavar="N", help="only the first N phases of the configuration")
    options, overrides = parse_with_settings(parser, args)
    layer = override_layer(overrides)

    from pocketlm.train.runs import find_run, new_run

    if options.resume is not None:
        if options.what or options.config or options.out or options.init_from or options.phases is not None:
            raise ConfigError("--resume takes everything from the run: leave out preset, --config, --out, --init-from")
        run = find_run(options.resume)
        config = _changed(run, layer)
    else:
        name, config = _train_config(options.what, options.config, layer, options.init_from, options.phases)
        run = new_run(name)
        if options.out:
            run, config = _run_at(options.out, config)

    from pocketlm.train.loop import train
    from pocketlm.train.setup import open_session

    session = open_session(config, run, command=f"pocketlm train {shlex.join(args)}".strip(), began=began)
    return 0 if train(session).finished else 130


def continue_(args: list[str], began: float) -> int:
    from pocketlm.config import override_layer

    parser = new_parser(
        "continue",
        "Train a run's newest model further: one phase more, in a new folder. The old one is only read. Without other "
        "settings the phase has a tenth of the run's learning rate and no warm-up.",
    )
    parser.add_argument("run", metavar="RUN", help="a run's folder, its name or latest")
    parser.add_argument("--steps", type=positive, required=True, metavar="N", help="steps to train on")
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="the new run's folder (default: runs/NAME-continued-TIME)"
    )
    parser.add_argument("--checkpoint", default="last", metavar="WHICH", help="best, last or a step (default: last)")
    options, overrides = parse_with_settings(parser, args)
    layer = override_layer(overrides)
    for name in ("steps", "epochs", "init_from"):
        if name in layer.get("training", {}):
            raise ConfigError(f"training.{name} does not belong to continue: its length is --steps, its start is RUN")

    from pocketlm.train.origin import continued
    from pocketlm.train.runs import find_run, new_run

    source = find_run(options.run)
    config, origin = continued(source, options.checkpoint, options.steps, layer)
    config = localised(config)
    run = new_run(f"{source.name}-continued")
    if options.out:
        run, config = _run_at(options.out, config)

    from pocketlm.train.loop import train
    from pocketlm.train.setup import open_session

    command = f"pocketlm continue {shlex.join(args)}".strip()
    session = open_session(config, run, command=command, began=began, origin=origin)
    return 0 if train(session).finished else 130


def _train_config(
    what: str | None, file: Path | None, layer: dict[str, Any], init_from: str | None, phases: int | None
) -> tuple[str, Config]:
    """(name of the run, configuration) from the preset, file or text that was named."""
    from pocketlm.config import file_layer, load_config, preset_layer, preset_names

    what = what or "demo"
    if Path(what).is_file():
        _refuse_pickle(Path(what))
    layers = [preset_layer("demo")]
    name = what
    if what in preset_names():
        layers = [preset_layer(what)]
    elif what.endswith((".yaml", ".yml")):
        layers.append(file_layer(Path(what)))
        name = Path(what).stem
    elif Path(what).exists():
        layers.append({"data": {"path": what}})
        name = Path(what).resolve().stem
    else:
        close = difflib.get_close_matches(what, preset_names(), n=1)
        hint = f", did you mean {close[0]}?" if close else f"; presets: {', '.join(preset_names())}"
        raise ConfigError(f"'{what}' is no preset, text or YAML file{hint}")
    if file is not None:
        layers.append(file_layer(file))
    if init_from is not None:
        layers.append(_starting_point(init_from, [*layers[1:], layer]))
    layers.append(layer)
    if phases is not None:
        stated: Any = next((each["phases"] for each in reversed(layers) if "phases" in each), [])
        if not isinstance(stated, list) or phases > len(stated):
            raise ConfigError(f"--phases {phases} asks for more than the configuration has: {len(stated)}")
        layers.append({"phases": stated[:phases]})
    return name, localised(load_config(*layers))


def _starting_point(name: str, layers: list[dict[str, Any]]) -> dict[str, Any]:
    """Shape and tokenizer of the run that a new one starts from. Raises PocketError where ``layers`` want others."""
    from pocketlm.train.runs import find_run

    run = find_run(name)
    run.checkpoint("best")
    shape = run.config().model.model_dump(exclude={"dropout"})
    for group, known in (("model", shape), ("tokenizer", {})):
        for layer in layers:
            stated = layer.get(group) or {}
            other = [n for n in stated if n != "dropout" and str(stated[n]) != str(known.get(n, "its own"))]
            if other:
                raise ConfigError(
                    f"--init-from takes shape and tokenizer from the run '{name}': leave out "
                    + ", ".join(f"{group}.{n}" for n in other)
                )
    folder = str(run.folder.resolve())
    return {
        "model": shape,
        "tokenizer": {"name": str(run.tokenizer_folder.resolve())},
        "training": {"init_from": folder},
    }


def _refuse_pickle(path: Path) -> None:
    from pocketlm.files import PICKLE_ADVICE, is_pickle

    if is_pickle(path):
        raise RunError(f"'{path}' {PICKLE_ADVICE}")


def _run_at(folder: Path, config: Config) -> tuple[Run, Config]:
    """The run at ``--out`` and its settings: a new one, or one of the same settings to go on with."""
    from pocketlm.train.resume import changes
    from pocketlm.train.runs import Run

    run = Run(folder)
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return run, config
    if not run.config_path.is_file():
        # A run that was killed before its first step has nothing in it but its lock and its log.
        if {path.name for path in folder.iterdir()} <= {".lock", "logs", "checkpoints", "tokenizer", "run.json"}:
            return run, config
        raise RunError(f"--out '{folder}' is not empty and not a run: name another folder")
    saved = run.config()
    local = ("data.cache_dir", "data.mirror")
    other = [name for name, _, v in changes(saved, config) if v not in (None, "auto") and name not in local]
    if other:
        raise RunError(
            f"--out '{folder}' already holds a run with other settings ({', '.join(other)}): name another folder, "
            f"or go on with that run by 'pocketlm train --resume {folder}'"
        )
    places = {"cache_dir": config.data.cache_dir, "mirror": config.data.mirror}
    return run, saved.model_copy(update={"data": saved.data.replace(**places)})


def _changed(run: Run, layer: dict[str, Any]) -> Config:
    """The run's configuration with the command line over it. Raises ConfigError."""
    from pocketlm.config import file_layer, load_config

    lengths = [f"training.{name}" for name in ("steps", "epochs") if name in layer.get("training", {})]
    if lengths and run.config().phases:
        raise ConfigError(
            f"the phases of '{run.folder}' have lengths of their own, so {lengths[0]} changes nothing: add a "
            f"phase with "
            f"'pocketlm continue {run.folder} --steps N'"
        )
    return localised(load_config(file_layer(run.config_path), layer))
