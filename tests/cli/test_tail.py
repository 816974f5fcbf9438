"""`whaled tail`: what it prints where, and how it ends."""

import argparse
import asyncio
import io
import json
import os
import pty
import signal
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest
from rich.cells import cell_len

from kit.gateway import running_gateway
from kit.scripted_server import AT, EPOCH, Peer, alert_frame, jwt, position, scripted, update_frame
from kit.tokens import Tokens
from kit.whales import txid
from whaled.cli import tail, tail_screens
from whaled.cli import tail_lines as lines
from whaled.client import Last, LinkLostError, Position, Retry, WhaleAlert, WhaleStream, WhaleUpdate
from whaled.client.events import decode

NOW = datetime(2026, 1, 1, 18, 0, tzinfo=timezone(timedelta(hours=2)))


def parse(*options: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="whaled")
    tail.register(parser.add_subparsers(required=True))
    return parser.parse_args(["tail", *options])


def an_alert(**data: Any) -> WhaleAlert:
    event = decode(json.dumps(alert_frame(1, **data)).encode())
    assert isinstance(event, WhaleAlert)
    return event


def an_update(status: str, **data: Any) -> WhaleUpdate:
    event = decode(json.dumps(update_frame(2, of=1, status=status, **data)).encode())
    assert isinstance(event, WhaleUpdate)
    return event


# --- lines for a person -----------------------------------------------------------------------------------------------

FULL = {
    "btc_value": 12345.678,
    "usd_value": 1.2e9,
    "fee_rate": 12.34,
    "urgency_score": 0.8,
    "flow_type": "inflow",
    "shape": "transfer",
    "predicted_confirmation_block": 800_123,
}


def test_a_wide_terminal_shows_everything() -> None:
    fit = lines.layout(150)
    line = lines.alert_line(an_alert(**FULL), fit, NOW).plain
    assert line.split() == [
        "02:00:00", "12,345.68", "$1.2B", "12.3", "\u25a0" * 4 + "\u00b7", "inflow", "transfer", "800,123", txid(1),
    ]  # fmt: skip
    titles = lines.header(fit).plain
    assert titles.split() == ["time", "BTC", "USD", "sat/vB", "urgency", "flow", "shape", "block", "txid"]
    assert titles.index("BTC") + 3 == line.index("12,345.68") + 9  # right aligned under its title
    assert titles.index("txid") == line.index(txid(1))


@pytest.mark.parametrize("width", [45, 60, 80, 100, 120, 150, 200])
def test_lines_fit_the_terminal(width: int) -> None:
    fit = lines.layout(width)
    events = [an_alert(**FULL), an_alert(btc_value=20_999_999.99), an_alert(flow_type="a flow of another version")]
    updates = [
        an_update("confirmed", block_height=800_123, seconds_to_confirmation=4000, blocks_off=-2),
        an_update("replaced", replaced_by=txid(9)),
        an_update("a status of another version"),
    ]
    for event in events:
        assert cell_len(lines.alert_line(event, fit, NOW).plain) <= width
    for news in updates:
        assert cell_len(lines.update_line(news, fit, NOW).plain) <= max(width, 53)


def test_a_narrow_terminal_keeps_time_amount_and_txid() -> None:
    line = lines.alert_line(an_alert(**FULL), lines.layout(43), NOW).plain
    assert line.split() == ["02:00:00", "12,345.68", f"{txid(1)[:8]}\u2026{txid(1)[-8:]}"]


def test_unknown_values_are_shown_as_unknown() -> None:
    line = lines.alert_line(an_alert(), lines.layout(150), NOW).plain
    assert line.split() == ["02:00:00", "150.00", "-", "-", "-", "unknown", "transfer", "-", txid(1)]


def test_a_whale_mined_before_it_was_seen_is_not_shown_as_pending() -> None:
    line = lines.alert_line(an_alert(status="confirmed"), lines.layout(150), NOW).plain
    assert line.split()[-2:] == ["mined", txid(1)]


