"""Log output as a thread writes it: to readers that stop, come back, or are gone."""

import asyncio
import fcntl
import io
import json
import logging
import os
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

import aiohttp
import pytest
import structlog

from kit import daemon
from whaled.config.sections import LogFormat, LogSettings
from whaled.log_events import MESSAGES
from whaled.ops import logs
from whaled.ops.output import Output, OutputHandler

F_SETPIPE_SZ = 1031
LIMIT_S = 20


@pytest.fixture(autouse=True)
def _logging_as_before() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    for handler in list(root.handlers):
        root.removeHandler(handler)
        if isinstance(handler, OutputHandler):
            handler.close()
            handler.output.close(0.0)
    for handler in handlers:
        root.addHandler(handler)
    root.setLevel(level)
    structlog.reset_defaults()


@pytest.fixture
def pipe() -> Iterator[tuple[int, TextIO]]:
    """A pipe of one page: the end to read, and the end that is logged to."""
    reading, writing = os.pipe()
    fcntl.fcntl(writing, F_SETPIPE_SZ, 4096)
    with os.fdopen(writing, "w") as stream:
        yield reading, stream
    os.close(reading)


def log_to(stream: TextIO, chosen: LogFormat = LogFormat.JSON) -> structlog.stdlib.BoundLogger:
    logs.configure(LogSettings(format=chosen), stream)
    log: structlog.stdlib.BoundLogger = structlog.get_logger("whaled.test")
    return log


def test_an_event_has_an_identifier_and_a_message() -> None:
    stream = io.StringIO()
    log_to(stream).warning("load_shedding_started", clients=7)
    logging.getLogger("aiohttp.server").warning("a text")
    own, librarys = map(json.loads, stream.getvalue().splitlines())
    assert (own["event"], own["clients"]) == ("load_shedding_started", 7)
    assert own["message"] == MESSAGES["load_shedding_started"]
    assert librarys["event"] == "a text"
    assert "message" not in librarys


def test_a_line_of_text_begins_with_the_message_and_has_the_identifier_where_something_is_wrong() -> None:
    stream = io.StringIO()
    log = log_to(stream, LogFormat.TEXT)
    log.warning("load_shedding_started", clients=7)
    log.info("daemon_ready", version="1")
    logging.getLogger("aiohttp.server").warning("a text")
    warning, info, librarys = (line.partition(" ")[2] for line in stream.getvalue().splitlines())
    assert warning == (
        f"[warning  ] {MESSAGES['load_shedding_started']} [whaled.test] clients=7 event=load_shedding_started"
    )
    assert info == "[info     ] ready [whaled.test] version=1"
    assert librarys == "[warning  ] a text [aiohttp.server]"


def read_lines(reading: int, is_last: str) -> list[str]:
    data = b""
    while not (data.endswith(b"\n") and is_last in data.decode().splitlines()[-1]):
        data += os.read(reading, 65536)
    return data.decode().splitlines()


def test_lines_keep_their_order_and_are_all_written(tmp_path: Path) -> None:
    with (tmp_path / "log").open("w+") as stream:
        log = log_to(stream)
        for number in range(3000):
            log.info("n", n=number)
        logs.flush()
        stream.seek(0)
        assert [json.loads(line)["n"] for line in stream] == list(range(3000))


@pytest.mark.slow
def test_a_reader_that_stops_delays_nothing_and_receives_the_number_of_lost_entries(pipe: tuple[int, TextIO]) -> None:
    reading, stream = pipe
    log = log_to(stream)
    began = time.monotonic()
    for number in range(20_000):
        log.info("n", n=number, filler="x" * 100)
    assert time.monotonic() - began < LIMIT_S
    lost = logs.lost_entries()
    assert 0 < lost < 20_000
    lines = [json.loads(line) for line in read_lines(reading, "log entries lost")]
    assert [line["n"] for line in lines[:-1]] == list(range(20_000 - lost))
    assert (lines[-1]["event"], lines[-1]["lost"], lines[-1]["level"]) == ("log_entries_lost", lost, "warning")
    log.info("again")
    assert len(read_lines(reading, "again")) == 1


def test_a_reader_that_is_gone_loses_only_the_lines() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as stream:
        log = log_to(stream)
        for number in range(10):
            log.info("n", n=number)
            logs.flush()
        assert logs.lost_entries() == 10


def test_a_descriptor_made_non_blocking_by_another_process_loses_nothing(pipe: tuple[int, TextIO]) -> None:
    reading, stream = pipe
    os.set_blocking(stream.fileno(), False)
    log = log_to(stream)
    for number in range(500):
        log.info("n", n=number)
    log.info("last")
    assert len(read_lines(reading, "last")) == 501


def test_a_flush_is_bounded_and_so_is_the_end(pipe: tuple[int, TextIO]) -> None:
    _, stream = pipe
    output = Output(stream)
    for _ in range(100):
        output.put("x" * 1000)
    began = time.monotonic()
    assert output.flush(0.1) is False
    output.close(0.1)
    assert time.monotonic() - began < LIMIT_S
    assert output.put("too late") is False


def test_a_reload_keeps_what_is_queued_and_counted(pipe: tuple[int, TextIO]) -> None:
    reading, stream = pipe
    log = log_to(stream)
    for number in range(200):
        log.info("n", n=number)
    log_to(stream, LogFormat.TEXT).info("after")
    lines = read_lines(reading, "after")
    assert [json.loads(line)["n"] for line in lines[:-1]] == list(range(200))


