"""The client, the example bot and `whaled tail` against the real gateway over a real event log."""

import asyncio
import contextlib
import os
import random
import sqlite3
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
from msgspec.structs import replace

from kit.gateway import running_gateway
from kit.paths import ROOT
from kit.scripted_server import AT, Peer, Script, jwt, scripted
from kit.tokens import Tokens
from kit.whales import alert_draft, confirmed_draft, txid
from whaled.auth.ring import KeyRing, SigningKey
from whaled.auth.tokens import TokenAuthenticator, issue, verify
from whaled.auth.tokentext import claims_of
from whaled.client import (
    AuthenticationFailed,
    Connected,
    Disconnected,
    Last,
    Limits,
    Missed,
    Position,
    Retry,
    SubscriptionError,
    UnusableServerError,
    UpstreamStatus,
    WhaleAlert,
    WhaleStream,
    WhaleUpdate,
)
from whaled.config.sections import AuthSettings, EventLogSettings, GatewaySettings
from whaled.eventlog.store import EventLog
from whaled.gateway.handshake import RETRY_AFTER_S
from whaled.gateway.server import Gateway
from whaled.metrics import Metrics
from whaled.model import Alert, Draft, Flow, Grant, Permission, Shape, UpstreamState, Whale

BOT = ROOT / "docs" / "examples" / "bot.py"
SOON = Retry(initial_s=0.001, max_s=0.01)


def stream(url: str, **options: Any) -> WhaleStream:
    return WhaleStream(url, **{"retry": SOON, **options})


async def offsets(source: WhaleStream, count: int) -> list[int]:
    """The offsets of the next alerts and updates."""
    found: list[int] = []
    async for event in source:
        if isinstance(event, WhaleAlert | WhaleUpdate):
            found.append(event.position.offset)
        if len(found) == count:
            break
    return found


async def connected(source: WhaleStream) -> Connected:
    """Wait until the subscription stands."""
    async for event in source:
        if isinstance(event, Connected):
            return event
    raise AssertionError("the stream ended")


async def test_published_events_arrive_typed(tmp_path: Path) -> None:
    async with running_gateway(tmp_path) as rig, stream(rig.url, link_events=True) as source:
        await connected(source)
        confirmation = confirmed_draft(1, 250.5)
        assert confirmation.update is not None
        await rig.publish(
            alert_draft(1, 250.5), replace(confirmation, update=replace(confirmation.update, block_height=800_000))
        )
        events = [event async for event in _some(source, 2)]
    first, second = events
    assert isinstance(first, WhaleAlert)
    assert isinstance(second, WhaleUpdate)
    theirs = alert_draft(1, 250.5).whale.alert
    for name in Alert.__struct_fields__:
        if name != "detection_timestamp":
            assert getattr(first.data, name) == getattr(theirs, name), name
    assert (first.data.flow_type, first.data.shape) == (Flow.INFLOW, Shape.TRANSFER)
    assert first.data.detection_timestamp is not None
    assert first.data.detection_timestamp.isoformat() == theirs.detection_timestamp
    assert (second.data.status, second.data.block_height) == ("confirmed", 800_000)
    assert second.position == Position(first.position.epoch, 2)


async def test_the_addresses_of_the_filter_that_matched_arrive(tmp_path: Path) -> None:
    ours, theirs = (f"bc1q{letter * 38}" for letter in "pq")
    async with running_gateway(tmp_path) as rig:
        await rig.publish(alert_draft(1, addresses=(theirs, ours)), alert_draft(2, addresses=(theirs,)))
        async with stream(rig.url, filters={"addresses": [ours]}, since=Last(10)) as source:
            (event,) = [event async for event in _some(source, 1)]
        async with stream(rig.url, since=Last(10)) as source:
            others = [event async for event in _some(source, 2)]
    assert (event.position.offset, event.matched_addresses) == (1, (ours,))
    assert [event.matched_addresses for event in others] == [(), ()]


async def _some(source: WhaleStream, count: int) -> AsyncIterator[WhaleAlert | WhaleUpdate]:
    async for event in source:
        if isinstance(event, WhaleAlert | WhaleUpdate):
            yield event
            count -= 1
        if not count:
            return


@pytest.mark.parametrize(("compression", "count"), [(True, 1), (False, 0), (None, 0)])  # the server is on this machine
async def test_a_stream_requests_compression_as_configured(
    tmp_path: Path, compression: bool | None, count: int
) -> None:
    async with (
        running_gateway(tmp_path) as rig,
        stream(rig.url, compression=compression, link_events=True) as source,
    ):
        await connected(source)
        assert rig.gateway.roster.compressed == count
        await rig.alerts(1, 2, 3)
        assert await offsets(source, 3) == [1, 2, 3]


