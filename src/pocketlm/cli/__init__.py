"""The command line: one command, a room imported only when its subcommand runs.

What belongs here: arguments, and what a person reads before and after the work. Imports every room, lazily.

Design: argparse lists the subcommands without importing torch, so help is instant; a ``PocketError`` from below
becomes one sentence on standard error and exit code 2. Environment variables are read here and nowhere below.
"""

from __future__ import annotations

import difflib
import os
import sys
import time
from collections.abc import Callable, Sequence

from pocketlm.cli.arguments import Parser
from pocketlm.errors import ConfigError, PocketError

COMMANDS = {
    "train": "train a model: a preset, a text file or your own YAML",
    "continue": "train a run's newest model further, in a folder of its own",
    "generate": "complete a prompt with a trained model",
    "eval": "loss, perplexity and bits per byte of a run",
    "presets": "the presets and their true sizes",
    "tokenizer": "train a tokenizer, or show what one does to a text",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code (0 done, 2 a user's mistake, 130 interrupted)."""
    began = time.perf_counter()
    args = list(sys.argv[1:] if argv is None else argv)
    try:
        return _dispatch(args, began)
    except PocketError as e:
        print(f"pocketlm: error: {e}", file=sys.stderr)
        return 2
    except OSError as e:
        if isinstance(e, BrokenPipeError):
            # The reader of our output has left, as `| head` does: nobody is there to be told.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 0
        where = f"'{e.filename}': " if e.filename else ""
        print(f"pocketlm: error: the system refused: {where}{e.strerror or e}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("pocketlm: interrupted", file=sys.stderr)
        return 130


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
    run: Callable[[list[str], float], int]
    if chosen.command in ("train", "continue"):
        from pocketlm.cli import training

        run = {"train": training.train, "continue": training.continue_}[chosen.command]
    else:
        from pocketlm.cli import using

        run = {
            "generate": using.generate,
            "eval": using.evaluate,
            "presets": using.presets,
            "tokenizer": using.tokenizer,
        }[chosen.command]
    return run(rest, began)
