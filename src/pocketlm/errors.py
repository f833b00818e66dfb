"""The mistakes a user can meet and fix, each one clear sentence.

What belongs here: exception classes only. Imports nothing of pocketlm.

Design: whoever detects a mistake raises one of these with the value seen, the value
wanted and the option to change; the command line prints the sentence and exits with
code 2. Anything else that escapes is a defect of ours and keeps its traceback.
"""


class PocketError(Exception):
    """A user's mistake, or something only the user can mend. Never shows a traceback."""


class ConfigError(PocketError):
    """A setting that is unknown, ill-typed, out of range or at odds with another."""


class CorpusError(PocketError):
    """Text that cannot be found, read, decoded or is too short to train on."""


class TokenizerError(PocketError):
    """A tokenizer that cannot be found or built, or does not match the model."""


class RunError(PocketError):
    """A run folder or checkpoint that is missing, damaged or in use."""


class MissingExtraError(PocketError):
    """An optional library that is not installed; the sentence carries the pip line."""

    def __init__(self, library: str, extra: str, purpose: str) -> None:
        super().__init__(
            f"{purpose} needs the library '{library}', which is not installed: pip install 'pocketlm[{extra}]'"
        )