async def test_the_state_of_the_backend_arrives(tmp_path: Path) -> None:
    async with running_gateway(tmp_path) as rig, stream(rig.url) as source:
        states = []
        async for event in source:
            assert isinstance(event, UpstreamStatus)
            states.append(event.state)
            if len(states) == 2:
                break
            rig.gateway.publish_upstream_state(UpstreamState.CONNECTED)
        assert states == ["disconnected", "connected"]


async def test_filters_select(tmp_path: Path) -> None:
    async with running_gateway(tmp_path) as rig:
        await rig.publish(alert_draft(1, 100), alert_draft(2, 700), confirmed_draft(1, 100), confirmed_draft(2, 700))
        async with stream(rig.url, filters={"min_btc": 500}, since=Last(10)) as source:
            assert await offsets(source, 2) == [2, 4]
        async with stream(rig.url, filters={"kinds": ["alert"]}, since=Last(10)) as source:
            assert await offsets(source, 2) == [1, 2]


async def test_a_filter_the_server_does_not_know_is_raised(tmp_path: Path) -> None:
    async with running_gateway(tmp_path) as rig, stream(rig.url, filters={"min_btcs": 5}) as source:
        with pytest.raises(SubscriptionError) as caught:
            await offsets(source, 1)
    assert caught.value.code == "invalid_filter"
    assert "min_btcs" in str(caught.value)


async def test_filters_over_the_servers_frame_limit_are_raised(tmp_path: Path) -> None:
    addresses = [f"bc1q{number:058d}" for number in range(500)]
    async with running_gateway(tmp_path) as rig, stream(rig.url, filters={"addresses": addresses}) as source:
        with pytest.raises(SubscriptionError, match="larger than this server takes"):
            await offsets(source, 1)


@pytest.mark.parametrize(("since", "expected"), [("last:3", [8, 9, 10]), ("2027-01-15T08:00:00Z", list(range(1, 11)))])
async def test_history_comes_first(tmp_path: Path, since: str, expected: list[int]) -> None:
    async with running_gateway(tmp_path) as rig:
        await rig.alerts(*range(1, 11))
        async with stream(rig.url, since=since) as source:
            assert await offsets(source, len(expected)) == expected
            await rig.alerts(11)
            assert await offsets(source, 1) == [11]


async def test_a_position_of_another_log_is_reported_as_missed(tmp_path: Path) -> None:
    async with running_gateway(tmp_path) as rig:
        await rig.alerts(1, 2)
        gone = Position("another", 1)
        async with stream(rig.url, since=gone) as source:
            first = await anext(source)
            assert first == Missed(since=gone, position=Position(rig.log.epoch, 2), oldest=Position(rig.log.epoch, 1))
            await rig.alerts(3)
            assert await offsets(source, 1) == [3]


async def test_no_cut_of_the_connection_loses_or_repeats_an_event(tmp_path: Path) -> None:
    total = 400
    rng = random.Random(7)
    async with running_gateway(tmp_path, replay_page=7) as rig, stream(rig.url, link_events=True) as source:
        await connected(source)

        async def publish() -> None:
            number = 1
            while number <= total:
                size = min(rng.randrange(1, 9), total + 1 - number)
                await rig.alerts(*range(number, number + size))
                number += size
                if rng.random() < 0.3:
                    for connection in rig.gateway.roster.all():
                        connection.abort()
                await asyncio.sleep(0)

        cuts = 0
        seen: list[int] = []
        async with asyncio.timeout(20), asyncio.TaskGroup() as tasks:
            tasks.create_task(publish())
            async for event in source:
                assert not isinstance(event, Missed)
                cuts += isinstance(event, Disconnected)
                if isinstance(event, WhaleAlert):
                    seen.append(event.position.offset)
                if len(seen) == total:
                    break
    assert seen == list(range(1, total + 1))
    assert cuts > 3


@asynccontextmanager
async def gateway_at(directory: Path, port: int) -> AsyncIterator[tuple[EventLog, Gateway, str]]:
    """A gateway on a port of the test's choice, so that it can come back there."""
    metrics = Metrics()
    async with EventLog.open(EventLogSettings(path=str(directory / "whaled.db")), metrics.eventlog) as log:
        settings = GatewaySettings(port=port)
        gateway = Gateway(settings, AuthSettings(), event_log=log, authenticator=None, meter=metrics.gateway)
        async with gateway.serving() as address:
            yield log, gateway, f"ws://{address}"


