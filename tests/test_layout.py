"""The house is as docs/architecture.md draws it, and the README names only what exists."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from pocketlm import config
from pocketlm.cli import COMMANDS

REPOSITORY = Path(__file__).resolve().parents[1]
PACKAGE = REPOSITORY / "src" / "pocketlm"
ROOMS = ["errors", "files", "config", "tokenizers", "data", "model", "evaluate", "generate", "train", "api", "cli"]
MAY_IMPORT = {
    "errors": set(),
    "files": {"errors"},
    "config": {"errors", "files"},
    "tokenizers": {"errors", "files", "config"},
    "data": {"errors", "files", "config", "tokenizers"},
    "model": {"errors", "files", "config"},
    "evaluate": {"errors", "files", "config", "tokenizers", "data", "model"},
    "generate": {"errors", "files", "config", "tokenizers", "model"},
    "train": {"errors", "files", "config", "tokenizers", "data", "model", "evaluate", "generate"},
    "api": set(ROOMS) - {"cli", "api"},
    "cli": set(ROOMS) - {"cli"},
}
MODULES = sorted(p for p in PACKAGE.rglob("*.py") if p.name != "__main__.py")


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_rooms(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: imports are absolute"
            names = [f"{node.module}.{a.name}" for a in node.names] if node.module == "pocketlm" else [node.module]
        elif isinstance(node, ast.Import):
            names = [a.name for a in node.names]
        found |= {n.split(".")[1] for n in names if n.startswith("pocketlm.")}
    return found - {"__version__"}


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_rooms_import_only_from_above(path):
    room = room_of(path)
    if room == "__init__":
        return
    assert imported_rooms(path) - {room} <= MAY_IMPORT[room]


def test_every_room_is_on_the_page():
    page = (REPOSITORY / "docs" / "architecture.md").read_text()
    assert {room_of(p) for p in MODULES} - {"__init__"} == set(ROOMS)
    assert re.findall(r"^\| `(\w+)` \|", page, flags=re.M) == ROOMS


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_every_module_says_what_belongs_there(path):
    assert ast.get_docstring(ast.parse(path.read_text())), f"{path} has no docstring"


def test_importing_every_module_writes_nothing_and_touches_no_device(tmp_path):
    names = [".".join(("pocketlm", *p.relative_to(PACKAGE).with_suffix("").parts)) for p in MODULES]
    names = [n.removesuffix(".__init__") for n in names]
    code = (
        f"import importlib, sys\nfor n in {names!r}: importlib.import_module(n)\n"
        "import torch\nassert not torch.cuda.is_initialized()\n"
    )
    env = {"HOME": str(tmp_path), "PATH": "/usr/bin:/bin", "PYTHONPATH": str(PACKAGE.parent)}
    subprocess.run([sys.executable, "-B", "-c", code], cwd=tmp_path, env=env, check=True)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("args", [[], ["--help"], ["train", "--help"], ["train", "--modle.n_layer", "3"]], ids=str)
def test_help_and_refused_settings_import_no_torch(args):
    code = (
        f"import sys\nfrom pocketlm.cli import main\ntry: main({args!r})\nexcept SystemExit: pass\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_the_surface_of_settings_is_a_decision():
    """Adding a setting means adding it here too."""
    names = [name for name, *_ in config.fields()]
    groups = {
        g: [n.split(".")[1] for n in names if n.startswith(f"{g}.")]
        for g in config.Config.model_fields
        if g != "phases"
    }
    assert {g: len(n) for g, n in groups.items()} == {
        "model": 17,
        "tokenizer": 2,
        "data": 11,
        "optimizer": 7,
        "schedule": 4,
        "training": 19,
        "sampling": 6,
        "evaluation": 4,
        "safety": 4,
    }


@pytest.mark.parametrize("name", config.preset_names())
def test_every_preset_is_valid_and_survives_its_own_yaml(name, tmp_path):
    preset = config.load_preset(name)
    path = tmp_path / "saved.yaml"
    path.write_text(preset.to_yaml())
    assert config.load_config(config.file_layer(path)) == preset


def test_the_readme_names_only_commands_and_files_that_exist():
    text = (REPOSITORY / "README.md").read_text()
    assert set(re.findall(r"pocketlm (\w+)", "\n".join(re.findall(r"```\n.*?```", text, flags=re.S)))) <= set(COMMANDS)
    for link in re.findall(r"\]\((?!http)([^)#]+)\)", text):
        assert (REPOSITORY / link).exists(), link
    for target in re.findall(r"make ([\w-]+)", text):
        assert re.search(rf"^{target}:", (REPOSITORY / "Makefile").read_text(), flags=re.M), target
