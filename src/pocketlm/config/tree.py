"""The typed tree: every setting, its type, its default and its meaning.

What belongs here: what a run is told. Imports ``errors``, ``config.mistakes``.

Design: frozen pydantic models. A default is stated once, here, and is the recipe; what follows from other settings
is a property; what a run finds out (device, vocabulary size) is written back by ``replace`` and saved with the run.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from pocketlm.config.mistakes import nearest, sentences
from pocketlm.errors import ConfigError

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
            raise ConfigError("; ".join(sentences(e, type(self).model_fields))) from None


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
    dropout: Annotated[Real, Field(ge=0, lt=1)] = 0.0
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

    @property
    def cache_folder(self) -> Path:
        """Where tokenised text is kept."""
        return Path(self.cache_dir) if self.cache_dir else Path.home() / ".cache" / "pocketlm"

    @property
    def mirror_folder(self) -> Path | None:
        """The folder that stands in for the Hub, if there is one."""
        return Path(self.mirror) if self.mirror else None


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
    """Steps between checkpoints; one is also saved before every validation and when the run stops."""
    save_in_background: bool = True
    """Copy the state (as much memory again) and write the copy while training goes on."""
    keep_last: Count = 2
    """Newest checkpoints kept besides the best."""
    keep_every: Count | None = None
    """Also keep every checkpoint whose step is a multiple of this; empty: none."""
    ema: Annotated[Real, Field(gt=0, lt=1)] | None = None
    """Decay of a moving average of the weights, which is then what is validated and used; empty: none."""
    init_from: str | None = None
    """A run whose best weights this one starts from; set by --init-from."""
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


class SafetyConfig(Settings):
    """What a run does when training goes wrong."""

    max_skipped: Count = 10
    """Steps in a row whose loss or gradient is not finite before the run stops; each is left out of the weights."""
    spike_zscore: Annotated[Real, Field(gt=0)] = 6.0
    """Standard deviations over the last 128 steps from which a loss or gradient norm is called a spike."""
    skip_spikes: bool = False
    """Leave the update of a spike out, too."""
    early_stop: Count | None = None
    """Stop after so many validations in a row without a new best; empty: never."""


PHASE_SETTINGS: dict[str, frozenset[str]] = {
    "data": frozenset(DataConfig.model_fields) - {"cache_dir", "mirror"},
    "optimizer": frozenset(OptimizerConfig.model_fields) - {"name"},
    "schedule": frozenset(ScheduleConfig.model_fields),
    "training": frozenset({"steps", "epochs", "batch_size", "window", "grad_accum"}),
}
"""What a phase may have of its own."""


class PhaseConfig(Settings):
    """What a phase changes. What it leaves out is as in the groups of the configuration."""

    data: dict[str, Any] = Field(default_factory=dict)
    """Text and batching."""
    optimizer: dict[str, Any] = Field(default_factory=dict)
    """All but the optimiser's name: its state goes on."""
    schedule: dict[str, Any] = Field(default_factory=dict)
    """Counted from the phase's first step."""
    training: dict[str, Any] = Field(default_factory=dict)
    """Length and batch: steps or epochs, batch_size, window, grad_accum."""

    @model_validator(mode="after")
    def _are_settings_of_a_phase(self) -> PhaseConfig:
        for group, allowed in PHASE_SETTINGS.items():
            for name in getattr(self, group):
                if name not in allowed:
                    hint = nearest(name, allowed) or f"; it may set {', '.join(sorted(allowed))}"
                    raise ValueError(f"a phase has no setting {group}.{name} of its own{hint}")
        return self


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
    safety: SafetyConfig = SafetyConfig()
    phases: tuple[PhaseConfig, ...] = ()
    """Stretches of training one after the other, each a layer over the groups above; empty: one, as they stand."""

    @model_validator(mode="after")
    def _phases_are_valid(self) -> Config:
        for i in range(len(self.phases)):
            try:
                self.phase(i)
            except ValidationError as e:
                raise ValueError("; ".join(f"phases.{i}.{text}" for text in sentences(e, ()))) from None
        return self

    @model_validator(mode="after")
    def _length_is_stated(self) -> Config:
        if self.phases:
            return self
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

    def phase(self, index: int) -> Config:
        """The settings in force in a phase, itself without phases. Raises pydantic's ValidationError."""
        values = self.model_dump(exclude={"phases"})
        for group, layer in self.phases[index].model_dump().items():
            if "epochs" in layer and "steps" not in layer:
                values[group]["steps"] = None
            values[group].update(layer)
        return Config.model_validate(values)

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
