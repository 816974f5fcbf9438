"""The client of the admin API, for the commands. It blocks."""

import errno
import http.client
import os
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

import msgspec

from whaled.admin.sockets import reachable
from whaled.admin.views import ErrorBody
from whaled.errors import OperatorError, WhaledError

# A page of 500 connections is 150 KB; a response beyond this limit is not whaled's.
MAX_RESPONSE_BYTES = 16 * 1024 * 1024
TIMEOUT_S = 10.0

T = TypeVar("T")


class NoDaemonError(WhaledError):
    """Nothing listens at the path of the socket."""


class NoResponseError(WhaledError):
    """The daemon does not respond in time."""


class RefusedError(WhaledError):
    """The daemon refused the call. `code` is that of its error."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: Path, timeout_s: float) -> None:
        super().__init__("localhost", timeout=timeout_s)
        self._path = path

    def connect(self) -> None:
        """Connect to the Unix socket."""
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        with reachable(self._path) as address:
            self.sock.connect(address)


class Door:
    """The way to one daemon: the first of `paths` at which a socket is."""

    def __init__(self, paths: list[Path], timeout_s: float = TIMEOUT_S) -> None:
        self.path = next((path for path in paths if os.path.lexists(path)), paths[0])
        self._timeout_s = timeout_s

    def get(self, target: str, answer: type[T]) -> T:
        """Call an act without parameters in its body. Raises NoDaemonError, RefusedError or WhaledError."""
        return self._call("GET", target, None, answer)

    def post(self, target: str, body: Mapping[str, object], answer: type[T]) -> T:
        """Call an act that changes something. Raises as `get`."""
        return self._call("POST", target, msgspec.json.encode(body), answer)

    def _call(self, method: str, target: str, body: bytes | None, answer: type[T]) -> T:
        connection = _UnixConnection(self.path, self._timeout_s)
        try:
            connection.request(method, target, body)
            response = connection.getresponse()
            raw = response.read(MAX_RESPONSE_BYTES + 1)
            if response.status == http.client.OK and len(raw) <= MAX_RESPONSE_BYTES:
                return msgspec.json.decode(raw, type=answer)
            error = msgspec.json.decode(raw, type=ErrorBody).error
        except TimeoutError:
            raise NoResponseError(f"no response on {self.path} within {self._timeout_s:g} s") from None
        except OSError as failed:
            raise self._unreachable(failed) from failed
        except (http.client.HTTPException, msgspec.MsgspecError, ValueError) as failed:
            raise WhaledError(f"{self.path}: the response is not one of whaled's admin API") from failed
        finally:
            connection.close()
        raise RefusedError(error.code, error.message)

    def _unreachable(self, error: OSError) -> WhaledError:
        path = self.path
        if error.errno in {errno.ENOENT, errno.ECONNREFUSED, errno.ENOTDIR}:
            return NoDaemonError(
                f"no whaled listens on {path}: start it (systemctl start whaled), or name the socket of a running one "
                "with --socket, --config or --db-path"
            )
        if error.errno in {errno.EACCES, errno.EPERM}:
            return OperatorError(f"{path}: {error.strerror}: run this as root, or as the user whaled runs as")
        return WhaledError(f"{path}: {error.strerror or error}; is whaled running?")
