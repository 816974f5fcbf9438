"""The outcome of the last reload, left in a file for the process that asked for it: a signal has no answer."""

import contextlib
import errno
import os
import stat
from collections.abc import Mapping
from pathlib import Path

import msgspec
from msgspec import Struct

from whaled.replacing import replacing

# A whole address book of faults makes no longer text; what is beyond helps nobody in a terminal.
MAX_PROBLEM_CHARS = 16_000
MAX_FILE_BYTES = 8 * MAX_PROBLEM_CHARS


class Outcome(Struct, frozen=True):
    """A reload that ended. `began_s` is when it began to read, by the monotonic clock of the machine; `problem` is None
    if it was applied.
    """

    pid: int
    began_s: float
    problem: str | None = None


def outcome_path(environ: Mapping[str, str], event_log: Path) -> Path:
    """Where the outcome is left: in systemd's state directory, which a changed configuration cannot move, else beside
    the event log.
    """
    state = environ.get("STATE_DIRECTORY", "").partition(":")[0]
    if state:
        return Path(state) / "last-reload.json"
    resolved = event_log.resolve()
    return resolved.with_name(resolved.name + ".last-reload.json")


def write(path: Path, outcome: Outcome) -> None:
    """Leave an outcome, readable by this user only. Raises OSError."""
    problem = outcome.problem
    if problem is not None and len(problem) > MAX_PROBLEM_CHARS:
        problem = problem[: MAX_PROBLEM_CHARS - 1] + "\u2026"
    body = msgspec.json.encode(Outcome(outcome.pid, outcome.began_s, problem))
    with replacing(path, is_durable=False) as file:
        file.write(body)


def forget(path: Path) -> None:
    """Remove what an earlier process left."""
    with contextlib.suppress(OSError):
        path.unlink()


def read(path: Path) -> Outcome | None:
    """The last outcome; None if there is none that can be read. Root reads what another user wrote: only a file."""
    try:
        with open(path, "rb", opener=_open_file) as file:
            raw = file.read(MAX_FILE_BYTES + 1)
        return msgspec.json.decode(raw, type=Outcome) if len(raw) <= MAX_FILE_BYTES else None
    except (OSError, msgspec.MsgspecError):
        return None


def _open_file(path: str, flags: int) -> int:
    """Open no link, and nothing that waits for another process."""
    descriptor = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "no file")
    return descriptor
