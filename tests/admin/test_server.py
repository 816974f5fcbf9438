"""What the server of the admin API refuses, and how."""

import asyncio
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from kit.admin import running_admin
from whaled.admin.calls import Call, Route

# Sends one request as nobody over a connected socket's path below the directory that is open as a descriptor.
AS_NOBODY = r"""
import os, socket, sys
os.setgroups([]); os.setgid(65534); os.setuid(65534)
sock = socket.socket(socket.AF_UNIX)
sock.settimeout(20)
sock.connect(f"/proc/self/fd/{sys.argv[1]}/admin.sock")
sock.sendall(b"POST /v1/reload HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n")
while data := sock.recv(4096):
    sys.stdout.buffer.write(data)
"""


async def raw(path: Path, data: bytes) -> bytes:
    """Send bytes, and return everything until the server closes."""
    reader, writer = await asyncio.open_unix_connection(str(path))
    writer.write(data)
    async with asyncio.timeout(20):
        found = await reader.read()
    writer.close()
    return found


@pytest.mark.parametrize(
    ("method", "target", "body", "status", "code"),
    [
        ("GET", "/v2/status", None, 404, "not_found"),
        ("GET", "/v1/reload", None, 405, "method_not_allowed"),
        ("POST", "/v1/reload", b"{", 400, "bad_request"),
        ("POST", "/v1/reload", b"[]", 400, "bad_request"),
        ("POST", "/v1/reload", b"\xff", 400, "bad_request"),
        ("POST", "/v1/reload", b"[" * 60_000, 400, "bad_request"),
        ("POST", "/v1/reload", b'{"a": 1}', 400, "bad_request"),
        ("POST", "/v1/reload", b" " * (64 * 1024 + 1), 413, "too_large"),
    ],
)
async def test_a_bad_request_gets_one_json_error(
    tmp_path: Path, method: str, target: str, body: bytes | None, status: int, code: str
) -> None:
    async with running_admin(tmp_path) as admin:
        found, answer = await admin.call(method, target, body)
        assert (found, answer["error"]["code"], answer.keys()) == (status, code, {"error"})
        assert admin.reloads.ended_at is None


@pytest.mark.parametrize(
    "data", [b"\x16\x03\x01 hello\r\n\r\n", b"GET / HTTP/1.1\r\nA: " + b"x" * 20_000 + b"\r\n\r\n"]
)
async def test_what_is_no_request_gets_a_json_error_and_an_end(tmp_path: Path, data: bytes) -> None:
    async with running_admin(tmp_path) as admin:
        head, _, body = (await raw(admin.path, data)).partition(b"\r\n\r\n")
        assert head.startswith((b"HTTP/1.1 4", b"HTTP/1.0 4"))
        assert json.loads(body)["error"]["message"]


async def test_a_body_that_does_not_arrive_ends_the_request(tmp_path: Path) -> None:
    async with running_admin(tmp_path, header_timeout=0.05) as admin:
        answer = await raw(admin.path, b"POST /v1/reload HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\n")
        assert answer.startswith(b"HTTP/1.1 408")
        assert b'"timeout"' in answer


async def test_idle_connections_beyond_the_limit_give_way(tmp_path: Path) -> None:
    async with running_admin(tmp_path, max_connections=2) as admin:
        idle = [await asyncio.open_unix_connection(str(admin.path)) for _ in range(4)]
        assert (await admin.call("GET", "/v1/version"))[0] == 200
        assert admin.gateway.value("whaled_admin_connections_cut_total", reason="displaced") >= 1
        for _, writer in idle:
            writer.close()


async def test_a_bug_in_an_act_is_an_error_and_the_server_goes_on(tmp_path: Path) -> None:
    async def broken(call: Call) -> object:
        raise ZeroDivisionError(call.actor)

    async with running_admin(tmp_path, routes=[Route("GET", "/v1/broken", broken)]) as admin:
        status, error = await admin.call("GET", "/v1/broken")
        assert (status, error["error"]["code"]) == (500, "internal")
        assert (await admin.call("GET", "/v1/version"))[0] == 200


async def test_an_act_is_given_who_called(tmp_path: Path) -> None:
    async def who(call: Call) -> object:
        return {"actor": call.actor, "origin": call.origin, "body": call.body}

    async with running_admin(tmp_path, routes=[Route("POST", "/v1/who", who)]) as admin:
        _, answer = await admin.call("POST", "/v1/who", b'{"a": [1]}')
        assert answer["actor"].startswith(f"uid {os.geteuid()} (")
        assert answer["origin"] == f"admin socket, process {os.getpid()}"
        assert answer["body"] == {"a": [1]}


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
async def test_another_user_is_refused(tmp_path: Path) -> None:
    async with running_admin(tmp_path) as admin:
        # The mode of the socket keeps other users out. Here it lets them in, as a drop-in for the socket unit may.
        os.chmod(tmp_path, 0o711)  # noqa: PTH101 - in a coroutine; it does not block
        os.chmod(admin.path, 0o666)  # noqa: PTH101 - likewise
        directory = os.open(tmp_path, os.O_PATH)
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-c", AS_NOBODY, str(directory), pass_fds=[directory], stdout=subprocess.PIPE
        )
        os.close(directory)
        async with asyncio.timeout(30):
            out, _ = await process.communicate()
        assert out.startswith(b"HTTP/1.1 403")
        assert b"uid 65534 may not use the admin API" in out
        assert admin.reloads.ended_at is None
        assert admin.gateway.value("whaled_admin_requests_total", status="403") == 1
