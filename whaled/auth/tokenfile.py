"""Token files: read, with a warning about one that every user of the machine can read."""

import os
import stat
from pathlib import Path
from typing import BinaryIO, NamedTuple

from whaled.auth import tokentext

# No token is longer than 8 KiB; an environment file around it may be, and UTF-16 takes two bytes a character.
MAX_FILE_BYTES = 64 * 1024


class TokenFile(NamedTuple):
    """The token of a file. `warning` is None if only its owner and its group can read the file.

    `is_lasting` is false for a pipe, such as `<(command)` of a shell: it can be read once.
    """

    token: str
    warning: str | None
    is_lasting: bool


def read(path: Path) -> TokenFile:
    """The token in a file, in any form that `tokentext` knows. Raises ValueError that names the file, or OSError."""
    found = read_unchecked(path)
    try:
        tokentext.check(found.token)
    except ValueError as error:
        raise ValueError(f"{path} {error}") from None
    return found


def read_unchecked(path: Path) -> TokenFile:
    """What a file has in the place of a token, whether it can be one or not. Raises as `read`."""
    with path.open("rb") as file:
        info = os.fstat(file.fileno())
        token = unwrapped(file, str(path))
    return TokenFile(token, _exposure(path, info), stat.S_ISREG(info.st_mode))


def unwrapped(file: BinaryIO, name: str) -> str:
    """What an open file has in the place of a token. Raises ValueError that begins with `name`."""
    raw = file.read(MAX_FILE_BYTES + 1)
    if len(raw) > MAX_FILE_BYTES:
        raise ValueError(f"{name} holds no token: it has more than {MAX_FILE_BYTES} bytes")
    try:
        return tokentext.unwrapped(tokentext.text_of(raw))
    except ValueError as error:
        raise ValueError(f"{name} {error}") from None


def _exposure(path: Path, info: os.stat_result) -> str | None:
    mode = stat.S_IMODE(info.st_mode)
    if not stat.S_ISREG(info.st_mode) or not mode & (stat.S_IROTH | stat.S_IWOTH):
        return None
    what = "read" if mode & stat.S_IROTH else "replaced"
    return f"{path} can be {what} by every user of this machine (mode {mode:04o}); run: chmod 600 {path}"
