"""The command line: one command, a room imported only when its subcommand runs.

What belongs here: arguments, and what a person reads before and after the work. Imports every room, lazily.

Design: argparse lists the subcommands without importing torch, so help is instant; a ``PocketError`` from below
becomes one sentence on standard error and exit code 2. Environment variables are read here and nowhere below.
"""

from __future__ import annotations

import argparse
import difflib
import json
import os
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from pocketlm.errors import ConfigError, PocketError, RunError

if TYPE_CHECKING:
    from pocketlm.config import Config
    from pocketlm.train.runs import Run

COMMANDS = {
    "train": "train a model: a preset, a text file or your own YAML",
    "generate": "complete a prompt with a trained model",
    "eval": "loss, perplexity and bits per byte of a run",
    "presets": "the presets and their true sizes",
    "tokenizer": "train a tokenizer, or show what one does to a text",
}


class Parser(argparse.ArgumentParser):
    """argparse that raises our error instead of printing a usage block."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message} (see '{self.prog} --help')")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code (0 done, 2 a user's mistake, 130 interrupted)."""
    began = time.perf_counter()
    args = list(sys.argv[1:] if argv is None else argv)
    try:
        return _dispatch(args, began)
    except PocketError as e:
        print(f"pocketlm: error: {e}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("pocketlm: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader of our output has left, as `| head` does: nobody is there to be told.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _dispatch(args: list[str], began: float) -> int:
    parser = Parser(prog="pocketlm", description="Train small language models from scratch, on the hardware you have.")
    parser.add_argument("--version", action="store_true", help="print the version and exit")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", parser_class=Parser)
    for name, text in COMMANDS.items():
        commands.add_parser(name, help=text, add_help=False)
    head = args[:1]
    if head and not head[0].startswith("-") and head[0] not in COMMANDS:
        close = difflib.get_close_matches(head[0], COMMANDS, n=1)
        hint = f", did you mean {close[0]}?" if close else f"; commands: {', '.join(COMMANDS)}"
        raise ConfigError(f"unknown command '{head[0]}'{hint}")
    chosen, rest = parser.parse_known_args(head)[0], args[1:]
    if chosen.version:
        from pocketlm import __version__

        print(f"pocketlm {__version__}")
        return 0
    if chosen.command is None:
        parser.print_help()
        return 0
    run: dict[str, Callable[[list[str], float], int]] = {
        "train": _train,
        "generate": _generate,
        "eval": _evaluate,
        "presets": _presets,
        "tokenizer": _tokenizer,
    }
    return run[chosen.command](rest, began)


# ---------------------------------------------------------------- train


def _train(args: list[str], began: float) -> int:
    from pocketlm.config import override_layer

    parser = _parser("train", "Train a model. Without arguments: the demo preset on Python's standard library.")
    parser.add_argument(
        "what", nargs="?", help="a preset (see 'pocketlm presets'), a text file or folder, or a YAML file"
    )
    parser.add_argument(
        "--config", type=Path, metavar="FILE", help="your own settings as YAML, over those of the preset"
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="the run's folder (default: runs/NAME-TIME)")
    parser.add_argument("--resume", metavar="RUN", help="go on with a run: its folder, its name or latest")
    options, overrides = _parse_with_settings(parser, args)
    layer = override_layer(overrides)

    from pocketlm.train.runs import find_run, new_run

    if options.resume is not None:
        if options.what or options.config or options.out:
            raise ConfigError("--resume takes everything from the run: leave out the preset, --config and --out")
        run = find_run(options.resume)
        config = _changed(run, layer)
    else:
        name, config = _train_config(options.what, options.config, layer)
        run = _run_at(options.out, config) if options.out else new_run(name)

    from pocketlm.train.loop import train
    from pocketlm.train.setup import open_session

    session = open_session(config, run, command=f"pocketlm train {shlex.join(args)}".strip(), began=began)
    return 0 if train(session).finished else 130


def _train_config(what: str | None, file: Path | None, layer: dict[str, Any]) -> tuple[str, Config]:
    """(name of the run, configuration) from the preset, file or text that was named."""
    from pocketlm.config import file_layer, load_config, preset_layer, preset_names

    what = what or "demo"
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
    return name, _localised(load_config(*layers, layer))


def _localised(config: Config) -> Config:
    """Fill in what the environment decides, and make paths independent of the current folder."""
    from pocketlm.config import DataConfig

    data = config.data
    cache = data.cache_dir or os.environ.get("POCKETLM_CACHE")
    mirror = data.mirror or os.environ.get("POCKETLM_MIRROR")
    changes = {
        "path": str(Path(data.path).resolve()) if Path(data.path).exists() else data.path,
        "cache_dir": str(Path(cache).expanduser().resolve()) if cache else None,
        "mirror": str(Path(mirror).expanduser().resolve()) if mirror else None,
    }
    return config.model_copy(update={"data": DataConfig(**{**data.model_dump(), **changes})})


def _run_at(folder: Path, config: Config) -> Run:
    """The run at ``--out``: a new one, or one of the same settings to go on with."""
    from pocketlm.train.runs import Run

    run = Run(folder)
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return run
    if not run.config_path.is_file():
        raise RunError(f"--out '{folder}' is not empty and not a run: name another folder")
    wanted, saved = config.model_dump(), run.config().model_dump()
    other = [
        f"{group}.{name}"
        for group, settings in wanted.items()
        for name, value in settings.items()
        if value not in (None, "auto", saved[group][name])
    ]
    if other:
        raise RunError(
            f"--out '{folder}' already holds a run with other settings ({', '.join(other)}): name another folder, "
            f"or go on with that run by 'pocketlm train --resume {folder}'"
        )
    return run


def _changed(run: Run, layer: dict[str, Any]) -> Config:
    """The run's configuration with the command line over it."""
    from pocketlm.config import file_layer, load_config

    return _localised(load_config(file_layer(run.config_path), layer))


# ---------------------------------------------------------------- generate, eval


def _generate(args: list[str], began: float) -> int:
    parser = _parser("generate", "Complete a prompt; the text is written as the model makes it.")
    parser.add_argument("run", metavar="RUN", help="a run's folder, its name or latest")
    parser.add_argument("prompt", nargs="?", default="", help="text to complete (default: start a new document)")
    parser.add_argument("--max-tokens", type=_positive, metavar="N", help="tokens to write")
    parser.add_argument("--temperature", type=_non_negative, metavar="T", help="0: always the likeliest token")
    parser.add_argument("--top-k", type=_whole, metavar="K", help="sample among the K likeliest tokens; 0: all")
    parser.add_argument(
        "--seed", type=_whole, metavar="S", help="the same seed writes the same text (default: another every time)"
    )
    parser.add_argument("--checkpoint", default="best", metavar="WHICH", help="best, last or a step (default: best)")
    parser.add_argument("--device", default="auto", choices=("auto", "cuda", "mps", "cpu"))
    options = parser.parse_args(args)

    from pocketlm.train.runs import find_run

    run = find_run(options.run)
    sampling = run.config().sampling

    from pocketlm.api import load_run
    from pocketlm.generate.text import complete

    model, tokenizer = load_run(run, options.checkpoint, options.device)
    pieces = complete(
        model,
        tokenizer,
        options.prompt,
        max_tokens=options.max_tokens or sampling.max_tokens,
        temperature=sampling.temperature if options.temperature is None else options.temperature,
        top_k=sampling.top_k if options.top_k is None else options.top_k,
        seed=options.seed,
    )
    print(options.prompt, end="", flush=True)
    for piece in pieces:
        print(piece, end="", flush=True)
    print()
    return 0


def _evaluate(args: list[str], began: float) -> int:
    parser = _parser("eval", "Score a whole split and say by which protocol.")
    parser.add_argument("run", metavar="RUN", help="a run's folder, its name or latest")
    parser.add_argument("--data", metavar="PATH", help="other text to score (default: the run's own)")
    parser.add_argument("--split", default=None, metavar="NAME", help="train, validation or test (default: validation)")
    parser.add_argument("--context", type=_positive, metavar="N", help="longest context in tokens")
    parser.add_argument("--stride", type=_positive, metavar="N", help="tokens between windows (default: the context)")
    parser.add_argument("--checkpoint", default="best", metavar="WHICH", help="best, last or a step (default: best)")
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="where to write the numbers (default: in the run's folder)"
    )
    parser.add_argument("--device", default="auto", choices=("auto", "cuda", "mps", "cpu"))
    options = parser.parse_args(args)

    from pocketlm.config import file_layer, load_config
    from pocketlm.train.runs import find_run

    run = find_run(options.run)
    config = run.config()
    data = None
    if options.data is not None:
        data = _localised(load_config(file_layer(run.config_path), {"data": {"path": options.data}})).data

    from pocketlm.api import evaluate_run

    result = evaluate_run(
        run,
        data,
        options.split,
        which=options.checkpoint,
        context=options.context,
        stride=options.stride,
        device=options.device,
    )
    values = {"run": str(run.folder), "data": (data or config.data).path, "checkpoint": options.checkpoint}
    values |= result.to_dict()
    path = options.json or run.folder / f"eval-{result.split.replace(' + ', '-')}.json"
    try:
        path.write_text(json.dumps(values, indent=2))
    except OSError as e:
        raise RunError(f"the numbers cannot be written to '{path}': {e.strerror}") from None
    print(f"{values['data']}, {result.split}: {result.protocol()}")
    print(f"  loss                {result.loss:.4f} nats a token")
    print(f"  perplexity          {result.perplexity:.3f} per token, {result.word_perplexity:.3f} per word")
    print(f"  bits per byte       {result.bits_per_byte:.4f}")
    print(f"  written to          {path}")
    return 0


