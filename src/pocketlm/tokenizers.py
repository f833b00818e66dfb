"""Names, files and training of tokenizers behind one small class.

What belongs here: everything that knows what a token is. Imports ``errors``, ``files``, ``config``.

Design: every tokenizer is a ``tokenizers.Tokenizer``, characters and bytes too: a merge-free BPE encodes the
1.1 million characters of Shakespeare in 0.1 s, so every run's tokenizer is a plain ``tokenizer.json`` that
``AutoTokenizer`` loads, and there is one code path for all of them.

Text is only ever text: ``"<|endoftext|>"`` inside a document is encoded as the characters it is made of, never
as the separator. SmolLM's tokenizer has no token for 21 byte values that valid text rarely holds (0x04, 0x06,
0x13 ..., none of them printable) and drops them without a word; that is its published behaviour and is kept.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import socket
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

import numpy as np
import numpy.typing as npt
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Library

from pocketlm.config import ModelConfig, TokenizerConfig
from pocketlm.errors import MissingExtraError, TokenizerError
from pocketlm.files import PICKLE_ADVICE, is_pickle

SEPARATOR = "<|endoftext|>"
Ids = npt.NDArray[np.unsignedinteger[Any]]
_ENDS = (SEPARATOR, "</s>", "<eos>", "<|end_of_text|>", "<|eot_id|>", "<|im_end|>", "[EOS]", "[SEP]")
"""What tokenizers without a ``tokenizer_config.json`` call the end of a text, likeliest first."""
_PUBLIC = {
    "gpt2": ("openai-community/gpt2", "gpt2-tokenizer"),
    "smollm": ("HuggingFaceTB/SmolLM2-135M", "smollm-tokenizer"),
    "cosmo2": ("HuggingFaceTB/cosmo2-tokenizer", "smollm-tokenizer"),
}
"""name -> (name on the Hub, folder in a mirror)."""
_INCOMPLETE = "\ufffd"
"""What a decoder shows for bytes that are not (yet) a character."""


class Tokenizer:
    """Text to ids and back. Ids are ``0 .. vocab_size - 1``, special tokens included.

    ``separator_id`` is put before every document. ``fingerprint`` is the sha256 of the tokenizer's JSON with
    sorted keys. ``safe_to_split`` says that a text may be cut between a non-space and a space or line end
    without changing its ids. ``dtype`` is the smallest unsigned type that holds every id.
    """

    def __init__(self, library: Library, name: str, separator: str) -> None:
        library.no_truncation()
        library.no_padding()
        # Marked special, the separator is out of reach of any text; the library forgets the flag when it saves.
        library.add_special_tokens([AddedToken(separator, special=True, normalized=False)])
        library.encode_special_tokens = True
        self._library = library
        self._separator = separator
        description = json.loads(library.to_str())
        self.name = name
        vocabulary = library.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values()) + 1
        self.separator_id = vocabulary[separator]
        self.fingerprint = hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()
        self.dtype: npt.DTypeLike = np.uint16 if self.vocab_size <= 2**16 else np.uint32
        self.safe_to_split = _safe_to_split(description)
        self._one_id_a_character = _has_no_merges(description) and description["pre_tokenizer"] is None

    def encode(self, text: str) -> list[int]:
        """Ids of ``text``; never adds special tokens. Raises TokenizerError (characters: for an unknown one)."""
        return [int(i) for i in self.encode_batch([text])[0]]

    def encode_batch(self, texts: Sequence[str]) -> list[Ids]:
        """Ids of every text, ``dtype`` each, on all cores. Raises TokenizerError as ``encode`` does."""
        try:
            encoded = self._library.encode_batch_fast(list(texts), add_special_tokens=False)
        except (TypeError, UnicodeEncodeError):
            raise TokenizerError("the text holds half a surrogate pair, which is no character: remove it") from None
        ids = [np.array(e.ids, dtype=self.dtype) for e in encoded]
        if self._one_id_a_character:
            for text, each in zip(texts, ids, strict=True):
                if len(text) != len(each):
                    unknown = next(c for c in text if self._library.token_to_id(c) is None)
                    raise TokenizerError(
                        f"the character {unknown!r} is not among the {self.vocab_size - 1} that the tokenizer "
                        f"'{self.name}' knows: use --tokenizer.name bytes or bpe, which know every text"
                    )
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ``ids``, special tokens by name; bytes that are no UTF-8 become U+FFFD."""
        return str(self._library.decode([int(i) for i in ids], skip_special_tokens=False))

    def stream(self) -> StreamDecoder:
        """A decoder that takes one id at a time."""
        return StreamDecoder(self)

    def save(self, folder: Path) -> None:
        """Write ``tokenizer.json`` and ``tokenizer_config.json`` for us and for ``AutoTokenizer``."""
        settings = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "name_or_path": self.name,
            "bos_token": self._separator,
            "eos_token": self._separator,
            "unk_token": None,
            "clean_up_tokenization_spaces": False,
            "model_max_length": int(1e30),
        }
        folder.mkdir(parents=True, exist_ok=True)
        texts = {
            "tokenizer.json": self._library.to_str(pretty=True),
            "tokenizer_config.json": json.dumps(settings, indent=2),
        }
        for name, text in texts.items():
            (folder / name).write_text(text, encoding="utf-8")

    @classmethod
    def from_folder(cls, folder: Path, name: str | None = None) -> Tokenizer:
        """Read a folder with ``tokenizer.json``, or that file. Raises TokenizerError."""
        file = folder / "tokenizer.json" if folder.is_dir() else folder
        if is_pickle(file):
            raise TokenizerError(f"the tokenizer file '{file}' {PICKLE_ADVICE}")
        if file.exists() and not file.is_file():
            raise TokenizerError(f"the tokenizer file '{file}' cannot be read: it is not a plain file")
        try:
            text = file.read_text(encoding="utf-8")
        except FileNotFoundError:
            raise TokenizerError(f"there is no tokenizer file '{file}': name a folder that has one") from None
        except (OSError, UnicodeDecodeError) as e:
            raise TokenizerError(f"the tokenizer file '{file}' cannot be read: {e}") from None
        settings = _settings(file.with_name("tokenizer_config.json"))
        label = name or str(settings.get("name_or_path") or file.parent.name or file)
        try:
            library = Library.from_str(text)
            return cls(library, label, _find_separator(library, settings, file))
        except TokenizerError:
            raise
        except BaseException as e:  # the library panics on some broken files, and its panic is no Exception
            if isinstance(e, (KeyboardInterrupt, SystemExit)):
                raise
            raise TokenizerError(f"'{file}' is no tokenizer that the tokenizers library reads: {_brief(e)}") from None


