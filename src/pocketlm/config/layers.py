"""Presets, YAML files and the command line as layers over each other.

What belongs here: where values come from. Imports ``errors``, ``files``, ``config.tree``, ``config.mistakes``.

Design: a layer is a plain dictionary - preset, then the user's YAML, then the command line - and only their sum is
validated, once, so that a value means the same wherever it was written.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import ValidationError

from pocketlm.config.mistakes import nearest, sentences
from pocketlm.config.tree import Config, Settings
from pocketlm.errors import ConfigError
from pocketlm.files import PICKLE_ADVICE, is_pickle


def preset_names() -> list[str]:
    """Names of the presets that ship with the package, sorted."""
    return sorted(p.name.removesuffix(".yaml") for p in _preset_folder().iterdir() if p.name.endswith(".yaml"))


def preset_layer(name: str) -> dict[str, Any]:
    """A preset's settings as a plain dictionary. Raises ConfigError with the nearest name."""
    if name not in preset_names():
        raise ConfigError(
            f"there is no preset '{name}'{nearest(name, preset_names())}; presets: {', '.join(preset_names())}"
        )
    return _parse_yaml((_preset_folder() / f"{name}.yaml").read_text(encoding="utf-8"), f"preset {name}")


def file_layer(path: Path) -> dict[str, Any]:
    """A YAML file's settings as a plain dictionary. Raises ConfigError."""
    if is_pickle(path):
        raise ConfigError(f"'{path}' {PICKLE_ADVICE}")
    if path.exists() and not path.is_file():
        raise ConfigError(f"the configuration file '{path}' cannot be read: it is not a plain file")
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"there is no configuration file '{path}'") from None
    except (OSError, UnicodeDecodeError) as e:
        raise ConfigError(f"the configuration file '{path}' cannot be read: {e}") from None
    return _parse_yaml(text, f"'{path}'")


def load_config(*layers: Mapping[str, Any]) -> Config:
    """Validate layered settings, later ones winning. Raises ConfigError naming every mistake."""
    merged: dict[str, Any] = {}
    for layer in layers:
        _merge(merged, layer)
        given = layer.get("training")
        if isinstance(given, Mapping) and "epochs" in given and "steps" not in given:
            merged["training"]["steps"] = None  # whoever asks for epochs does not mean the steps of a layer below
    try:
        return Config.model_validate(merged)
    except ValidationError as e:
        names = [*Config.model_fields, *(name for name, *_ in fields())]
        raise ConfigError("; ".join(sentences(e, names))) from None


def load_preset(name: str) -> Config:
    """A preset as a validated tree."""
    return load_config(preset_layer(name))


def override_layer(pairs: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """Command-line pairs such as ("model.n_layer", "4") as a layer. Raises ConfigError for unknown names."""
    known = {name: kind for name, kind, _, _ in fields()}
    layer: dict[str, Any] = {}
    for name, text in pairs:
        if name not in known:
            raise ConfigError(f"unknown setting --{name}{nearest(name, list(known), prefix='--')}")
        group, field = name.split(".", 1)
        layer.setdefault(group, {})[field] = _from_text(text, known[name])
    return layer


def _preset_folder() -> Any:
    return resources.files("pocketlm") / "presets"


def _parse_yaml(text: str, where: str) -> dict[str, Any]:
    try:
        data = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as e:
        problem = " ".join(str(e).split())
        raise ConfigError(f"{where} is not valid YAML: {problem}") from None
    if data is None:
        return {}
    if not isinstance(data, dict) or not all(isinstance(key, str) for key in data):
        raise ConfigError(f"{where} must be a mapping of settings such as 'model: {{n_layer: 4}}', not {data!r:.80}")
    return data


def _merge(into: dict[str, Any], layer: Mapping[str, Any]) -> None:
    for key, value in layer.items():
        if isinstance(value, Mapping) and isinstance(into.get(key), dict):
            _merge(into[key], value)
        else:
            into[key] = dict(value) if isinstance(value, Mapping) else value


def _from_text(text: str, kind: str) -> Any:
    """A command-line word as the value YAML would hold; pydantic turns digits into numbers."""
    if "empty" in kind and text.lower() in ("", "none", "null"):
        return None
    if kind.startswith("list"):
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError:
            value = text
        return value if isinstance(value, list) else [text]
    return text


def fields() -> Iterator[tuple[str, str, Any, str]]:
    """Every setting as (dotted name, type in words, default, meaning), in order; phases are no single setting."""
    for group, info in Config.model_fields.items():
        settings = info.annotation
        if isinstance(settings, type) and issubclass(settings, Settings):
            for name, field in settings.model_fields.items():
                yield f"{group}.{name}", _type_words(field.annotation), field.default, field.description or ""


def _type_words(annotation: Any) -> str:
    """'int', 'float or empty', 'adamw | muon' ... for help and for parsing the command line."""
    args = get_args(annotation)
    if getattr(annotation, "__metadata__", None):
        return _type_words(args[0])
    if type(None) in args:
        return _type_words(next(a for a in args if a is not type(None))) + " or empty"
    if args and all(isinstance(a, str) for a in args):
        return " | ".join(args)
    if getattr(annotation, "__origin__", None) is tuple:
        return "list of text"
    name: str = annotation.__name__
    return {"str": "text", "bool": "true | false"}.get(name, name)
