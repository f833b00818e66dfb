"""The public Python face: a model to build and to write text with.

What belongs here: what a user's script calls, with its arguments checked. Imports every room but ``cli``.

Design: ``SmallLanguageModel`` is the Transformer itself with one method more, so what is trained, saved and
generated from is one object. Checks live here and not in the engine: a mistake becomes a sentence once, at the
border, and the inner rooms may trust what they are given.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from pocketlm.config import DataConfig, ModelConfig
from pocketlm.data.corpora import open_corpus
from pocketlm.data.shards import prepare
from pocketlm.errors import ConfigError, PocketError, RunError
from pocketlm.evaluate.perplexity import Evaluation, evaluate, sum_up
from pocketlm.generate.engine import generate
from pocketlm.model.transformer import Transformer
from pocketlm.tokenizers import Tokenizer
from pocketlm.train.runs import Run, find_run
from pocketlm.train.runtime import decide


class SmallLanguageModel(Transformer):
    """A Transformer that writes: ``SmallLanguageModel(ModelConfig(...)).generate(ids)``."""

    def generate(
        self,
        input_ids: Tensor,
        max_length: int = 100,
        temperature: float = 1.0,
        top_k: int | None = None,
        seed: int | None = None,
        stop_ids: Collection[int] = (),
    ) -> Tensor:
        """Continue prompts: input_ids (B, T) of integers -> (B, max_length) int64, which begins with them.

        max_length counts the prompt. temperature 0 takes the likeliest token. top_k: sample among so many; None or 0:
        all. seed None: a new one each time. Shorter than max_length only if each row has met one of stop_ids, which
        a row that ends before the others repeats. Raises PocketError.
        """
        self._check(input_ids, max_length, temperature, top_k)
        tokens = input_ids.to(self.embed.weight.device, torch.int64)
        new = generate(
            self,
            tokens,
            max_new_tokens=max_length - tokens.shape[1],
            temperature=temperature,
            top_k=top_k,
            seed=seed,
            stop_ids=stop_ids,
        )
        return torch.cat((tokens, torch.stack(list(new), dim=1)), dim=1)

    def _check(self, input_ids: Tensor, max_length: int, temperature: float, top_k: int | None) -> None:
        if input_ids.ndim != 2 or input_ids.is_floating_point():
            raise PocketError(
                f"input_ids must be integers of shape (batch, time), not {input_ids.dtype} of shape "
                f"{tuple(input_ids.shape)}; one sequence is torch.tensor([ids])"
            )
        if input_ids.numel() == 0:
            raise PocketError(
                f"input_ids is empty, shape {tuple(input_ids.shape)}: give at least one token to start from"
            )
        if max_length <= input_ids.shape[1]:
            raise PocketError(
                f"max_length {max_length} counts the prompt, which has {input_ids.shape[1]} tokens: make it larger"
            )
        low, high = int(input_ids.min()), int(input_ids.max())
        if low < 0 or high >= self.config.vocab:
            raise PocketError(
                f"input_ids holds {low if low < 0 else high}, the vocabulary 0 to {self.config.vocab - 1}: "
                "encode the prompt with the tokenizer that the model was trained with"
            )
        if not 0 <= temperature < float("inf"):
            raise PocketError(f"temperature must be 0 or more, not {temperature}")
        if top_k is not None and top_k < 0:
            raise PocketError(f"top_k must be 0 or more, not {top_k}")


def load_run(run: Run | str, which: str = "best", device: str = "auto") -> tuple[SmallLanguageModel, Tokenizer]:
    """The model and tokenizer of a run (a ``Run``, its folder, its name, or ``latest``), ready to write.

    which: ``best`` by validation loss, ``last``, or a step's number. Raises PocketError.
    """
    run = find_run(run) if isinstance(run, str) else run
    config = run.config()
    weights = run.checkpoint(which).weights()
    machine = decide(config.training.replace(device=device, precision="auto"))
    model = SmallLanguageModel(config.model)
    try:
        model.load_state_dict(weights)
    except RuntimeError as e:
        raise RunError(
            f"the weights of '{run.folder}' do not fit its config.yaml: {' '.join(str(e).split())}"
        ) from None
    model.compute_dtype = machine.dtype
    return model.to(machine.device).eval(), run.tokenizer()


def evaluate_run(
    run: Run,
    data: DataConfig | None = None,
    split: str | None = None,
    *,
    which: str = "best",
    context: int | None = None,
    stride: int | None = None,
    device: str = "auto",
) -> Evaluation:
    """Score a split of the run's own text, or of other ``data``, with the run's tokenizer.

    split: ``validation`` for the run's own text. For other data ``test`` where the corpus has one, else ``all``: every
    split of it, summed. context and stride as in ``EvaluationConfig``. Raises PocketError.
    """
    config = run.config()
    model, tokenizer = load_run(run, which, device)
    corpus = open_corpus(data or config.data, mirror=(data or config.data).mirror_folder)
    cache = prepare(corpus, tokenizer, config.data.cache_folder)
    split = split or ("validation" if data is None else "test" if "test" in cache.splits else "all")
    names = list(cache.splits) if split == "all" else [split]
    if not set(names) <= set(cache.splits):
        raise ConfigError(f"there is no split '{split}' in {corpus.name}: use all, {', '.join(cache.splits)}")
    context = context or config.context
    if context > config.model.block_size:
        raise ConfigError(
            f"the context {context} is longer than the model's, {config.model.block_size}: use at most that"
        )
    if stride is not None and stride > context:
        raise ConfigError(f"the stride {stride} would skip text: use at most the context, {context}")
    return sum_up(
        [
            evaluate(
                model,
                cache.splits[name],
                name=name,
                context=context,
                stride=stride or context,
                batch_size=config.evaluation.batch_size or 2 * config.training.batch_size,
                within_documents=config.data.mode != "stream",
                device=next(model.parameters()).device,
            )
            for name in names
        ]
    )


def parameter_count(config: ModelConfig) -> int:
    """True number of parameters of a shape, counted on a model that takes no memory."""
    with torch.device("meta"):
        return Transformer(config).num_parameters()
