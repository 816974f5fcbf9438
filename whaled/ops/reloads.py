"""The result of the last reload, written to a file for the process that requested it, since a signal has no answer."""

import contextlib
import errno
import os
import stat
from collections.abc import Mapping
from pathlib import Path

import msgspec
from msgspec import Struct, structs

from whaled.durable import replacing

# The longest text of a problem. The faults of a whole address book fit, and more would not help in a terminal.
MAX_PROBLEM_CHARS = 16_000
MAX_FILE_BYTES = 8 * MAX_PROBLEM_CHARS


class Outcome(Struct, frozen=True):
    """The result of a reload.

    `began_s` is the time at which it began to read files, by the machine's monotonic clock. `problem` is None if the
    reload was applied. `signing_key` is the id of the key that signs since then; None: a key without an id, none, or an
    older whaled, which wrote no id.
    """

    pid: int
    began_s: float
    problem: str | None = None
    signing_key: str | None = None


def outcome_path(environ: Mapping[str, str], event_log: Path) -> Path:
    """Return the path of the result file.

    It is in systemd's state directory, which does not depend on the configuration, or else next to the event log.
    """
    state = environ.get("STATE_DIRECTORY", "").partition(":")[0]
    if state:
        return Path(state) / "last-reload.json"
    resolved = event_log.resolve()
    return resolved.with_name(resolved.name + ".last-reload.json")


def write(path: Path, outcome: Outcome) -> None:
    """Write a result, readable by this user only. Raises OSError."""
    problem = outcome.problem
    if problem is not None and len(problem) > MAX_PROBLEM_CHARS:
        problem = problem[: MAX_PROBLEM_CHARS - 1] + "\u2026"
    body = msgspec.json.encode(structs.replace(outcome, problem=problem))
    with replacing(path, is_durable=False) as file:
        file.write(body)


def forget(path: Path) -> None:
    """Remove the result of an earlier process."""
    with contextlib.suppress(OSError):
        path.unlink()


def read(path: Path) -> Outcome | None:
    """Return the last result; None if there is none that can be read.

    Root may read a file of another user here, so anything except a regular file is refused.
    """
    try:
        with open(path, "rb", opener=_open_file) as file:
            raw = file.read(MAX_FILE_BYTES + 1)
        return msgspec.json.decode(raw, type=Outcome) if len(raw) <= MAX_FILE_BYTES else None
    except (OSError, msgspec.MsgspecError):
        return None


def _open_file(path: str, flags: int) -> int:
    """Open a regular file without following links or blocking. Raises OSError."""
    descriptor = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "no file")
    return descriptor
