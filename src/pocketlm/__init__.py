"""Train small language models from scratch, on the hardware you have and your own text.

What belongs here: the public names, nothing else.

Design: names are looked up when they are first used (PEP 562), so that ``import pocketlm`` costs no import
of torch, which takes 1.9 s.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pocketlm.api import SmallLanguageModel as SmallLanguageModel
    from pocketlm.config import Config as Config
    from pocketlm.config import ModelConfig as ModelConfig
    from pocketlm.config import load_preset as load_preset

__version__ = "0.1.0"

_HOMES = {
    "SmallLanguageModel": "pocketlm.api",
    "Config": "pocketlm.config",
    "ModelConfig": "pocketlm.config",
    "load_preset": "pocketlm.config",
}
__all__ = ["Config", "ModelConfig", "SmallLanguageModel", "__version__", "load_preset"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'pocketlm' has no attribute '{name}'")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