def test_an_event_of_another_day_shows_its_date() -> None:
    assert lines.clock(datetime(2025, 12, 30, 12, 30, tzinfo=UTC), NOW) == "12-30 14:30"
    assert lines.clock(datetime.max.replace(tzinfo=UTC), NOW) == "12-31 23:59"  # an hour that NOW's zone does not have


@pytest.mark.parametrize(
    ("btc", "style"), [(99.0, "cyan"), (500.0, "yellow"), (1000.0, "bold yellow"), (10_000.0, "bold red")]
)
def test_the_colour_depends_on_the_size(btc: float, style: str) -> None:
    assert style in {
        str(span.style) for span in lines.alert_line(an_alert(btc_value=btc), lines.layout(150), NOW).spans
    }


@pytest.mark.parametrize(
    ("news", "words"),
    [
        (
            an_update("confirmed", block_height=800_123, seconds_to_confirmation=612.4, blocks_off=2),
            "confirmed in block 800,123 after 10 min (2 blocks late)",
        ),
        (an_update("confirmed", seconds_to_confirmation=41, blocks_off=-1), "confirmed after 41 s (1 block early)"),
        (an_update("confirmed", seconds_to_confirmation=7380, blocks_off=0), "confirmed after 2 h 3 min"),
        (an_update("replaced", replaced_by="ab" * 32), "replaced by abababab\u2026abababab"),
        (an_update("dropped"), "dropped"),
        (an_update("confirmed", seconds_to_confirmation=200_000), "confirmed after 2 d 7 h"),
    ],
)
def test_the_outcome_of_a_whale_is_shown_in_words(news: WhaleUpdate, words: str) -> None:
    assert lines.outcome(news, 80) == words


def test_words_that_do_not_fit_are_omitted() -> None:
    news = an_update("confirmed", block_height=800_123, seconds_to_confirmation=612.4, blocks_off=2)
    assert lines.outcome(news, 40) == "confirmed in block 800,123 after 10 min"
    assert lines.outcome(news, 38) == "confirmed in block 800,123"
    assert lines.outcome(news, 9) == "confirmed"


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (None, "-"),
        (0.0, "$0"),
        (999.4, "$999"),
        (1500, "$1.5k"),
        (999_999, "$1.0M"),
        (7.92e7, "$79.2M"),
        (3.4e12, "$3.4T"),
    ],
)
def test_dollars_are_short(value: float | None, shown: str) -> None:
    assert lines.dollars(value) == shown


def test_a_terminal_without_block_characters_gets_ascii() -> None:
    fit = lines.layout(100, is_ascii=True)
    assert lines.alert_line(an_alert(**FULL), fit, NOW).plain.isascii()
    assert lines.bar(0.5, is_ascii=True) == "##..."


def test_text_of_a_server_cannot_control_the_terminal() -> None:
    evil = an_alert(transaction_id="\x1b]0;owned\x07" + "a" * 60, flow_type="\x1b[2Jin", shape="x\ny")
    assert "\x1b" not in lines.alert_line(evil, lines.layout(200), NOW).plain
    assert "\n" not in lines.alert_line(evil, lines.layout(200), NOW).plain
    assert "\x1b" not in lines.update_line(an_update("\x1b[31mgone"), lines.layout(80), NOW).plain


