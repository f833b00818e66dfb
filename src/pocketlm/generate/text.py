"""From a prompt to a text: what the terminal, the samples in training and later the app show.

What belongs here: the border between text and ids. Imports ``tokenizers``, ``generate.engine``, ``model``.

Design: a prompt that ends in a space is healed. In a byte-level BPE the space belongs to the word that follows, so
"def " as it stands ends in a token that training hardly ever saw there; we take that token back and let the model
choose among the tokens that begin with it.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from pocketlm.generate.engine import generate
from pocketlm.model.transformer import Transformer
from pocketlm.tokenizers import Tokenizer


def complete(
    model: Transformer,
    tokenizer: Tokenizer,
    prompt: str,
    *,
    max_tokens: int,
    temperature: float,
    top_k: int | None,
    seed: int | None,
) -> Iterator[str]:
    """What the model writes after ``prompt``, piece by piece as it is written, until the document's end or max_tokens.

    The empty prompt starts a document. Raises TokenizerError for text that the tokenizer cannot encode.
    """
    device = model.embed.weight.device
    ids, healed, choices = _heal(tokenizer, tokenizer.encode(prompt), prompt)
    first = None
    if choices:
        first = torch.zeros(model.config.vocab, dtype=torch.bool, device=device)
        first[choices] = True
    steps = generate(
        model,
        torch.tensor([ids or [tokenizer.separator_id]], device=device),
        max_new_tokens=max_tokens,
        temperature=temperature,
        top_k=top_k,
        seed=seed,
        stop_ids=(tokenizer.separator_id,),
        first=first,
    )
    stream = tokenizer.stream()
    for token in steps:
        if int(token) != tokenizer.separator_id:
            piece = stream.push(int(token))
            yield piece.removeprefix(healed)
            healed = ""
    yield stream.flush()


def _heal(tokenizer: Tokenizer, ids: list[int], prompt: str) -> tuple[list[int], str, list[int]]:
    """(ids, text taken back from their end, ids that begin with it); nothing is taken where nothing is gained."""
    tail = tokenizer.decode(ids[-1:]) if prompt.endswith(" ") else ""
    if tail == "" or tail.strip(" "):
        return ids, "", []
    choices = [i for i in range(tokenizer.vocab_size) if tokenizer.decode([i]).startswith(tail)]
    return (ids[:-1], tail, choices) if len(choices) > 1 else (ids, "", [])
