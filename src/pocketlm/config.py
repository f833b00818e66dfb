"""The typed tree of settings, its presets, and how YAML and the command line fill it.

What belongs here: what a run is told (not what it does). Imports only ``errors``.

Design: pydantic validates, because it reports every mistake at once with its place in the
tree, from which we build sentences with the nearest right name. Settings are layered as plain
dictionaries - preset, then the user's YAML, then the command line - and validated once, so a
value has one meaning wherever it was written. The result is frozen; what a run derives
(device, vocabulary size) is written back by ``Config.replace`` and saved with the run.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from pocketlm.errors import ConfigError

IGNORE = -100
"""A target that is not scored: the one number on which data, loss and evaluation must agree."""

_SettingsT = TypeVar("_SettingsT", bound="Settings")


def _not_a_bool(value: Any) -> Any:
    """YAML's ``yes`` and ``true`` are no numbers, although Python counts with them."""
    if isinstance(value, bool):
        raise ValueError("a number is wanted here, not a truth value")
    return value


Count = Annotated[int, BeforeValidator(_not_a_bool), Field(ge=1)]
Whole = Annotated[int, BeforeValidator(_not_a_bool), Field(ge=0)]
Real = Annotated[float, BeforeValidator(_not_a_bool), Field(allow_inf_nan=False)]
Share = Annotated[float, BeforeValidator(_not_a_bool), Field(ge=0.0, le=1.0)]


