"""Options and folders that every test may use."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="also run the tests that take minutes")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--slow"):
        for item in items:
            if "slow" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="takes minutes: run with --slow"))


@pytest.fixture(scope="session")
def mirror() -> Path:
    """Local copies of the public corpora and tokenizers; the test is skipped where there are none."""
    folder = Path(os.environ.get("POCKETLM_MIRROR") or REPOSITORY.parent / "shared" / "data")
    if not folder.is_dir():
        pytest.skip("no local copies of WikiText-2 and the tokenizers: set POCKETLM_MIRROR")
    return folder


@pytest.fixture
def book(tmp_path: Path) -> Path:
    """A small text with some structure to learn."""
    path = tmp_path / "book.txt"
    lines = [f"{a} times {b} is {a * b}.\n" for a in range(2, 32) for b in range(2, 32)]
    path.write_text("".join(lines))
    return path
