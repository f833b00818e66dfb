"""What pydantic found wrong, as sentences for people.

What belongs here: the words. Imports nothing of pocketlm.

Design: pydantic reports every mistake at once, each with its place in the tree; we say the place, what is wanted,
what was seen, and for an unknown name the nearest right one.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterator

from pydantic import ValidationError


def sentences(error: ValidationError, names: Collection[str]) -> Iterator[str]:
    """Each problem as 'model.n_layer: should be a valid integer, not 'x''; ``names`` are the known settings."""
    for problem in error.errors():
        loc = [str(part) for part in problem["loc"] if isinstance(part, int) or not part.startswith("function-")]
        name = ".".join(loc)
        seen = problem.get("input")
        if problem["type"] == "extra_forbidden":
            yield f"unknown setting {name}{nearest(name, names)}"
        elif problem["type"] == "value_error":
            text = str(problem["ctx"]["error"])
            yield f"{name}: {text}" if name else text
        elif problem["type"] in ("model_type", "model_attributes_type"):
            yield f"{name}: holds a group of settings such as '{name}: {{...}}', not {seen!r:.80}"
        else:
            message = problem["msg"].replace("Input should be", "should be")
            message = message.replace("a valid tuple", "a list").replace("a valid dictionary", "a group of settings")
            yield f"{name}: {message}, not {seen!r:.80}"


def nearest(name: str, candidates: Collection[str], prefix: str = "") -> str:
    """', did you mean ...?' for the nearest known name, by whole name first and by last part second."""
    close = difflib.get_close_matches(name, list(candidates), n=1, cutoff=0.75)
    if not close:
        last = name.rsplit(".", 1)[-1]
        by_last = {c.rsplit(".", 1)[-1]: c for c in candidates}
        close = [by_last[m] for m in difflib.get_close_matches(last, list(by_last), n=1, cutoff=0.6)]
    return f", did you mean {prefix}{close[0]}?" if close else ""