# --- options ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        ["--since", "yesterday"],
        ["--since", "2026-02-31"],
        ["--since", "last:x"],
        ["--since", "10:00"],
        ["--since", "2026-11-28 10:00 CET"],
        ["--min-btc", "many"],
        ["--min-btc", "-1"],
        ["--min-btc", "nan"],
        ["--min-flow-btc", "many"],
        ["--count", "0"],
        ["--count", "1.5"],
        ["--token", "secret"],
    ],
)
def test_an_impossible_option_ends_with_status_2_and_names_it(
    options: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        parse(*options)
    assert caught.value.code == 2
    assert options[0] in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "ending"),
    [
        ("yesterday", "or a position as epoch:offset, or `now`\n"),
        ("1795880000", "as seconds it would be 2026-11-28T15:33:20+00:00\n"),
        ("10:00", "the date is missing\n"),
    ],
)
def test_now_is_named_where_the_forms_are(text: str, ending: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse("--since", text)
    assert capsys.readouterr().err.endswith(ending)


def opened(*options: str, environ: dict[str, str] | None = None, is_terminal: bool = False) -> WhaleStream:
    return tail.open_stream(parse(*options), environ or {}, is_terminal=is_terminal)


def test_filters_follow_the_options() -> None:
    assert opened()._dial.filters == {}
    assert opened("--min-flow-btc", "3")._dial.filters == {"min_flow_btc": 3.0}
    assert opened("--min-btc", "250.5", "--no-updates")._dial.filters == {"min_btc": 250.5, "kinds": ["alert"]}


def test_the_url_comes_from_the_option_or_the_environment() -> None:
    environ = {"WHALED_URL": "wss://whales.example:443"}
    assert str(opened()._dial.place) == "127.0.0.1:8765"
    assert str(opened(environ=environ)._dial.place) == "whales.example:443"
    assert str(opened("--url", "ws://10.0.0.1:9000", environ=environ)._dial.place) == "10.0.0.1:9000"


def test_compression_is_requested_over_a_network_unless_an_option_overrides_it() -> None:
    for url in ("ws://127.0.0.1:1", "wss://localhost", "ws://[::1]:1"):
        assert not opened("--url", url)._dial.compresses
        assert opened("--url", url, "--compression")._dial.compresses
    for url in ("wss://whales.example", "ws://10.0.0.1:9000"):
        assert opened("--url", url)._dial.compresses
        assert not opened("--url", url, "--no-compression")._dial.compresses


def test_a_terminal_starts_with_the_last_ten_and_a_pipe_with_now() -> None:
    assert opened(is_terminal=True)._cursor.start(None) == Last(10)
    assert opened(is_terminal=False)._cursor.start(None) is None
    assert opened("--since", "now", is_terminal=True)._cursor.start(None) is None
    assert opened("--since=-_e:7")._cursor.start(None) == Position("-_e", 7)


def test_a_starting_time_without_a_zone_is_shown_as_it_is_read() -> None:
    assert parse("--since", "2026-11-28 10:00").since.note == (
        "starting at 2026-11-28T10:00:00+00:00: --since has no time zone and is read as UTC"
    )
    assert parse("--since", "2026-11-28 10:00Z").since.note is None
    assert parse("--since", "last:5").since.note is None


async def test_the_token_comes_from_the_file_or_the_environment(tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text(jwt("from-file") + "\n")
    environ = {"WHALED_TOKEN": jwt("from-environment") + "\n"}
    assert opened(environ=environ).token == jwt("from-environment")
    stream = opened("--token-file", str(file), environ=environ)
    assert await stream._credentials.current() == jwt("from-file")
    assert opened(environ={"WHALED_TOKEN": " "}).token is None
    with pytest.raises(ValueError, match=r"^WHALED_TOKEN holds no token"):
        opened(environ={"WHALED_TOKEN": "nonsense"})


def test_a_file_without_a_token_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_bytes(b"two words")
    with pytest.raises(ValueError, match=f"^{file} holds no token: a space is in it"):
        opened("--token-file", str(file))


def test_a_world_readable_token_file_causes_a_warning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "token"
    file.write_text(jwt("c1"))
    file.chmod(0o604)
    opened("--token-file", str(file))
    assert capsys.readouterr().err == (
        f"whaled tail: warning: {file} can be read by every user of this machine (mode 0604); run: chmod 600 {file}\n"
    )


async def test_a_token_file_that_is_half_written_is_read_again_later(tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text(jwt("one"))
    stream = opened("--token-file", str(file))
    file.write_text("")
    with pytest.raises(LinkLostError, match=f"no token: {file} holds no token"):
        await stream._credentials.current()
    file.write_text(jwt("two"))
    assert await stream._credentials.current() == jwt("two")


async def test_a_token_from_a_pipe_is_read_once(tmp_path: Path) -> None:
    reading, writing = os.pipe()
    os.write(writing, jwt("c1").encode())
    os.close(writing)
    stream = opened("--token-file", f"/dev/fd/{reading}")
    os.close(reading)
    assert stream.token == jwt("c1")


def test_a_file_without_certificates_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "ca.pem"
    file.write_text("nothing")
    with pytest.raises(ValueError, match="contains no certificates"):
        opened("--ca-file", str(file), "--url", "wss://127.0.0.1:1")


# --- following --------------------------------------------------------------------------------------------------------


def quick(url: str, **options: Any) -> WhaleStream:
    return WhaleStream(url, **{"link_events": True, "retry": Retry(initial_s=0.001, max_s=0.005), **options})


async def follow(stream: WhaleStream, count: int | None = None) -> tuple[int, list[Any], str]:
    """The exit status, what JSON lines said, what standard error said."""
    out, errors = io.BytesIO(), io.StringIO()
    status = await tail.follow(stream, tail_screens.JsonLines(out), errors, count=count)
    return status, [json.loads(line) for line in out.getvalue().splitlines()], errors.getvalue()


async def test_json_lines_are_the_frames_as_they_came() -> None:
    frames = [alert_frame(1, field_of_tomorrow={"a": 1}, from_labels=["K\u00e4lte \u6570"]), update_frame(2, of=1)]

    async def script(peer: Peer) -> None:
        await peer.open()
        await peer.say({"type": "status", "upstream": "degraded", "since": "2026-01-01T00:00:00Z"})
        await peer.ws.send(json.dumps(frames[0], indent=4))
        await peer.say(frames[1])
        await peer.linger()

    async with scripted(script) as server:
        status, out, errors = await follow(quick(server.url), count=2)
    assert status == 0
    assert out == frames
    assert "connected, newest event k3vQpZ:0" in errors
    assert "mempool backend degraded since" in errors


async def test_lost_connections_and_gaps_are_reported_on_standard_error() -> None:
    async def first(peer: Peer) -> None:
        await peer.open(5)
        await peer.ws.close(1012, "Service restart")

    async def second(peer: Peer) -> None:
        await peer.welcome(90)
        await peer.subscribe(90, recovered=False, oldest=position(40))
        await peer.say(alert_frame(91))
        await peer.linger()

    async with scripted(first, second) as server:
        status, out, errors = await follow(quick(server.url), count=1)
    assert status == 0
    assert [line["type"] for line in out] == ["missed", "whale_alert"]
    assert out[0] == {"type": "missed", "since": position(5), "position": position(90), "oldest": position(40)}
    assert "Service restart (1012); trying again in 0.0 s" in errors
    assert f"no longer has all events since {EPOCH}:5; the oldest it has is {EPOCH}:40; live from {EPOCH}:90" in errors


async def test_a_refused_token_ends_with_status_1_and_advice() -> None:
    async def script(peer: Peer) -> None:
        await peer.hear("auth")
        await peer.refuse("Invalid or expired token")

    async with scripted(script) as server:
        status, out, errors = await follow(quick(server.url, token=jwt("t0psecret")))
    assert (status, out) == (1, [])
    assert errors == (
        "whaled tail: Invalid or expired token: get a new token; the server's log has the reason for the refusal. "
        "Give a valid token with --token-file or WHALED_TOKEN; on the server, `whaled token issue` makes one\n"
    )
    assert jwt("t0psecret") not in errors


async def test_without_retry_a_refused_token_of_a_file_ends_with_the_same_advice(tmp_path: Path) -> None:
    async def script(peer: Peer) -> None:
        await peer.hear("auth")
        await peer.refuse("Invalid or expired token")

    file = tmp_path / "token"
    file.write_text(jwt("t0psecret"))
    async with scripted(script) as server:
        options = ("--url", server.url, "--token-file", str(file), "--no-retry")
        status, out, errors = await follow(opened(*options))
    assert (status, out) == (1, [])
    assert errors == (
        "whaled tail: Invalid or expired token: get a new token; the server's log has the reason for the refusal. "
        "Give a valid token with --token-file or WHALED_TOKEN; on the server, `whaled token issue` makes one\n"
    )


async def test_a_renewed_token_is_reported_and_the_file_left_alone(tmp_path: Path) -> None:
    async def script(peer: Peer) -> None:
        await peer.authenticate("t0psecret")
        await peer.subscribe(0)
        await peer.say({"type": "token_expiring", "expires_at": AT})
        await peer.hear("refresh")
        await peer.say({"type": "token", "token": jwt("renewed"), "expires_at": AT}, alert_frame(1))
        await peer.linger()

    file = tmp_path / "token"
    file.write_text(jwt("t0psecret"))
    async with scripted(script) as server:
        status, out, errors = await follow(opened("--url", server.url, "--token-file", str(file)), count=1)
    assert (status, [line["type"] for line in out]) == (0, ["whale_alert"])
    assert f"the server renewed the token until {AT}, for this run only: the next one needs a new token" in errors
    assert jwt("renewed") not in errors
    assert file.read_text() == jwt("t0psecret")


async def test_without_retry_an_unreachable_server_ends_with_status_1() -> None:
    with socket.create_server(("127.0.0.1", 0)) as reserved:
        port = reserved.getsockname()[1]
    status, out, errors = await follow(quick(f"ws://127.0.0.1:{port}", reconnect=False))
    assert (status, out) == (1, [])
    assert errors == f"whaled tail: cannot connect to 127.0.0.1:{port}: Connection refused\n"


async def test_a_terminal_without_a_width_gets_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "0")
    out = io.StringIO()
    tail_screens.Table(out).show(an_alert())
    assert "150.00" in out.getvalue()


async def test_a_table_has_its_titles_once() -> None:
    async def script(peer: Peer) -> None:
        await peer.open()
        await peer.say(alert_frame(1), update_frame(2, of=1))
        await peer.linger()

    out = io.StringIO()
    async with scripted(script) as server:
        await tail.follow(quick(server.url), tail_screens.Table(out, width=100), io.StringIO(), count=2)
    titles, first, second = out.getvalue().splitlines()
    assert titles.split()[:2] == ["time", "BTC"]
    assert "transfer" in first or "unknown" in first
    assert "confirmed" in second


# --- as a process -----------------------------------------------------------------------------------------------------


@asynccontextmanager
async def running_tail(*options: str, **keywords: Any) -> AsyncIterator[asyncio.subprocess.Process]:
    environ = {key: value for key, value in os.environ.items() if not key.startswith("WHALED_")}
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "whaled",
        "tail",
        *options,
        **{"stdout": asyncio.subprocess.PIPE, "stderr": asyncio.subprocess.PIPE, "env": environ, **keywords},
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


def endless(*frames: dict[str, Any]) -> Any:
    async def script(peer: Peer) -> None:
        await peer.open()
        await peer.say(*frames)
        await peer.linger()

    return script


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
async def test_a_signal_ends_it_quietly_with_status_0(number: signal.Signals) -> None:
    async with scripted(endless(alert_frame(1))) as server, running_tail("--url", server.url) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert json.loads(await process.stdout.readline())["type"] == "whale_alert"  # flushed, though it is a pipe
        process.send_signal(number)
        assert await process.wait() == 0
        assert await process.stdout.read() == b""
        assert (await process.stderr.read()).splitlines() == [f"connected, newest event {EPOCH}:0".encode()]


@pytest.mark.slow
async def test_a_reader_that_goes_away_ends_it_quietly_without_the_next_alert() -> None:
    reading, writing = os.pipe()
    async with scripted(endless()) as server, running_tail("--url", server.url, stdout=writing) as process:
        os.close(writing)
        assert process.stderr is not None
        assert b"connected" in await process.stderr.readline()
        os.close(reading)
        assert await process.wait() == 0
        assert await process.stderr.read() == b""


@pytest.mark.slow
async def test_a_reader_that_closes_the_pipe_ends_the_command_quietly() -> None:
    async with scripted(endless(*(alert_frame(n) for n in range(1, 2000)))) as server:
        shell = await asyncio.create_subprocess_exec(
            "bash",
            "-c",
            'set -o pipefail; "$0" -m whaled tail --json --url "$1" 2>&1 | head -n 3 | wc -l',
            sys.executable,
            server.url,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        out, errors = await shell.communicate()
    assert (shell.returncode, out.strip(), errors) == (0, b"3", b"")


@pytest.mark.slow
async def test_on_a_terminal_it_draws_lines_and_requests_the_last_ten() -> None:
    asked: list[Any] = []

    async def script(peer: Peer) -> None:
        asked.append((await peer.open(30))["since"])
        await peer.say(alert_frame(21, btc_value=12_000.5))
        await peer.linger()

    controller, terminal = pty.openpty()
    environ = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "100", "PYTHONIOENCODING": "utf-8"}
    environ.pop("NO_COLOR", None)
    async with scripted(script) as server:
        options = ("--url", server.url, "--count", "1")
        async with running_tail(*options, stdout=terminal, stderr=terminal, env=environ) as process:
            os.close(terminal)
            assert await process.wait() == 0
            text = os.read(controller, 10_000).decode()
            os.close(controller)
    assert asked == [{"last": 10}]
    assert "12,000.50" in text
    assert "\x1b[1;31m" in text  # bold red
    assert txid(21)[:8] in text


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--url", "http://127.0.0.1"], b"is not a WebSocket URL"),
        (["--ca-file", "/nowhere"], b"whaled tail: /nowhere: No such file or directory"),
        (["--token-file", "/nonexistent"], b"whaled tail: /nonexistent: No such file or directory"),
        (["--ca-file", "/nonexistent", "--url", "wss://x"], b"No such file"),
    ],
)
async def test_invalid_options_end_with_status_2(options: list[str], said: bytes) -> None:
    async with running_tail(*options) as process:
        out, errors = await process.communicate()
    assert (process.returncode, out) == (2, b"")
    assert errors.startswith(b"whaled tail: ")
    assert said in errors
    assert errors.count(b"\n") == 1


@pytest.mark.slow
async def test_a_server_that_requires_a_token_is_named(tmp_path: Path) -> None:
    async with (
        running_gateway(tmp_path, authenticator=Tokens()) as rig,
        running_tail("--url", rig.url) as process,
    ):
        out, errors = await process.communicate()
    assert (process.returncode, out) == (1, b"")
    assert errors.decode() == (
        "whaled tail: Token required: this server requires a token, and this stream has none. "
        "Give a valid token with --token-file or WHALED_TOKEN; on the server, `whaled token issue` makes one\n"
    )


@pytest.mark.slow
async def test_an_unreachable_server_is_tried_until_it_is_there() -> None:
    with socket.create_server(("127.0.0.1", 0)) as reserved:
        port = reserved.getsockname()[1]
    async with running_tail("--url", f"ws://127.0.0.1:{port}") as process:
        assert process.stderr is not None
        for _ in range(2):
            line = await process.stderr.readline()
            assert line.startswith(f"cannot connect to 127.0.0.1:{port}: Connection refused; trying again in ".encode())
        process.send_signal(signal.SIGINT)
        assert await process.wait() == 0
