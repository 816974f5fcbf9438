"""Log entries in journald's native protocol, read back from a real datagram socket that stands for journald."""

import logging
import os
import socket
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import TextIO

import pytest
import structlog

from whaled.config.sections import LogFormat, LogSettings
from whaled.log_events import MESSAGES
from whaled.ops import journal, logs
from whaled.ops.output import Output, OutputHandler

LISTEN = socket.AF_UNIX, socket.SOCK_DGRAM


class Journald:
    """What journald does with a datagram, by its documentation."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._socket = socket.socket(*LISTEN)
        self._socket.bind(str(path))
        self._socket.setblocking(False)

    def close(self) -> None:
        """The name stays, as after a crash: who sends is refused."""
        self._socket.close()

    def entries(self) -> list[dict[str, str]]:
        """All that have arrived."""
        found = []
        while True:
            try:
                found.append(parse(self._socket.recv(1 << 20)))
            except BlockingIOError:
                return found

    def entry(self) -> dict[str, str]:
        """The only one that has arrived."""
        (entry,) = self.entries()
        return entry


def parse(data: bytes) -> dict[str, str]:
    """Fields of an entry, each at most once."""
    fields: dict[str, str] = {}
    while data:
        line, _, rest = data.partition(b"\n")
        name, equals, value = line.partition(b"=")
        if not equals:
            size = int.from_bytes(rest[:8], "little")
            value, end, rest = rest[8 : 8 + size], rest[8 + size : 9 + size], rest[9 + size :]
            assert end == b"\n"
        text = name.decode("ascii")
        assert text not in fields
        assert len(text) <= 64
        assert set(text) <= set("ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_")
        assert not text.startswith("_")
        fields[text] = value.decode()
        data = rest
    return fields


@pytest.fixture(autouse=True)
def _logging_as_before() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    levels = {name: logging.getLogger(name).level for name in ("websockets", "aiohttp.access", "asyncio")}
    yield
    for handler in list(root.handlers):
        root.removeHandler(handler)
        if isinstance(handler, (journal.JournalHandler, OutputHandler)):
            handler.close()
            handler.output.close(0.0)
    for handler in handlers:
        root.addHandler(handler)
    root.setLevel(level)
    for name, before in levels.items():
        logging.getLogger(name).setLevel(before)
    structlog.reset_defaults()


@pytest.fixture
def journald(tmp_path: Path) -> Iterator[Journald]:
    with closing(Journald(tmp_path / "socket")) as listening:
        yield listening


@pytest.fixture
def stderr(tmp_path: Path) -> Iterator[TextIO]:
    with (tmp_path / "stderr").open("w+") as file:
        yield file


def configure(stream: TextIO, path: Path) -> structlog.stdlib.BoundLogger:
    logs.configure(LogSettings(format=LogFormat.JOURNALD), stream, journal_socket=path)
    log: structlog.stdlib.BoundLogger = structlog.get_logger("whaled.test")
    return log


def written(stream: TextIO) -> list[str]:
    logs.flush()
    stream.seek(0)
    return stream.read().splitlines()


def test_an_entry_has_its_message_and_every_field(journald: Journald, stderr: TextIO) -> None:
    configure(stderr, journald.path).warning("client too slow", client="desk 1", unsent_bytes=70_000, is_first=True)
    entry = journald.entry()
    assert entry.pop("CODE_FILE") == __file__
    assert int(entry.pop("CODE_LINE")) > 0
    assert entry == {
        "MESSAGE": 'client too slow client="desk 1" unsent_bytes=70000 is_first=true',
        "PRIORITY": "4",
        "SYSLOG_IDENTIFIER": "whaled",
        "LOGGER": "whaled.test",
        "CODE_FUNC": "test_an_entry_has_its_message_and_every_field",
        "WHALED_EVENT": "client too slow",
        "WHALED_CLIENT": "desk 1",
        "WHALED_UNSENT_BYTES": "70000",
        "WHALED_IS_FIRST": "true",
    }
    assert written(stderr) == []


def test_an_event_has_its_identifier_in_a_field_and_its_text_in_the_message(
    journald: Journald, stderr: TextIO, tmp_path: Path
) -> None:
    configure(stderr, journald.path).warning("load_shedding_started", clients=7)
    entry = journald.entry()
    assert (entry["WHALED_EVENT"], entry["WHALED_CLIENTS"]) == ("load_shedding_started", "7")
    assert entry["MESSAGE"] == f"{MESSAGES['load_shedding_started']} clients=7"
    assert "WHALED_MESSAGE" not in entry
    configure(stderr, tmp_path / "nothing").info("daemon_stopped")
    assert written(stderr)[-1] == f"<6>{MESSAGES['daemon_stopped']}"


def test_each_level_has_its_priority(journald: Journald, stderr: TextIO) -> None:
    log = configure(stderr, journald.path)
    for method in ("info", "warning", "error", "critical"):
        getattr(log, method)(method)
    assert [(entry["MESSAGE"], entry["PRIORITY"]) for entry in journald.entries()] == [
        ("info", "6"), ("warning", "4"), ("error", "3"), ("critical", "2"),
    ]  # fmt: skip


def test_a_librarys_line_is_an_entry_too(journald: Journald, stderr: TextIO) -> None:
    configure(stderr, journald.path)
    logging.getLogger("aiohttp.server").error("broken by %s", "a client", extra={"peer": "::1"})
    entry = journald.entry()
    assert entry["MESSAGE"] == "broken by a client peer=::1"
    assert (entry["LOGGER"], entry["PRIORITY"], entry["WHALED_PEER"]) == ("aiohttp.server", "3", "::1")


def test_a_traceback_is_in_a_field_and_in_the_message(journald: Journald, stderr: TextIO) -> None:
    log = configure(stderr, journald.path)
    try:
        raise KeyError("absent")
    except KeyError:
        log.exception("it broke", task="link")
    entry = journald.entry()
    assert entry["WHALED_TRACEBACK"].startswith("Traceback (most recent call last):\n")
    assert entry["WHALED_TRACEBACK"].endswith("KeyError: 'absent'")
    assert entry["MESSAGE"] == "it broke task=link\n" + entry["WHALED_TRACEBACK"]
    assert entry["PRIORITY"] == "3"
    assert "WHALED_EXCEPTION" not in entry


def test_values_with_lines_keep_them_and_start_no_fields(journald: Journald, stderr: TextIO) -> None:
    hostile = "one\nPRIORITY=0\n\0\x85two"
    configure(stderr, journald.path).info("a line", said=hostile)
    entry = journald.entry()
    assert entry["WHALED_SAID"] == hostile
    assert entry["PRIORITY"] == "6"
    assert entry["MESSAGE"].startswith("a line said=")
    assert "\n" not in entry["MESSAGE"]


def test_odd_names_are_made_to_fit(journald: Journald, stderr: TextIO) -> None:
    configure(stderr, journald.path).info("odd", **{"a.b-ü": 1, "x" * 100: 2, "MESSAGE": 3, "none": None})
    entry = journald.entry()
    assert entry["WHALED_A_B__"] == "1"
    assert entry["WHALED_" + "X" * 57] == "2"
    assert entry["WHALED_MESSAGE"] == "3"
    assert entry["MESSAGE"].startswith("odd ")
    assert "WHALED_NONE" not in entry


def test_an_entry_is_bounded(journald: Journald, stderr: TextIO) -> None:
    log = configure(stderr, journald.path)
    deep = "€" * 60_000
    event = f"large {deep}"
    try:
        raise ValueError(deep)
    except ValueError:
        log.exception(event, **{f"key{number}": deep for number in range(100)})
    entry = journald.entry()
    assert sum(len(value.encode()) for value in entry.values()) < 100_000
    assert "bytes cut" in entry["MESSAGE"]
    assert entry["WHALED_TRACEBACK"].startswith("Traceback")
    assert "bytes cut" in entry["WHALED_TRACEBACK"]
    assert "bytes cut" in entry["WHALED_KEY1"]
    assert entry["WHALED_CUT"] == "54 fields left out"


def test_a_datagram_that_is_too_large_is_truncated_and_marked(journald: Journald, stderr: TextIO) -> None:
    sock = journal.open_socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)  # as a small net.core.wmem_default gives
    handler = journal.JournalHandler(Output(stderr), journald.path, sock)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(processors=[structlog.stdlib.add_log_level, handler.render])
    )
    with closing(handler.output), closing(handler):
        record = {f"key{number}": "x" * 1000 for number in range(40)}
        handler.handle(
            logging.makeLogRecord(
                {"msg": {"event": "much to say", **record}, "levelname": "ERROR", "_logger": None, "_name": "error"}
            )
        )
    entry = journald.entry()
    assert entry["WHALED_CUT"].startswith("too large")
    assert entry["WHALED_EVENT"] == "much to say"
    assert entry["MESSAGE"].startswith("much to say key0=xxx")
    assert entry["PRIORITY"] == "3"
    assert "WHALED_KEY1" not in entry


def test_without_a_journal_lines_go_to_stderr_after_one_with_the_reason(tmp_path: Path, stderr: TextIO) -> None:
    log = configure(stderr, tmp_path / "nothing")
    log.info("one", n=1)
    try:
        raise KeyError("absent")
    except KeyError:
        log.exception("two")
    lines = written(stderr)
    assert lines[0].startswith("<5>journal not reachable, entries go to stderr without their fields socket=")
    assert "No such file" in lines[0]
    assert lines[1:4] == ["<6>one n=1", "<3>two", "<3>Traceback (most recent call last):"]
    assert all(line.startswith("<3>") for line in lines[2:])
    assert lines[-1] == "<3>KeyError: 'absent'"


def test_a_journal_that_restarts_is_used_again(tmp_path: Path, stderr: TextIO) -> None:
    first = Journald(tmp_path / "socket")
    log = configure(stderr, first.path)
    log.info("one")
    assert first.entry()["MESSAGE"] == "one"
    first.close()  # the name is still there: refused
    log.info("two")
    first.path.unlink()
    with closing(Journald(tmp_path / "socket")) as second:
        log.info("three")
        assert second.entry()["MESSAGE"] == "three"
    assert [line for line in written(stderr) if "not reachable" not in line] == ["<6>two"]


def test_a_full_queue_does_not_wait_and_nothing_is_lost(journald: Journald, stderr: TextIO) -> None:
    log = configure(stderr, journald.path)
    total = 2_000  # more than the queue of a datagram socket holds (net.unix.max_dgram_qlen, and its buffer)
    for number in range(total):
        log.info("n", n=number)
    taken = [entry["MESSAGE"] for entry in journald.entries()]
    lines = written(stderr)
    assert 0 < len(taken) < total
    assert [*taken, *(line.removeprefix("<6>") for line in lines)] == [f"n n={number}" for number in range(total)]


@pytest.mark.slow
def test_lost_entries_are_counted_and_reported_before_the_next_entry(journald: Journald) -> None:
    mine, stuck = socket.socketpair()  # as systemd connects stderr
    with mine, stuck, mine.makefile("w") as stream:
        log = configure(stream, journald.path)
        total = 20_000
        for number in range(total):
            log.info("n", n=number, filler="x" * 200)
        taken = len(journald.entries())
        lost = int(logs.lost_entries())
        assert lost > 0
        logs.configure(LogSettings(format=LogFormat.JOURNALD), stream, journal_socket=journald.path)  # a reload between
        log.info("again")
        notice, entry = journald.entries()
        assert notice["WHALED_LOST"] == str(lost)
        assert notice["PRIORITY"] == "4"
        assert notice["WHALED_EVENT"] == "log_entries_lost"
        assert notice["MESSAGE"].startswith("log entries lost")
        assert entry["MESSAGE"] == "again"
        stuck.settimeout(20)
        lines = 0
        while taken + lines + lost < total:
            lines += stuck.recv(1 << 20).count(b"\n")
        assert taken + lines + lost == total
        assert logs.lost_entries() == lost


@pytest.mark.slow
def test_a_reader_of_stderr_that_comes_back_finds_the_number_of_lost_entries(tmp_path: Path) -> None:
    mine, stuck = socket.socketpair()
    with mine, stuck, mine.makefile("w") as stream:
        log = configure(stream, tmp_path / "no journal")
        for number in range(20_000):
            log.info("n", n=number, filler="x" * 200)
        lost = int(logs.lost_entries())
        stuck.settimeout(20)
        data = b""
        while not data.endswith(f"<4>{journal.LOSS} lost={lost}\n".encode()):
            data = data[-1000:] + stuck.recv(1 << 20)


def test_the_journal_is_chosen_only_if_this_stream_goes_there(
    journald: Journald, stderr: TextIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    stat = os.fstat(stderr.fileno())
    monkeypatch.setenv("JOURNAL_STREAM", f"{stat.st_dev}:{stat.st_ino}")
    logs.configure(LogSettings(), stderr, journal_socket=journald.path)
    structlog.get_logger().info("to the journal")
    assert journald.entry()["MESSAGE"] == "to the journal"
    monkeypatch.setenv("JOURNAL_STREAM", f"{stat.st_dev}:{stat.st_ino + 1}")  # inherited: stderr is something else
    logs.configure(LogSettings(), stderr, journal_socket=journald.path)
    structlog.get_logger().info("to the file")
    assert journald.entries() == []
    assert '"event": "to the file"' in written(stderr)[0]


def test_a_reload_opens_no_more_files(journald: Journald, stderr: TextIO) -> None:
    configure(stderr, journald.path)
    before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(20):
        configure(stderr, journald.path)
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_an_entry_that_cannot_be_formatted_is_skipped(journald: Journald, stderr: TextIO) -> None:
    class Broken:
        def __str__(self) -> str:
            raise RuntimeError("no text")

    log = configure(stderr, journald.path)
    log.info("broken", value=Broken())
    log.info("whole")
    assert journald.entry()["MESSAGE"] == "whole"
    assert "RuntimeError: no text" in written(stderr)
