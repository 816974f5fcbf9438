"""What clients send, mutated: only a ClientError comes of it, an answer fits in a frame, a session keeps its rules."""

import json
from functools import cache

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kit.fuzz import INPUT_LIMIT_S, corpus, hunt, scaling, seconds
from kit.sessions import new
from kit.tokens import Tokens
from kit.whales import alert_draft
from whaled.errors import ClientError, Close
from whaled.gateway import commands, messages, positions
from whaled.gateway.actions import (
    Admit,
    Attach,
    Detach,
    FamilyEnded,
    Limited,
    Refused,
    Rejected,
    Send,
    Stop,
)
from whaled.gateway.framing import text_frame
from whaled.gateway.session import Session, State
from whaled.model import Position
from whaled.whales.filters import KEYS, Filter, parse_filter

MAX_FRAME = 16 * 1024
MAX_ADDRESSES = 1_000
# The most that an answer repeats of a question is its filter, and 1000 short addresses gain quotes and commas.
MAX_ANSWER = 4 * MAX_FRAME
POSITION = Position("e", 7)

MESSAGES: tuple[dict[str, object], ...] = (
    {"type": "ping"},
    {"type": "ping", "id": 7},
    {"type": "ping", "id": "seven"},
    {"type": "stats"},
    {"type": "unsubscribe"},
    {"type": "refresh"},
    {"type": "auth", "token": "good"},
    {"type": "auth", "token": "other"},
    {"type": "auth", "token": "longer"},
    {"type": "auth", "token": "mute"},
    {"type": "auth", "api_key": "whk_something"},
    {"type": "subscribe"},
    {"type": "subscribe", "filters": {"min_btc": 100}, "since": {"epoch": "e", "offset": 3}},
    {"type": "subscribe", "filters": {"kinds": ["alert"], "updates_of": "all"}, "since": {"last": 5}},
    {"type": "subscribe", "since": {"time": "2026-01-01T00:00:00Z"}},
    {
        "type": "subscribe",
        "filters": {
            "min_btc": 0.1, "max_btc": 21_000_000, "min_moved_btc": 0.29, "min_flow_btc": 0.5,
            "min_usd": 1e6, "flow_types": ["inflow"],
            "min_urgency": 0.5, "min_confidence": 1, "exchanges": ["Binance", "KRAKEN"], "kinds": ["alert", "update"],
            "rules": ["threshold_btc"],
            "addresses": ["1A1zP1eP5QGefi2DMPTfTL5SLmv7DivfNa", "bc1qw508d6qejxtdg4y5r3zarvary0c5xw7kv8f3t4"],
            "updates_of": "sent",
        },
    },
)  # fmt: skip
WORDS = (
    "type", "auth", "token", "api_key", "ping", "id", "stats", "subscribe", "filters", "since", "epoch", "offset",
    "last", "time", "unsubscribe", "refresh", "min_btc", "max_btc", "min_moved_btc", "min_flow_btc", "min_usd",
    "flow_types", "inflow", "rules", "threshold_btc", "min_urgency", "min_confidence",
    "exchanges", "addresses", "kinds", "alert", "updates_of", "good", "mute", "other",
    "2026-01-01T00:00:00", "0001-01-01T00:00:00+23:59", "9999-12-31T23:59:60Z", "1970-01-01", 10**400,
    ["alert"], ["\u0390" * 100], ["\u1e9e" * 60], ["1" * 14] * 1_000, {"last": 10**100}, {"epoch": "e", "offset": 7},
)  # fmt: skip


def test_the_corpus_has_every_filter() -> None:
    subscribed = [message["filters"] for message in MESSAGES if "filters" in message]
    assert {key for filters in subscribed if isinstance(filters, dict) for key in filters} == set(KEYS)


@cache
def seeds() -> tuple[bytes, ...]:
    return tuple(json.dumps(message).encode() for message in MESSAGES)


def check(raw: bytes) -> None:
    """Everything that holds of every message by itself."""
    raw = raw[:MAX_FRAME]
    try:
        command = commands.parse(raw)
        if isinstance(command, commands.Subscribe):
            check_filter(parse_filter({} if command.filters is None else command.filters, max_addresses=MAX_ADDRESSES))
            check_since(command.since)
    except ClientError as error:
        answer = messages.error(error.code, str(error), path=error.path)
        assert len(json.loads(answer)["message"]) <= messages.MAX_ERROR_CHARACTERS
        check_answer(answer, most=4_000)
    for authenticator in (None, Tokens()):
        session = new(authenticator)
        session.opened("good" if authenticator else None, 0.0)
        check_step(session, raw, 1.0)


def check_filter(found: Filter) -> None:
    """What a client is told of its filter means the same, and is taken again."""
    normalised = msgspec.json.decode(msgspec.json.encode(found.normalised()))
    assert parse_filter(normalised, max_addresses=MAX_ADDRESSES) == found
    assert found.matches(alert_draft(1)) in (True, False)


def check_since(since: commands.Since | None) -> None:
    if isinstance(since, commands.At):
        assert isinstance(since.time.timestamp(), float)
    else:
        start = positions.start(since, epoch="e", head=7, oldest=3)
        assert 2 <= start.cursor <= 7


def check_answer(message: bytes, *, most: int = MAX_ANSWER) -> None:
    assert len(text_frame(message)) <= most
    assert isinstance(json.loads(message)["type"], str)


