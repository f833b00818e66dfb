"""Settings: a typed tree, its presets, and how YAML and the command line fill it.

Rooms inside: ``mistakes`` (the words for what is wrong), ``tree`` (every setting), ``layers`` (where values come from).
"""

from pocketlm.config.layers import (
    fields,
    file_layer,
    load_config,
    load_preset,
    override_layer,
    preset_layer,
    preset_names,
)
from pocketlm.config.mistakes import nearest
from pocketlm.config.tree import (
    PHASE_SETTINGS,
    Config,
    DataConfig,
    EvaluationConfig,
    ModelConfig,
    OptimizerConfig,
    PhaseConfig,
    SafetyConfig,
    SamplingConfig,
    ScheduleConfig,
    Settings,
    TokenizerConfig,
    TrainingConfig,
)

IGNORE = -100
"""A target that is not scored: the one number on which data, loss and evaluation must agree."""

__all__ = [
    "IGNORE",
    "PHASE_SETTINGS",
    "Config",
    "DataConfig",
    "EvaluationConfig",
    "ModelConfig",
    "OptimizerConfig",
    "PhaseConfig",
    "SafetyConfig",
    "SamplingConfig",
    "ScheduleConfig",
    "Settings",
    "TokenizerConfig",
    "TrainingConfig",
    "fields",
    "file_layer",
    "load_config",
    "load_preset",
    "nearest",
    "override_layer",
    "preset_layer",
    "preset_names",
]