class StreamDecoder:
    """Text of ids that arrive one by one; the pieces joined are the text of all ids.

    The last token stays in front as context, because some decoders treat the first token of a text differently.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._sent = 0

    def push(self, token: int) -> str:
        """Characters that are certain now that ``token`` has come; "" while one is incomplete."""
        self._ids.append(int(token))
        text = self._tokenizer.decode(self._ids)
        complete = not text.endswith(_INCOMPLETE)
        piece = text[self._sent :] if complete else text[self._sent : -1]
        self._sent += len(piece)
        if complete:
            self._ids = self._ids[-1:]
            self._sent = len(self._tokenizer.decode(self._ids))
        return piece

    def flush(self) -> str:
        """What is left, an incomplete character as U+FFFD."""
        piece = self._tokenizer.decode(self._ids)[self._sent :]
        self._ids, self._sent = [], 0
        return piece


def load_tokenizer(
    config: TokenizerConfig, *, mirror: Path | None, texts: Callable[[], Iterator[str]] | None
) -> Tokenizer:
    """The tokenizer that ``config.name`` names. Raises TokenizerError, MissingExtraError.

    ``texts`` gives the corpus for ``bpe`` and ``char``. ``mirror`` is searched before the Hub. A folder that
    has the name of a built-in tokenizer is reached as ``./name``.
    """
    name = config.name
    if name == "bytes":
        return build_bytes()
    if name in ("bpe", "char"):
        if texts is None:
            raise TokenizerError(f"the tokenizer '{name}' is made from a corpus: name a finished one's folder")
        return train_bpe(texts(), config.vocab_size) if name == "bpe" else build_char(texts())
    if name in _PUBLIC:
        hub_name, folder = _PUBLIC[name]
        if mirror is not None and (mirror / folder / "tokenizer.json").is_file():
            return Tokenizer.from_folder(mirror / folder, name)
        return Tokenizer.from_folder(_download(hub_name, f", or --data.mirror a folder that holds {folder}/"), name)
    if Path(name).exists():
        return Tokenizer.from_folder(Path(name))
    if re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not name.startswith("."):
        return Tokenizer.from_folder(_download(name), name)
    known = ", ".join([*_PUBLIC, "char", "bytes", "bpe"])
    raise TokenizerError(f"there is no tokenizer '{name}': use {known}, a local folder, or a Hub name user/name")


def train_bpe(texts: Iterable[str], vocab_size: int, name: str = "bpe") -> Tokenizer:
    """Byte-level BPE with GPT-2's pre-tokenization (Radford et al., 2019), separator included in ``vocab_size``.

    Holds counts of words, not the text. A small corpus may have too few pairs to fill ``vocab_size``.
    """
    library = Library(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[SEPARATOR],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    library.train_from_iterator(texts, trainer)
    return Tokenizer(library, name, SEPARATOR)


def build_char(texts: Iterable[str]) -> Tokenizer:
    """One id a character, in sorted order from 0 as in nanoGPT; the separator comes last."""
    characters = sorted(set().union(*texts))
    if not characters:
        raise TokenizerError("the tokenizer 'char' is made from a corpus, and this one is empty")
    library = Library(models.BPE(vocab={c: i for i, c in enumerate([*characters, SEPARATOR])}, merges=[]))
    library.decoder = decoders.Fuse()
    return Tokenizer(library, "char", SEPARATOR)


def build_bytes() -> Tokenizer:
    """Id b is byte b of the UTF-8 text; the separator is 256."""
    library = Library(models.BPE(vocab={c: i for i, c in enumerate([*_byte_alphabet(), SEPARATOR])}, merges=[]))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    library.decoder = decoders.ByteLevel()
    return Tokenizer(library, "bytes", SEPARATOR)


def check_vocabulary(tokenizer: Tokenizer, model: ModelConfig) -> None:
    """Refuse an embedding that is not as large as the tokenizer. Raises TokenizerError naming both numbers."""
    have, want = model.vocab, tokenizer.vocab_size
    if have == want:
        return
    problem = (
        f"has ids up to {want - 1}, which an embedding of {have} rows cannot hold"
        if want > have
        else f"never uses the last {have - want} of {have} rows (model.vocab_multiple rounds an embedding up)"
    )
    raise TokenizerError(
        f"model.vocab_size is {have}, but the tokenizer '{tokenizer.name}' has {want} ids and {problem}: "
        f"set --model.vocab_size {want}, or choose the tokenizer that the model was made for"
    )


def _byte_alphabet() -> list[str]:
    """The printable character that stands for each byte in byte-level vocabularies (GPT-2's ``bytes_to_unicode``)."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    stand_ins = iter(range(256, 512))
    return [chr(b) if b in printable else chr(next(stand_ins)) for b in range(256)]


def _has_no_merges(description: Mapping[str, Any]) -> bool:
    model = description["model"]
    return model["type"] == "BPE" and not model["merges"] and description["normalizer"] is None


def _safe_to_split(description: Mapping[str, Any]) -> bool:
    """GPT-2's pattern allows whitespace only at the start of a word and looks ahead only inside whitespace,
    so the place between a non-space and whitespace is always an edge; splitting digits off first changes nothing."""
    model, splitter = description["model"], description["pre_tokenizer"]
    if any(not token["special"] for token in description["added_tokens"]):
        return False
    if model["type"] != "BPE" or description["normalizer"] is not None or model.get("dropout"):
        return False
    if _has_no_merges(description) and splitter is None:
        return True
    steps = splitter["pretokenizers"] if splitter and splitter["type"] == "Sequence" else [splitter or {"type": None}]
    if any(step["type"] != "Digits" for step in steps[:-1]) or steps[-1]["type"] != "ByteLevel":
        return False
    return not steps[-1]["add_prefix_space"] and (steps[-1]["use_regex"] or _has_no_merges(description))


def _settings(file: Path) -> dict[str, Any]:
    """``tokenizer_config.json``, or nothing where there is none that can be read."""
    if not file.is_file():
        return {}
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return settings if isinstance(settings, dict) else {}


def _find_separator(library: Library, settings: Mapping[str, Any], file: Path) -> str:
    """The token that ends a text, by the tokenizer's own word or by its usual names."""
    declared = settings.get("eos_token")
    if isinstance(declared, dict):
        declared = declared.get("content")
    for token in (declared, *_ENDS):
        if isinstance(token, str) and library.token_to_id(token) is not None:
            return token
    raise TokenizerError(
        f"the tokenizer '{file}' names no token for the end of a text, which must separate documents: "
        "put one that it has as eos_token into tokenizer_config.json"
    )


@contextmanager
def cache_without_network() -> Iterator[None]:
    """The Hub's libraries go to their local cache at once where the Hub's name cannot be resolved.

    They would go there after 23 s of retries. Behind a proxy names need not resolve, so it is left to them.
    """
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    if not before and not getproxies():
        try:
            socket.getaddrinfo(urlsplit(constants.ENDPOINT).hostname, None)
        except OSError:
            constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def _download(hub_name: str, hint: str = "") -> Path:
    """The folder of a tokenizer in the Hub's local cache, fetched if it is not there yet."""
    try:
        from huggingface_hub import hf_hub_download
    except ImportError:
        raise MissingExtraError("huggingface_hub", "data", f"the tokenizer '{hub_name}'") from None
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # our one sentence instead of its retries
    with cache_without_network():
        try:
            file = Path(hf_hub_download(hub_name, "tokenizer.json"))
        except Exception as e:  # whatever fails here is the network, the name or the Hub
            raise TokenizerError(
                f"the tokenizer '{hub_name}' could not be fetched from the Hub ({type(e).__name__}): check the name "
                f"and the network, or give --tokenizer.name a local folder with tokenizer.json{hint}"
            ) from None
        with suppress(Exception):  # without it the separator is found by its usual names
            hf_hub_download(hub_name, "tokenizer_config.json")
    return file.parent


def _brief(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]
