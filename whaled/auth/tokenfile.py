"""Reading of token files, with a warning about a file that every user of the machine can read."""

import os
import stat
from pathlib import Path
from typing import BinaryIO, NamedTuple

from whaled.auth import tokentext

# A token has at most 8 KiB; the environment file that contains it may be larger, and UTF-16 takes two bytes per
# character.
MAX_FILE_BYTES = 64 * 1024


class TokenFile(NamedTuple):
    """The token of a file. `warning` is None if only the file's owner and group can read it.

    `is_lasting` is False for a pipe, such as `<(command)` of a shell, which can be read only once.
    """

    token: str
    warning: str | None
    is_lasting: bool


def read(path: Path) -> TokenFile:
    """Return the token in a file, in any form that `tokentext` accepts. Raises ValueError with the path, or OSError."""
    found = read_unchecked(path)
    try:
        tokentext.check(found.token)
    except ValueError as error:
        raise ValueError(f"{path} {error}") from None
    return found


def read_unchecked(path: Path) -> TokenFile:
    """Return the text that a file has as its token, without checking that it can be one. Raises as `read`."""
    with path.open("rb") as file:
        info = os.fstat(file.fileno())
        token = unwrapped(file, str(path))
    return TokenFile(token, _exposure(path, info), stat.S_ISREG(info.st_mode))


def unwrapped(file: BinaryIO, name: str) -> str:
    """Return the text that an open file has as its token, unchecked. Raises ValueError that begins with `name`."""
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