def test_text_tracebacks_show_no_local_variables() -> None:
    stream = io.StringIO()
    log = log_to(stream, LogFormat.TEXT)

    def verify(token: str) -> None:
        raise KeyError("absent")

    try:
        verify("very-" + "secret")
    except KeyError:
        log.exception("it broke")
        logging.getLogger("aiohttp.server").exception("broken by %s", "a client")
    text = stream.getvalue()
    assert text.count("KeyError: 'absent'") == 2
    assert "very-secret" not in text


def test_repeated_entries_of_a_library_are_counted() -> None:
    stream = io.StringIO()
    log_to(stream)
    for number in range(500):
        of_accept = f"socket.accept() out of system resource\nsocket: <{number}>"  # as asyncio makes it
        for message in (of_accept, f"{number} different messages"):
            logging.getLogger("asyncio").error(message)
    lines = stream.getvalue().splitlines()
    assert sum("out of system resource" in line for line in lines) == 2
    assert len(lines) < 300


@pytest.mark.parametrize("chosen", [LogFormat.JSON, LogFormat.TEXT])
def test_an_entry_that_cannot_be_formatted_leaves_a_trace(chosen: LogFormat) -> None:
    stream = io.StringIO()
    log_to(stream, chosen)
    logging.getLogger("library").error("%d", "no number")
    logging.getLogger("library").error("whole")
    assert "a log entry cannot be shown" in stream.getvalue()
    assert "whole" in stream.getvalue()


# --- the process ---


@pytest.mark.slow
async def test_a_daemon_whose_stderr_is_not_read_runs_on_and_stops_in_time(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free, socket.create_server(("127.0.0.1", 0)) as other:
        http, gateway = free.getsockname()[1], other.getsockname()[1]
    config = daemon.write_config(
        tmp_path, "ws://127.0.0.1:1", http={"port": http}, gateway={"port": gateway}, log={"level": "debug"}
    )
    reading, writing = os.pipe()
    fcntl.fcntl(writing, F_SETPIPE_SZ, 4096)
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "whaled", "run", "--config", str(config),
        stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.DEVNULL, stderr=writing, cwd=tmp_path,
        env={"PATH": os.environ["PATH"]},
    )  # fmt: skip
    os.close(writing)
    try:
        async with aiohttp.ClientSession() as session, asyncio.timeout(daemon.START_LIMIT_S):

            async def is_well() -> bool:
                try:
                    async with session.get(f"http://127.0.0.1:{http}/healthz") as response:
                        return response.status == 200
                except aiohttp.ClientError:
                    return False

            while not await is_well():  # noqa: ASYNC110 - its log cannot be read
                await asyncio.sleep(0.05)
            for number in range(400):  # each a line at least: the pipe holds 30
                try:
                    _, writer = await asyncio.open_connection("127.0.0.1", gateway)
                except ConnectionResetError:  # one too many that the daemon has not seen end yet
                    continue
                writer.write(
                    b"GET / HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
                    b"Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\nSec-WebSocket-Version: 13\r\n\r\n"
                )
                if number % 100 == 0:
                    assert await is_well()
                writer.transport.abort()
            assert await is_well()
        process.terminate()
        async with asyncio.timeout(LIMIT_S):
            assert await process.wait() == 0
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
        os.close(reading)


def standard_streams_of(pid: int) -> set[str]:
    return {str(Path(f"/proc/{pid}/fd/{number}").readlink()) for number in range(3)}


@pytest.mark.slow
async def test_a_daemon_without_stdin_stdout_and_stderr_serves(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    config = daemon.write_config(tmp_path, "ws://127.0.0.1:1", http={"port": port}, log={"format": "auto"})
    process = await asyncio.create_subprocess_exec(
        "sh", "-c", f"exec {sys.executable} -m whaled run --config {config} 0<&- 1>&- 2>&-", cwd=tmp_path,
        env={"PATH": os.environ["PATH"]},
    )  # fmt: skip
    try:
        async with asyncio.timeout(daemon.START_LIMIT_S):
            while True:
                try:
                    _, writer = await asyncio.open_connection("127.0.0.1", port)
                except ConnectionError:
                    assert process.returncode is None
                    await asyncio.sleep(0.05)
                    continue
                writer.transport.abort()
                break
            held = standard_streams_of(process.pid)
            assert held == {os.devnull}  # no file or socket of the daemon has the number of stderr
            process.terminate()
            assert await process.wait() == 0
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


@pytest.mark.slow
async def test_a_start_that_fails_ends_in_time_with_a_reader_that_does_not_read(tmp_path: Path) -> None:
    config = daemon.write_config(tmp_path, "ws://127.0.0.1:1", eventlog={"path": str(tmp_path / "no" / "whaled.db")})
    reading, writing = os.pipe()
    fcntl.fcntl(writing, F_SETPIPE_SZ, 4096)
    os.write(writing, b"x" * 4096)
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "whaled", "run", "--config", str(config),
        stdin=asyncio.subprocess.DEVNULL, stderr=writing, cwd=tmp_path, env={"PATH": os.environ["PATH"]},
    )  # fmt: skip
    os.close(writing)
    async with asyncio.timeout(daemon.START_LIMIT_S):
        assert await process.wait() == 1
    os.close(reading)
