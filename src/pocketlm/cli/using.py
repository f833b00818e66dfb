"""``pocketlm generate``, ``eval``, ``presets`` and ``tokenizer``.

What belongs here: what a person does with a trained model, or before there is one. Imports every room, lazily.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from pocketlm.cli.arguments import Parser, localised, new_parser, non_negative, positive, whole
from pocketlm.errors import ConfigError, RunError

if TYPE_CHECKING:
    from pocketlm.config import Config


def generate(args: list[str], began: float) -> int:
    parser = new_parser("generate", "Complete a prompt; the text is written as the model makes it.")
    parser.add_argument("run", metavar="RUN", help="a run's folder, its name or latest")
    parser.add_argument("prompt", nargs="?", default="", help="text to complete (default: start a new document)")
    parser.add_argument("--max-tokens", type=positive, metavar="N", help="tokens to write")
    parser.add_argument("--temperature", type=non_negative, metavar="T", help="0: always the likeliest token")
    parser.add_argument("--top-k", type=whole, metavar="K", help="sample among the K likeliest tokens; 0: all")
    parser.add_argument(
        "--seed", type=whole, metavar="S", help="the same seed writes the same text (default: another every time)"
    )
    parser.add_argument("--checkpoint", default="best", metavar="WHICH", help="best, last or a step (default: best)")
    parser.add_argument("--device", default="auto", choices=("auto", "cuda", "mps", "cpu"))
    options = parser.parse_args(args)

    from pocketlm.train.runs import find_run

    run = find_run(options.run)
    sampling = run.config().sampling

    from pocketlm.api import load_run
    from pocketlm.generate.text import complete

    model, tokenizer = load_run(run, options.checkpoint, options.device)
    pieces = complete(
        model,
        tokenizer,
        options.prompt,
        max_tokens=options.max_tokens or sampling.max_tokens,
        temperature=sampling.temperature if options.temperature is None else options.temperature,
        top_k=sampling.top_k if options.top_k is None else options.top_k,
        seed=options.seed,
    )
    print(options.prompt, end="", flush=True)
    for piece in pieces:
        print(piece, end="", flush=True)
    print()
    return 0


def evaluate(args: list[str], began: float) -> int:
    parser = new_parser("eval", "Score a whole split and say by which protocol.")
    parser.add_argument("run", metavar="RUN", help="a run's folder, its name or latest")
    parser.add_argument("--data", metavar="PATH", help="other text to score (default: the run's own)")
    parser.add_argument("--split", default=None, metavar="NAME", help="train, validation or test (default: validation)")
    parser.add_argument("--context", type=positive, metavar="N", help="longest context in tokens")
    parser.add_argument("--stride", type=positive, metavar="N", help="tokens between windows (default: the context)")
    parser.add_argument("--checkpoint", default="best", metavar="WHICH", help="best, last or a step (default: best)")
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="where to write the numbers (default: in the run's folder)"
    )
    parser.add_argument("--device", default="auto", choices=("auto", "cuda", "mps", "cpu"))
    options = parser.parse_args(args)

    from pocketlm.config import file_layer, load_config
    from pocketlm.train.runs import find_run

    run = find_run(options.run)
    config = run.config()
    data = None
    if options.data is not None:
        data = localised(load_config(file_layer(run.config_path), {"data": {"path": options.data}})).data

    from pocketlm.api import evaluate_run

    result = evaluate_run(
        run,
        data,
        options.split,
        which=options.checkpoint,
        context=options.context,
        stride=options.stride,
        device=options.device,
    )
    values = {"run": str(run.folder), "data": (data or config.data).path, "checkpoint": options.checkpoint}
    values |= result.to_dict()
    path = options.json or run.folder / f"eval-{result.split.replace(' + ', '-')}.json"
    try:
        path.write_text(json.dumps(values, indent=2))
    except OSError as e:
        raise RunError(f"the numbers cannot be written to '{path}': {e.strerror}") from None
    print(f"{values['data']}, {result.split}: {result.protocol()}")
    print(f"  loss                {result.loss:.4f} nats a token")
    print(f"  perplexity          {result.perplexity:.3f} per token, {result.word_perplexity:.3f} per word")
    print(f"  bits per byte       {result.bits_per_byte:.4f}")
    print(f"  written to          {path}")
    return 0


# ---------------------------------------------------------------- presets, tokenizer


def presets(args: list[str], began: float) -> int:
    parser = new_parser("presets", "The presets and their true numbers of parameters.")
    parser.add_argument("name", nargs="?", help="print this preset's whole configuration as YAML")
    options = parser.parse_args(args)

    from pocketlm.config import load_preset, preset_names

    if options.name:
        print(load_preset(options.name).to_yaml(), end="")
        return 0

    from pocketlm.api import parameter_count

    print(f"{'preset':<26} {'parameters':>14}  {'layers':>6} {'width':>6} {'heads':>6} {'context':>8}  data, tokenizer")
    for name in preset_names():
        config = load_preset(name)
        shape = config.model
        known = shape if shape.vocab_size else shape.replace(vocab_size=_usual_vocabulary(config))
        heads = f"{shape.n_head}/{shape.kv_heads}"
        print(
            f"{name:<26} {parameter_count(known):>14,}  {shape.n_layer:>6} {shape.n_embd:>6} {heads:>6} "
            f"{shape.block_size:>8}  {config.data.path}, {config.tokenizer.name}"
        )
    return 0


def _usual_vocabulary(config: Config) -> int:
    """Vocabulary of a preset that takes it from its corpus: Shakespeare's 65 characters and the separator."""
    return 66 if config.tokenizer.name == "char" else config.tokenizer.vocab_size


def tokenizer(args: list[str], began: float) -> int:
    parser = new_parser("tokenizer", "Train a byte-level BPE, or show what a tokenizer does to a text.")
    actions = parser.add_subparsers(dest="action", metavar="ACTION", parser_class=Parser, required=True)
    train = actions.add_parser("train", help="train a byte-level BPE on any corpus")
    train.add_argument("corpus", help="anything data.path takes: a file, a folder, stdlib, wikitext-2 ...")
    train.add_argument("--vocab-size", type=whole, default=4096, metavar="V")
    train.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for tokenizer.json")
    show = actions.add_parser("show", help="ids and pieces of a text")
    show.add_argument("name", help="gpt2, smollm, cosmo2, bytes, a Hub name, a folder, or a run's tokenizer folder")
    show.add_argument("text")
    options = parser.parse_args(args)

    from pocketlm.config import load_preset

    demo = localised(load_preset("demo"))
    mirror = demo.data.mirror_folder

    from pocketlm.tokenizers import load_tokenizer

    if options.action == "show":
        tokenizer = load_tokenizer(demo.tokenizer.replace(name=options.name), mirror=mirror, texts=None)
        ids = tokenizer.encode(options.text)
        print(f"{len(ids)} tokens: " + " ".join(f"{tokenizer.decode([i])!r}:{i}" for i in ids))
        return 0
    if options.out.exists() and (not options.out.is_dir() or any(options.out.iterdir())):
        raise ConfigError(f"--out '{options.out}' is not an empty folder")

    from pocketlm.data.corpora import open_corpus

    settings = demo.tokenizer.replace(name="bpe", vocab_size=options.vocab_size)
    corpus = open_corpus(demo.data.replace(path=options.corpus), mirror=mirror)
    tokenizer = load_tokenizer(settings, mirror=mirror, texts=lambda: corpus.documents("train"))
    tokenizer.save(options.out)
    print(f"{tokenizer.vocab_size:,} ids trained on {corpus.description}, written to {options.out}")
    return 0
