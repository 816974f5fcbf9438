"""The client against a server that follows a script; tests/suites/test_client_gateway.py has the real gateway."""

from datetime import UTC, datetime
from typing import Any

import msgspec
import pytest

from kit.scripted_server import EPOCH, Peer, alert_frame, position, scripted, update_frame
from kit.streams import at, next_offsets, stream
from kit.whales import txid
from whaled import client as public
from whaled.client import (
    AlertData,
    Last,
    StreamError,
    UpdateData,
    UpstreamStatus,
    WhaleAlert,
    WhaleUpdate,
)
from whaled.model import Alert, Update

# --- delivery ---


async def test_alerts_updates_and_upstream_states_come_typed_and_in_order() -> None:
    async def script(peer: Peer) -> None:
        await peer.open(0)
        await peer.say(
            alert_frame(
                1, btc_value=812, flow_type="inflow", flow_sat=7, moved_sat=None, from_labels=["Cold"], rbf_enabled=True
            ),
            update_frame(2, of=1, block_height=800_000, seconds_to_confirmation=61.5),
            {"type": "status", "upstream": "degraded", "since": "2026-01-01T00:00:00Z"},
        )
        await peer.linger()

    async with scripted(script) as server, stream(server.url) as source:
        first, second, third = await anext(source), await anext(source), await anext(source)
        assert isinstance(first, WhaleAlert)
        assert (first.data.btc_value, first.data.flow_type, first.data.moved_sat) == (812.0, "inflow", None)
        assert first.data.flow_sat == 7
        assert first.data.from_labels == ("Cold",)
        assert first.timestamp == datetime(2026, 1, 1, tzinfo=UTC)
        assert first.position == at(1)
        assert isinstance(second, WhaleUpdate)
        assert (second.data.transaction_id, second.data.status) == (txid(1), "confirmed")
        assert second.data.block_height == 800_000
        assert third == UpstreamStatus(state="degraded", since=datetime(2026, 1, 1, tzinfo=UTC))


async def test_a_newer_server_does_not_disturb() -> None:
    async def script(peer: Peer) -> None:
        await peer.say({"type": "news", "from": "protocol 2"})
        await peer.open(0)
        await peer.say({"type": "weather", "position": {"epoch": "x"}})
        await peer.say({**alert_frame(1, shape="spiral", raw={"un": "known"}), "raw": [1], "extra": {"deep": []}})
        await peer.linger()

    async with scripted(script) as server, stream(server.url) as source:
        event = await anext(source)
        assert isinstance(event, WhaleAlert)
        assert event.data.shape == "spiral"
        assert msgspec.json.decode(event.raw)["extra"] == {"deep": []}


def test_the_client_knows_every_field_the_server_sends() -> None:
    for ours, theirs in ((AlertData, Alert), (UpdateData, Update)):
        known = {field.name for field in msgspec.structs.fields(ours)}
        assert known == {field.name for field in msgspec.structs.fields(theirs)}


async def test_the_position_is_that_of_the_event_in_hand() -> None:
    async def script(peer: Peer) -> None:
        await peer.open(7)
        await peer.say(alert_frame(8), alert_frame(9), alert_frame(12))
        await peer.linger()

    async with scripted(script) as server, stream(server.url) as source:
        seen = [source.position]
        async for event in source:
            assert isinstance(event, WhaleAlert)
            assert source.position == event.position
            seen.append(event.position)
            if len(seen) == 3:
                break
        assert seen == [None, at(8), at(9)]
        assert source.position == at(9)  # 12 may have come in; it was not handed over


async def test_alerts_before_subscribed_are_not_delivered() -> None:
    asked: list[Any] = []

    async def script(peer: Peer) -> None:
        await peer.welcome(10)
        await peer.say(alert_frame(11))  # unfiltered: the subscription is still on its way
        asked.append(await peer.subscribe(12))
        await peer.say(alert_frame(12))
        await peer.linger()

    async with scripted(script) as server, stream(server.url, filters={"min_btc": 500}) as source:
        assert await next_offsets(source, 1) == [12]
    assert asked == [{"type": "subscribe", "filters": {"min_btc": 500}, "since": position(10)}]


@pytest.mark.parametrize(
    ("since", "sent"),
    [
        (at(4), position(4)),
        (f"{EPOCH}:4", position(4)),
        (Last(3), {"last": 3}),
        ("last:3", {"last": 3}),
        (datetime(2026, 1, 1, tzinfo=UTC), {"time": "2026-01-01T00:00:00+00:00"}),
        ("2026-01-01T02:00+02:00", {"time": "2026-01-01T02:00:00+02:00"}),
        ("2026-01-01", {"time": "2026-01-01T00:00:00+00:00"}),
    ],
)
async def test_a_stream_starts_at_the_requested_position(since: Any, sent: Any) -> None:
    asked: list[Any] = []

    async def script(peer: Peer) -> None:
        asked.append((await peer.open(10))["since"])
        await peer.say(alert_frame(8))
        await peer.linger()

    async with scripted(script) as server, stream(server.url, since=since) as source:
        assert await next_offsets(source, 1) == [8]
    assert asked == [sent]


# --- the cursor, against a model of the log ---


def test_everything_raised_on_purpose_is_a_stream_error() -> None:
    for name in public.__all__:
        found = getattr(public, name)
        if isinstance(found, type) and issubclass(found, Exception):
            assert issubclass(found, StreamError)