@pytest.mark.slow
async def test_a_restart_of_the_server_is_ridden_out(tmp_path: Path) -> None:
    async with contextlib.AsyncExitStack() as stack:
        async with gateway_at(tmp_path, 0) as (log, gateway, url):
            source = await stack.enter_async_context(stream(url, link_events=True))
            await connected(source)
            gateway.publish(await log.append([alert_draft(1)]))
            assert await offsets(source, 1) == [1]
            await gateway.drain(2.0)
            lost = await anext(source)
            assert isinstance(lost, Disconnected)
            assert lost.code == 1012
            assert lost.retry_in_s >= 0.5  # what `closing` asked for
            await log.append([alert_draft(2)])  # committed, and nobody was told
        async with gateway_at(tmp_path, int(url.rsplit(":", 1)[1])) as (log, gateway, _):
            assert (await connected(source)).is_recovered
            gateway.publish(await log.append([alert_draft(3)]))
            assert await offsets(source, 2) == [2, 3]


class NamedTokens(Tokens):
    """Knows tokens by the client they name."""

    def verify(self, credential: str, now: float) -> Grant:
        return super().verify(claims_of(credential)["client_id"], now)


async def test_tokens_are_accepted_or_refused_for_good(tmp_path: Path) -> None:
    async with running_gateway(tmp_path, authenticator=NamedTokens(expires_at=4e9), auth_timeout=0.05) as rig:
        async with stream(rig.url, token=jwt("good"), link_events=True) as source:
            assert (await connected(source)).client_id == "c1"
            await rig.alerts(1)
            assert await offsets(source, 1) == [1]
        async with stream(rig.url, token=jwt("bad")) as source:
            with pytest.raises(AuthenticationFailed, match="Invalid or expired token"):
                await anext(source)
        async with stream(rig.url) as source:
            with pytest.raises(AuthenticationFailed, match="this stream has none"):
                await anext(source)
        async with stream(rig.url, token=jwt("mute")) as source:
            with pytest.raises(SubscriptionError) as caught:
                await anext(source)
            assert caught.value.code == "forbidden"


async def test_a_token_near_its_end_is_renewed_on_the_open_connection(tmp_path: Path) -> None:
    settings = AuthSettings()
    key = SigningKey(None, b"k" * 32)
    ring = KeyRing(key, (key,))
    authenticator = TokenAuthenticator(ring, settings, new_token_id=lambda: "t2")
    now = time.time()
    token, _ = issue(
        ring,
        client_id="bot",
        permissions=[Permission.READ],
        ttl_s=1000,
        now=now - 950,  # 50 of its 1000 seconds are left: the server warns in the last tenth
        token_id="t1",
        settings=settings,
    )
    async with running_gateway(tmp_path, authenticator=authenticator) as rig:
        async with stream(rig.url, token=token, link_events=True) as source:
            await connected(source)
            async with asyncio.timeout(5):
                while source.token == token:
                    await rig.alerts(int(source.position.offset) + 1 if source.position else 1)
                    assert await offsets(source, 1)
            renewed = source.token
        assert renewed is not None
        assert verify(ring, renewed, now + 900, settings).token_id == "t2"
        async with stream(rig.url, token=renewed, link_events=True) as source:
            assert (await connected(source)).client_id == "bot"


async def test_a_token_in_the_url_is_refused_with_the_servers_text(tmp_path: Path) -> None:
    async with running_gateway(tmp_path) as rig, stream(rig.url + "/?token=jwt") as source:
        with pytest.raises(UnusableServerError, match="a token in the URL ends up in logs"):
            await anext(source)


@pytest.mark.parametrize(("limit", "status"), [("max_connections", 503), ("max_connections_per_address", 429)])
async def test_a_full_server_sends_the_time_to_retry(tmp_path: Path, limit: str, status: int) -> None:
    settings: dict[str, Any] = {limit: 1}
    async with (
        running_gateway(tmp_path, **settings) as rig,
        rig.connect(),
        stream(rig.url, link_events=True) as source,
    ):
        lost = await anext(source)
        assert isinstance(lost, Disconnected)
        assert f"HTTP {status}" in lost.reason
        assert lost.retry_in_s >= RETRY_AFTER_S


def heavy_draft(number: int) -> Draft:
    """An alert of some 20 KB, so that the kernel's buffers fill after a few hundred."""
    draft = alert_draft(number)
    alert = msgspec.structs.replace(draft.whale.alert, reasons=("x" * 20_000,))
    return msgspec.structs.replace(draft, whale=Whale(alert))


async def test_a_consumer_that_lags_behind_the_servers_bound_still_gets_everything(tmp_path: Path) -> None:
    limits = Limits(buffered_events=2)
    async with (
        running_gateway(tmp_path, max_unsent=40_000, replay_page=50) as rig,
        stream(rig.url, limits=limits, link_events=True) as source,
    ):
        await connected(source)
        async with asyncio.timeout(20):
            total = 0
            while not rig.value("whaled_clients_lagged_total"):  # nobody takes them
                await rig.publish(*(heavy_draft(number) for number in range(total + 1, total + 51)))
                total += 50
            seen: list[int] = []
            async for event in source:
                assert not isinstance(event, Missed | Disconnected)
                if isinstance(event, WhaleAlert):
                    seen.append(event.position.offset)
                if len(seen) == total:
                    break
    assert seen == list(range(1, total + 1))


