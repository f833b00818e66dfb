"""Arguments: the parser, numbers, and every setting of the tree as an option.

What belongs here: what all subcommands share before they begin. Imports ``errors``; and lazily ``config``.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from pocketlm.errors import ConfigError

if TYPE_CHECKING:
    from pocketlm.config import Config


class Parser(argparse.ArgumentParser):
    """argparse that raises our error instead of printing a usage block."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message} (see '{self.prog} --help')")


def new_parser(command: str, description: str) -> Parser:
    """The parser of a subcommand."""
    return Parser(prog=f"pocketlm {command}", description=description, allow_abbrev=False)


def parse_with_settings(parser: Parser, args: list[str]) -> tuple[argparse.Namespace, list[tuple[str, str]]]:
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


def positive(text: str) -> int:
    value = whole(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be 1 or more, not {text}")
    return value


def whole(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = -1
    if value < 0:
        raise argparse.ArgumentTypeError(f"must be a whole number, not '{text}'")
    return value


def non_negative(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a number of 0 or more, not '{text}'")
    return value


def localised(config: Config) -> Config:
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