def check_step(session: Session, raw: bytes | None, now: float) -> None:
    """A message (None is a binary one), and what must hold of every answer."""
    before, grant = session.state, session.grant
    actions = session.received_binary(now) if raw is None else session.received(raw, now)
    kinds = [type(action) for action in actions]
    if before is State.CLOSED:
        assert not actions
        assert session.state is State.CLOSED
        return
    assert actions  # nothing a client sends goes unanswered
    assert (session.state is State.CLOSED) == (Stop in kinds)
    assert kinds.count(Stop) == (kinds[-1] is Stop)
    if session.state is State.AUTHENTICATING:
        raise AssertionError("a message that is no valid credential ends the wait for one")
    if before is State.AUTHENTICATING and session.state is State.READY:
        assert kinds == [Send, Send, Admit]
        assert session.grant is not None
    else:
        assert Admit not in kinds
    if grant is not None:
        assert session.grant is not None
        assert session.grant.client_id == grant.client_id
    for action in actions:
        match action:
            case Send(message=message):
                check_answer(message)
            case Attach(filter=chosen, since=since):
                assert session.may_read
                check_filter(chosen)
                check_since(since)
                message = messages.subscribed(chosen.normalised(), recovered=None, start=POSITION, position=POSITION)
                check_answer(message)
            case Stop(close=close):
                assert close in (Close.AUTH_REQUIRED, Close.RATE_LIMITED, Close.TOKEN_REVOKED)
                assert any(each in kinds for each in (Refused, Limited, FamilyEnded))
            case _:
                assert isinstance(action, Admit | Detach | Refused | FamilyEnded | Limited | Rejected)


@pytest.mark.parametrize("raw", corpus("clients"))
def test_every_kept_message_is_answered(raw: bytes) -> None:
    check(raw)


def test_every_seed_passes_the_check_that_mutations_have_to_pass() -> None:
    for raw in seeds():
        check(raw)


@pytest.mark.slow
@pytest.mark.timeout(0)
def test_no_mutation_of_a_message_gets_more_than_a_client_error() -> None:
    hunt("clients", check, seeds(), WORDS)


def kept() -> list[bytes]:
    return [param.values[0][:MAX_FRAME] for param in corpus("clients")]


Steps = list[tuple[int, float]]


@settings(deadline=None)
@given(
    st.booleans(),
    st.lists(st.tuples(st.integers(0, len(MESSAGES) + len(kept()) + 3), st.floats(0, 400)), max_size=60),
)
def test_no_sequence_of_messages_breaks_a_session_s_rules(has_tokens: bool, steps: Steps) -> None:
    session = new(Tokens() if has_tokens else None)
    session.opened(None, 0.0)
    messages = [*seeds(), *kept(), None]
    now = 0.0
    admitted = 0
    for which, pause_s in steps:
        now += pause_s if which % 3 == 0 else 0.01
        before = session.state
        if which < len(messages):
            check_step(session, messages[which], now)
        else:
            actions = (session.received_control(now), session.tick(now), session.auth_deadline())[which % 3]
            assert before is not State.CLOSED or not actions
        assert (before, session.state) in {
            (State.AUTHENTICATING, State.AUTHENTICATING), (State.AUTHENTICATING, State.READY),
            (State.AUTHENTICATING, State.CLOSED), (State.READY, State.READY), (State.READY, State.CLOSED),
            (State.CLOSED, State.CLOSED),
        }  # fmt: skip
        admitted += before is State.AUTHENTICATING and session.state is State.READY
        assert admitted <= 1
        assert session.state is not State.READY or not has_tokens or session.grant is not None


@pytest.mark.parametrize("has_tokens", [False, True])
def test_a_client_that_sends_only_garbage_is_closed_soon(has_tokens: bool) -> None:
    for raw in kept():
        try:
            commands.parse(raw)
        except ClientError:
            session = new(Tokens() if has_tokens else None)
            session.opened("good" if has_tokens else None, 0.0)
            count = 0
            while session.state is not State.CLOSED:
                session.received(raw, 1.0)
                count += 1
            assert count <= 20


@pytest.mark.parametrize(
    "entry", ['"k%d":0', '"exchanges":["%d"]', '"addresses":["aaaaaaaaaaaaaaaa%d"]', '"%d\\u0390":[]']
)
def test_a_long_filter_costs_no_more_than_its_length(entry: str) -> None:
    def make(count: int) -> bytes:
        inner = ",".join(entry % number for number in range(count))
        return f'{{"type":"subscribe","filters":{{{inner}}}}}'.encode()

    def run(raw: bytes) -> None:
        command = commands.parse(raw)
        assert isinstance(command, commands.Subscribe)
        try:
            parse_filter(command.filters, max_addresses=MAX_ADDRESSES)
        except ClientError:
            return

    assert scaling(make, run, 400) < 28


def test_the_largest_frames_take_no_more_than_milliseconds() -> None:
    for raw in (*kept(), *(word * (MAX_FRAME // len(word)) for word in (b"[", b"9", b'{"a":', b'"\\u0000"', b"\xff"))):
        # The best of three: the garbage collector strikes now and then.
        assert min(seconds(check, raw) for _ in range(3)) < INPUT_LIMIT_S / 5