# --- the example bot --------------------------------------------------------------------------------------------------


@asynccontextmanager
async def running_bot(url: str, database: Path, token: str | None = None) -> AsyncIterator[asyncio.subprocess.Process]:
    environ = {**os.environ, **({"WHALED_TOKEN": token} if token is not None else {})}
    process = await asyncio.create_subprocess_exec(
        sys.executable, str(BOT), url, str(database), stderr=asyncio.subprocess.PIPE, env=environ
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


async def counted(database: Path, table: str, least: int) -> None:
    """Wait until the bot's table has so many rows."""
    async with asyncio.timeout(20):
        while True:
            with contextlib.closing(sqlite3.connect(database)) as db, contextlib.suppress(sqlite3.OperationalError):
                if db.execute(f"SELECT count(*) FROM {table}").fetchone()[0] >= least:
                    return
            await asyncio.sleep(0.01)  # another process's file: there is nothing to wait on


@pytest.mark.slow
async def test_the_example_bot_acts_on_every_whale_once_though_it_is_killed(tmp_path: Path) -> None:
    database = tmp_path / "bot.db"
    async with running_gateway(tmp_path, replay_page=10) as rig:
        async with running_bot(rig.url, database):  # the first run starts now, and is killed amid the work
            await counted(database, "progress", 1)
            for number in range(1, 101):
                await rig.alerts(number)
            await counted(database, "ledger", 5)
        for number in range(101, 151):
            await rig.alerts(number)
        async with running_bot(rig.url, database) as process:
            await counted(database, "ledger", 150)
            await rig.publish(confirmed_draft(1))
            process.terminate()
            assert await process.wait() == 0
            assert process.stderr is not None
            assert not await process.stderr.read()
    with contextlib.closing(sqlite3.connect(database)) as db:
        found = [row[0] for row in db.execute("SELECT txid FROM ledger")]
    assert sorted(found) == sorted(txid(number) for number in range(1, 151))


@pytest.mark.slow
async def test_the_example_bot_continues_with_the_renewed_token(tmp_path: Path) -> None:
    """It is killed after a renewal and started with the old token, then with another one."""
    database = tmp_path / "bot.db"
    came: asyncio.Queue[int] = asyncio.Queue()

    async def first(peer: Peer) -> None:
        await peer.authenticate("given")
        await peer.subscribe(0)
        await peer.say({"type": "token_expiring", "expires_at": AT})
        await peer.hear("refresh")
        await peer.say({"type": "token", "token": jwt("renewed"), "expires_at": AT})
        await peer.linger()

    def expects(name: str) -> Script:
        async def script(peer: Peer) -> None:
            await peer.authenticate(name)
            await peer.subscribe(0)
            came.put_nowait(1)
            await peer.linger()

        return script

    async with scripted(first, expects("renewed"), expects("another")) as server:
        async with running_bot(server.url, database, jwt("given")):
            await counted(database, "renewed", 1)
        for token in ("given", "another"):
            async with running_bot(server.url, database, jwt(token)) as process:
                await came.get()
                process.terminate()
                assert await process.wait() == 0
    assert database.stat().st_mode & 0o077 == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "said"),
    [((), b"usage: "), (("http://x", "b.db"), b"is not a WebSocket URL"), (("ws://x", "no/b.db"), b"unable")],
)
async def test_the_example_bot_names_invalid_settings(tmp_path: Path, arguments: tuple[str, ...], said: bytes) -> None:
    process = await asyncio.create_subprocess_exec(
        sys.executable, str(BOT), *arguments, stderr=asyncio.subprocess.PIPE, cwd=tmp_path
    )
    _, errors = await process.communicate()
    assert process.returncode == 2
    assert said in errors
    assert errors.splitlines()[-1].startswith(b"usage: python bot.py URL DATABASE")


@pytest.mark.slow
async def test_the_example_bot_reports_missed_events(tmp_path: Path) -> None:
    database = tmp_path / "bot.db"
    async with running_gateway(tmp_path) as rig:
        async with running_bot(rig.url, database):
            await counted(database, "progress", 1)
        with contextlib.closing(sqlite3.connect(database)) as db, db:
            db.execute("UPDATE progress SET epoch = 'before'")
        async with running_bot(rig.url, database) as process:
            assert process.stderr is not None
            async with asyncio.timeout(20):
                assert b"missed events between" in await process.stderr.readline()