# ---------------------------------------------------------------- presets, tokenizer


def _presets(args: list[str], began: float) -> int:
    parser = _parser("presets", "The presets and their true numbers of parameters.")
    parser.add_argument("name", nargs="?", help="print this preset's whole configuration as YAML")
    options = parser.parse_args(args)

    from pocketlm.config import load_preset, preset_names

    if options.name:
        print(load_preset(options.name).to_yaml(), end="")
        return 0

    from pocketlm.api import parameter_count

    print(f"{'preset':<26} {'parameters':>14}  {'layers':>6} {'width':>6} {'heads':>6} {'context':>8}  data, tokenizer")
    for name in preset_names():
        config = load_preset(name)
        shape = config.model
        known = shape if shape.vocab_size else shape.replace(vocab_size=_usual_vocabulary(config))
        heads = f"{shape.n_head}/{shape.kv_heads}"
        print(
            f"{name:<26} {parameter_count(known):>14,}  {shape.n_layer:>6} {shape.n_embd:>6} {heads:>6} "
            f"{shape.block_size:>8}  {config.data.path}, {config.tokenizer.name}"
        )
    return 0


def _usual_vocabulary(config: Config) -> int:
    """Vocabulary of a preset that takes it from its corpus: Shakespeare's 65 characters and the separator."""
    return 66 if config.tokenizer.name == "char" else config.tokenizer.vocab_size