class Settings(BaseModel):
    """Base of every group: frozen, and an unknown name is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, validate_default=True)

    def replace(self: _SettingsT, **changes: Any) -> _SettingsT:
        """A validated copy with these fields changed. Raises ConfigError."""
        try:
            return type(self).model_validate({**self.model_dump(), **changes})
        except ValidationError as e:
            raise ConfigError("; ".join(_sentences(e))) from None


class ModelConfig(Settings):
    """Shape of a decoder-only Transformer. Defaults are GPT-2 small (Radford et al., 2019)."""

    vocab_size: Count | None = 50257
    """Rows of the embedding that mean something; empty: as many as the tokenizer has."""
    block_size: Count = 1024
    """Context: the longest sequence in tokens."""
    n_layer: Count = 12
    """Blocks."""
    n_head: Count = 12
    """Query heads."""
    n_kv_head: Count | None = None
    """Key-value heads; empty: as many as query heads (grouped-query attention if fewer)."""
    n_embd: Count = 768
    """Width of the residual stream."""
    n_hidden: Count | None = None
    """Width inside the MLP; empty: 4 x n_embd for gelu, 8/3 x n_embd for swiglu."""
    positions: Literal["learned", "rotary"] = "learned"
    """Learned absolute positions (GPT-2) or rotary embedding of queries and keys (LLaMA)."""
    norm: Literal["layernorm", "rmsnorm"] = "layernorm"
    """LayerNorm (its shift follows `bias`) or RMSNorm."""
    mlp: Literal["gelu", "swiglu"] = "gelu"
    """Up, GELU (tanh form), down; or gate, up, SiLU, down."""
    bias: bool = True
    """Bias in linear layers and LayerNorm."""
    dropout: Share = 0.0
    """Dropout on embeddings, attention weights and residual branches."""
    tie_embeddings: bool = True
    """Output layer shares the embedding's weights."""
    rope_theta: Annotated[Real, Field(gt=0)] = 10000.0
    """Base of the rotary frequencies."""
    norm_eps: Annotated[Real, Field(gt=0)] = 1e-5
    """Added to the variance in norms."""
    init_std: Annotated[Real, Field(gt=0)] = 0.02
    """Standard deviation of initial weights; residual projections get it / sqrt(2 n_layer)."""
    vocab_multiple: Count = 1
    """Embedding rows are padded up to a multiple of this; padding is never scored or sampled."""

    @model_validator(mode="after")
    def _consistent(self) -> ModelConfig:
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd {self.n_embd} must be a multiple of n_head {self.n_head}")
        if self.n_head % self.kv_heads:
            raise ValueError(f"n_head {self.n_head} must be a multiple of n_kv_head {self.kv_heads}")
        if self.positions == "rotary" and self.head_dim % 2:
            raise ValueError(f"rotary positions need an even head size, not n_embd / n_head = {self.head_dim}")
        return self

    @property
    def kv_heads(self) -> int:
        """Key-value heads K."""
        return self.n_kv_head or self.n_head

    @property
    def head_dim(self) -> int:
        """Head size D."""
        return self.n_embd // self.n_head

    @property
    def hidden(self) -> int:
        """Width inside the MLP. The gated form has three matrices, so 8/3 keeps the size of 4x with two."""
        if self.n_hidden is not None:
            return self.n_hidden
        return 4 * self.n_embd if self.mlp == "gelu" else -(-8 * self.n_embd // 3 // 32) * 32

    @property
    def vocab(self) -> int:
        """Vocabulary V, once it is known."""
        if self.vocab_size is None:
            raise ConfigError("model.vocab_size is empty and no tokenizer has filled it: give a number")
        return self.vocab_size

    @property
    def padded_vocab(self) -> int:
        """Rows of the embedding matrix."""
        return -(-self.vocab // self.vocab_multiple) * self.vocab_multiple


class TokenizerConfig(Settings):
    """Which tokenizer turns text into ids."""

    name: str = "bpe"
    """gpt2, smollm, cosmo2, char, bytes, bpe (trained on the corpus), a Hub name, or a local folder or file."""
    vocab_size: Annotated[Count, Field(ge=257)] = 4096
    """Size of the byte-level BPE that is trained when name is bpe."""


class DataConfig(Settings):
    """Where text comes from and how it becomes batches."""

    path: str = "stdlib"
    """stdlib, shakespeare, wikitext-2; a text, jsonl or parquet file; a folder of them; or a Hub dataset user/name."""
    hub_subset: str | None = None
    """Subset (configuration) of a Hub dataset."""
    streaming: bool = False
    """Read a Hub dataset as a stream instead of downloading it whole first."""
    max_documents: Count | None = None
    """Stop after this many documents (a bound for streams); empty: all."""
    text_field: str = "text"
    """Column or key that holds the text in jsonl, parquet and Hub datasets."""
    document: Literal["auto", "file", "paragraph", "line"] = "auto"
    """What one document is in plain text; auto: the corpus's own division, else the file."""
    val_fraction: Annotated[Real, Field(gt=0, lt=1)] = 0.1
    """Share held out for validation when the corpus has no validation split of its own."""
    invalid_utf8: Literal["refuse", "replace"] = "refuse"
    """Bytes that are not UTF-8: refuse the file, or replace them with U+FFFD."""
    mode: Literal["stream", "pack", "bucket", "pad"] = "stream"
    """Contiguous windows; whole documents packed best-fit; buckets of like length; every document padded."""
    cache_dir: str | None = None
    """Where tokenised text is kept; empty: $POCKETLM_CACHE or ~/.cache/pocketlm."""
    mirror: str | None = None
    """Folder that stands in for the Hub (shakespeare/, wikitext-2/, gpt2-tokenizer/ ...); empty: $POCKETLM_MIRROR."""


class OptimizerConfig(Settings):
    """How gradients become updates."""

    name: Literal["adamw", "muon"] = "adamw"
    """AdamW for all; or Muon for the blocks' matrices and AdamW for the rest."""
    lr: Annotated[Real, Field(gt=0)] = 3e-4
    """Peak learning rate."""
    beta1: Annotated[Real, Field(ge=0, lt=1)] = 0.9
    """AdamW's decay of the first moment."""
    beta2: Annotated[Real, Field(ge=0, lt=1)] = 0.95
    """AdamW's decay of the second moment."""
    eps: Annotated[Real, Field(gt=0)] = 1e-8
    """AdamW's epsilon."""
    weight_decay: Annotated[Real, Field(ge=0)] = 0.1
    """Decoupled decay of matrices; norms and biases are never decayed."""
    grad_clip: Annotated[Real, Field(ge=0)] = 1.0
    """Largest global gradient norm; 0: no clipping."""


class ScheduleConfig(Settings):
    """Learning rate as a function of the step."""

    name: Literal["cosine", "linear", "constant", "wsd"] = "cosine"
    """Shape after warm-up; wsd: warm-up, stable, decay."""
    warmup_steps: Whole = 100
    """Steps of linear warm-up."""
    min_lr_ratio: Share = 0.1
    """Learning rate at the end, as a share of the peak."""
    decay_fraction: Share = 0.2
    """wsd: share of all steps spent in the final decay."""


class TrainingConfig(Settings):
    """The loop."""

    steps: Count | None = None
    """Optimiser steps; empty: as many as `epochs` needs."""
    epochs: Annotated[Real, Field(gt=0)] | None = None
    """Passes over the training split; used when `steps` is empty."""
    batch_size: Count = 8
    """Sequences in a micro-batch (bucket: their tokens, batch_size x window, are the budget)."""
    window: Count | None = None
    """Tokens in a training sequence; empty: the model's whole context."""
    grad_accum: Count = 1
    """Micro-batches in one optimiser step."""
    seed: Whole = 1337
    """Seed of weights, dropout and data order."""
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"
    """auto: CUDA, else MPS, else CPU."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """auto: bf16 where the processor is fast at it, else fp16 on GPUs without it, else fp32."""
    threads: Count | None = None
    """CPU threads; empty: torch's choice."""
    gradient_checkpointing: bool = False
    """Recompute blocks in the backward pass instead of keeping their activations."""
    compile: bool = False
    """torch.compile the model; falls back with one line where there is no compiler."""
    log_every: Count = 10
    """Steps between lines in metrics.jsonl."""
    save_every: Count = 500
    """Steps between checkpoints."""
    keep_last: Count = 2
    """Checkpoints kept besides the best."""
    tensorboard: bool = False
    """Also write TensorBoard events."""


class SamplingConfig(Settings):
    """Samples while training, and the defaults of `pocketlm generate`."""

    every: Whole = 500
    """Steps between samples; 0: none."""
    prompts: tuple[str, ...] = ("",)
    """Texts to complete; the empty one starts from the separator."""
    max_tokens: Count = 100
    """Tokens to write."""
    temperature: Annotated[Real, Field(ge=0)] = 0.8
    """0: always the likeliest token."""
    top_k: Whole | None = 50
    """Sample among the k likeliest tokens; empty or 0: all."""
    seed: Whole = 1337
    """Seed of the sampler."""


class EvaluationConfig(Settings):
    """Loss on the held-out split."""

    every: Whole = 250
    """Steps between validations on the whole split; 0: only at the end."""
    context: Count | None = None
    """Longest context in tokens; empty: the training window."""
    stride: Count | None = None
    """Tokens between windows; empty: the context, so that windows do not overlap."""
    batch_size: Count | None = None
    """Windows scored at once; empty: twice the training batch."""


class Config(Settings):
    """Everything a run is told. Saved as config.yaml in its folder, and enough to repeat it."""

    model: ModelConfig = ModelConfig()
    tokenizer: TokenizerConfig = TokenizerConfig()
    data: DataConfig = DataConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    training: TrainingConfig = TrainingConfig()
    sampling: SamplingConfig = SamplingConfig()
    evaluation: EvaluationConfig = EvaluationConfig()

    @model_validator(mode="after")
    def _length_is_stated(self) -> Config:
        if self.training.steps is None and self.training.epochs is None:
            raise ValueError("training.steps and training.epochs are both empty: give one of them")
        for name, length in (
            ("training.window", self.training.window),
            ("evaluation.context", self.evaluation.context),
        ):
            if length is not None and length > self.model.block_size:
                raise ValueError(
                    f"{name} {length} is longer than the model's context, model.block_size {self.model.block_size}"
                )
        if self.evaluation.stride is not None and self.evaluation.stride > self.context:
            raise ValueError(
                f"evaluation.stride {self.evaluation.stride} would skip text: at most the context, {self.context}"
            )
        return self

    @property
    def window(self) -> int:
        """Tokens in a training sequence."""
        return self.training.window or self.model.block_size

    @property
    def context(self) -> int:
        """Longest context in evaluation: what training saw, unless told otherwise."""
        return self.evaluation.context or self.window

    def to_yaml(self) -> str:
        """The whole tree as YAML; ``load_config`` of it gives an equal tree."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


# ---------------------------------------------------------------- presets, files, layers


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
        raise ConfigError("; ".join(_sentences(e))) from None


def load_preset(name: str) -> Config:
    """A preset as a validated tree."""
    return load_config(preset_layer(name))


def fields() -> Iterator[tuple[str, str, Any, str]]:
    """Every setting as (dotted name, type in words, default, meaning), in order."""
    for group, info in Config.model_fields.items():
        settings = info.annotation
        assert isinstance(settings, type) and issubclass(settings, Settings)
        for name, field in settings.model_fields.items():
            yield f"{group}.{name}", _type_words(field.annotation), field.default, field.description or ""


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


def _sentences(error: ValidationError) -> Iterator[str]:
    """Each problem as 'model.n_layer: wants a whole number, not 'x''."""
    for problem in error.errors():
        loc = [str(part) for part in problem["loc"] if isinstance(part, int) or not part.startswith("function-")]
        name = ".".join(loc)
        seen = problem.get("input")
        if problem["type"] == "extra_forbidden":
            yield f"unknown setting {name}{nearest(name, [n for n, *_ in fields()] + list(Config.model_fields))}"
        elif problem["type"] == "value_error":
            text = str(problem["ctx"]["error"])
            yield f"{name}: {text}" if name else text
        elif problem["type"] in ("model_type", "model_attributes_type"):
            yield f"{name}: holds a group of settings such as '{name}: {{...}}', not {seen!r:.80}"
        else:
            message = problem["msg"].replace("Input should be", "should be")
            yield f"{name}: {message}, not {seen!r:.80}"


def nearest(name: str, candidates: Sequence[str], prefix: str = "") -> str:
    """', did you mean ...?' for the nearest known name, by whole name first and by last part second."""
    close = difflib.get_close_matches(name, candidates, n=1, cutoff=0.75)
    if not close:
        last = name.rsplit(".", 1)[-1]
        by_last = {c.rsplit(".", 1)[-1]: c for c in candidates}
        close = [by_last[m] for m in difflib.get_close_matches(last, list(by_last), n=1, cutoff=0.6)]
    return f", did you mean {prefix}{close[0]}?" if close else ""
