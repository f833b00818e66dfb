"""Files that can be trusted: written whole or not at all, and never run when they are read.

What belongs here: durable writing, and what is looked at before a file is believed. Imports ``errors``.

Design: a rename is the only moment at which a file changes, after its bytes are on the disk. Nothing is ever
unpickled: a pickle is a program, so every door through which a user's file comes in asks ``is_pickle`` first.
"""

from __future__ import annotations

import os
import stat
import zipfile
from pathlib import Path

PICKLE_SUFFIXES = (".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib")
PICKLE_ADVICE = (
    "is a pickle (torch.save's format), and reading a pickle runs whatever code it holds: "
    "give a run's folder, safetensors, or text"
)


def write_durably(path: Path, data: bytes) -> None:
    """Write a file, readable as the umask says, and flush it to the disk. Raises OSError."""
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def write_atomically(path: Path, text: str) -> None:
    """Replace a text file in one step: a reader sees the old one or the new one. Raises OSError."""
    partial = path.with_name(f"{path.name}.partial-{os.getpid()}")
    try:
        write_durably(partial, text.encode())
        partial.replace(path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise


def flush_folder(folder: Path) -> None:
    """Make the names in a folder durable; Windows has no such call and needs none. Raises OSError."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def follow_umask(path: Path) -> None:
    """Give a file the mode that the user's umask asks for; some libraries leave their files unreadable for others."""
    umask = os.umask(0)
    os.umask(umask)
    path.chmod(0o666 & ~umask)


def lies_within(path: Path, folder: Path) -> bool:
    """Whether ``path`` is a plain file in ``folder`` itself. Raises OSError when it cannot be looked at.

    A pipe or device would be read for ever, and a link may lead anywhere.
    """
    return path.resolve().parent == folder.resolve() and stat.S_ISREG(path.stat().st_mode)


def read_within(path: Path, folder: Path) -> bytes:
    """Bytes of a file that ``lies_within`` its folder. Raises OSError."""
    if not lies_within(path, folder):
        raise OSError(f"it is no plain file in '{folder}'")
    return path.read_bytes()


def is_pickle(path: Path) -> bool:
    """Whether a file, by its name or its first bytes, holds Python objects that only unpickling would read."""
    if not path.is_file():
        return False
    if path.suffix.lower() in PICKLE_SUFFIXES:
        return True
    try:
        with path.open("rb") as file:
            head = file.read(2)
            # Protocols 2 to 5 open with PROTO and their number; torch's archive is a zip with a data.pkl.
            if head[:1] == b"\x80" and head[1:] in (b"\x02", b"\x03", b"\x04", b"\x05"):
                return True
            if head == b"PK" and zipfile.is_zipfile(path):
                return any(name.endswith(".pkl") for name in zipfile.ZipFile(path).namelist())
    except (OSError, zipfile.BadZipFile):
        pass
    return False


def stranger(path: Path) -> str | None:
    """Why others could have changed what lies in ``path``, in words; nothing where only this user (or root) can.

    Says nothing on Windows, where ownership is another thing.
    """
    if os.name != "posix" or not path.exists():
        return None
    status = path.stat()
    if owner := foreign_owner(path):
        return f"it belongs to {owner}"
    if path.is_dir() and status.st_mode & stat.S_IWOTH and not status.st_mode & stat.S_ISVTX:
        return "every user may write into it"
    return None


def foreign_owner(path: Path) -> str | None:
    """Whose ``path`` is, in words; nothing where it is this user's or root's."""
    if os.name != "posix" or not path.exists() or path.stat().st_uid in (os.geteuid(), 0):
        return None
    import pwd

    uid = path.stat().st_uid
    try:
        return f"the user {pwd.getpwuid(uid).pw_name}"
    except KeyError:
        return f"another user, number {uid}"