def _tokenizer(args: list[str], began: float) -> int:
    parser = _parser("tokenizer", "Train a byte-level BPE, or show what a tokenizer does to a text.")
    actions = parser.add_subparsers(dest="action", metavar="ACTION", parser_class=Parser, required=True)
    train = actions.add_parser("train", help="train a byte-level BPE on any corpus")
    train.add_argument("corpus", help="anything data.path takes: a file, a folder, stdlib, wikitext-2 ...")
    train.add_argument("--vocab-size", type=_whole, default=4096, metavar="V")
    train.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for tokenizer.json")
    show = actions.add_parser("show", help="ids and pieces of a text")
    show.add_argument("name", help="gpt2, smollm, cosmo2, bytes, a Hub name, a folder, or a run's tokenizer folder")
    show.add_argument("text")
    options = parser.parse_args(args)

    from pocketlm.config import load_preset

    demo = _localised(load_preset("demo"))
    mirror = demo.data.mirror_folder

    from pocketlm.tokenizers import load_tokenizer

    if options.action == "show":
        tokenizer = load_tokenizer(demo.tokenizer.replace(name=options.name), mirror=mirror, texts=None)
        ids = tokenizer.encode(options.text)
        print(f"{len(ids)} tokens: " + " ".join(f"{tokenizer.decode([i])!r}:{i}" for i in ids))
        return 0
    if options.out.exists() and (not options.out.is_dir() or any(options.out.iterdir())):
        raise ConfigError(f"--out '{options.out}' is not an empty folder")

    from pocketlm.data.corpora import open_corpus

    settings = demo.tokenizer.replace(name="bpe", vocab_size=options.vocab_size)
    corpus = open_corpus(demo.data.replace(path=options.corpus), mirror=mirror)
    tokenizer = load_tokenizer(settings, mirror=mirror, texts=lambda: corpus.documents("train"))
    tokenizer.save(options.out)
    print(f"{tokenizer.vocab_size:,} ids trained on {corpus.description}, written to {options.out}")
    return 0


# ---------------------------------------------------------------- arguments


def _parser(command: str, description: str) -> Parser:
    return Parser(prog=f"pocketlm {command}", description=description, allow_abbrev=False)


def _parse_with_settings(parser: Parser, args: list[str]) -> tuple[argparse.Namespace, list[tuple[str, str]]]:
    """Parse ``args``, every setting of the tree being an option; returns the options and the settings given."""
    from pocketlm.config import fields, nearest

    group = parser.add_argument_group("settings", "each also a key of your YAML; 'none' empties one that may be empty")
    for name, kind, default, meaning in fields():
        text = f"{meaning} [{'' if default is None else default}]".replace("%", "%%")
        bare = {"nargs": "?", "const": "true"} if kind.startswith("true") else {}
        group.add_argument(f"--{name}", metavar=kind.upper(), default=argparse.SUPPRESS, help=text, **bare)  # type: ignore[arg-type]
    options, unknown = parser.parse_known_args(args)
    if unknown:
        flags = [o for action in parser._actions for o in action.option_strings]
        word = unknown[0].split("=")[0]
        if not word.startswith("-"):
            raise ConfigError(f"one argument too many: '{word}' (see '{parser.prog} --help')")
        raise ConfigError(f"unknown option {word}{nearest(word, flags)}")
    given = [(name, value) for name, value in vars(options).items() if "." in name]
    return options, given


def _positive(text: str) -> int:
    value = _whole(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be 1 or more, not {text}")
    return value


def _whole(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = -1
    if value < 0:
        raise argparse.ArgumentTypeError(f"must be a whole number, not '{text}'")
    return value


def _non_negative(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a number of 0 or more, not '{text}'")
    return value
