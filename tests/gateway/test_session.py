"""The session's rules, without a socket: what is said in which state, and what comes of it."""

import json
from collections.abc import Sequence
from typing import Any

import pytest
from msgspec.structs import replace

from kit.sessions import LIMITS, new
from kit.tokens import Tokens
from whaled.errors import Close, TokenRefusal
from whaled.gateway import commands, messages
from whaled.gateway.actions import (
    Action,
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
from whaled.gateway.clients import Clients
from whaled.gateway.limits import EVENTS_PER_TOKEN, FailureLimit, Limit, SessionLimits
from whaled.gateway.session import Session, State
from whaled.model import Position


def say(session: Session, now: float = 1.0, /, **message: Any) -> list[Action]:
    return session.received(json.dumps(message).encode(), now)


def sent(actions: Sequence[Action]) -> list[Any]:
    return [json.loads(action.message) for action in actions if isinstance(action, Send)]


def admitted(limits: SessionLimits = LIMITS, clients: Clients | None = None) -> Session:
    session = new(Tokens(), clients=clients, limits=limits)
    say(session, type="auth", token="good")
    return session


def test_a_token_in_the_first_message_authenticates() -> None:
    session = new(Tokens())
    assert session.opened(None, 0.0) == []
    actions = say(session, type="auth", token="good")
    success, welcome = sent(actions)
    assert success == {
        "type": "auth_success", "client_id": "c1", "permissions": ["read"],
        "expires_at": "1970-01-01T00:16:40+00:00",
    }  # fmt: skip
    assert welcome["authenticated"] is True
    assert welcome["message"] == "Connected to whale alert broadcaster"
    assert welcome["position"] == {"epoch": "e", "offset": 7}
    assert Admit(Tokens().known["good"], True) in actions


def test_a_token_in_the_handshake_authenticates_without_a_message() -> None:
    assert [frame["type"] for frame in sent(new(Tokens()).opened("good", 0.0))] == ["auth_success", "welcome"]


def test_without_authentication_every_client_is_admitted_and_may_read() -> None:
    actions = new(None).opened(None, 0.0)
    (welcome,) = sent(actions)
    assert (welcome["authenticated"], welcome["client_id"], welcome["permissions"]) == (False, None, [])
    assert Admit(None, True) in actions


@pytest.mark.parametrize(
    ("first", "message"),
    [
        ({"type": "ping"}, "First message must be authentication"),
        ({"type": "nonsense"}, "First message must be authentication"),
        ({"type": "auth"}, "Token required"),
        ({"type": "auth", "token": ""}, "Token required"),
        ({"type": "auth", "token": "bad"}, "Invalid or expired token"),
    ],
)
def test_a_failed_authentication_sends_the_fixed_text_and_closes_with_1008(first: dict[str, str], message: str) -> None:
    session = new(Tokens())
    actions = say(session, **first)
    (error,) = sent(actions)
    assert (error["type"], error["message"]) == ("error", message)
    assert actions[-1] == Stop(Close.AUTH_REQUIRED)
    assert say(session, type="auth", token="good") == []  # it is over


def test_garbage_as_first_message_is_a_failed_authentication() -> None:
    actions = new(Tokens()).received(b"{{{", 0.0)
    assert sent(actions)[0]["message"] == "First message must be authentication"
    assert actions[-1] == Stop(Close.AUTH_REQUIRED)


def test_a_silent_client_is_closed_at_the_authentication_timeout() -> None:
    actions = new(Tokens()).auth_deadline()
    assert sent(actions)[0]["message"] == "Authentication timeout"
    assert actions[-1] == Stop(Close.AUTH_REQUIRED)
    assert admitted().auth_deadline() == []


def test_repeated_failures_are_rate_limited_with_a_retry_after() -> None:
    failures = FailureLimit(0.1, 3)
    answers = [sent(say(new(Tokens(), failures), type="auth", token="bad"))[0] for _ in range(4)]
    assert [answer["message"] for answer in answers[:3]] == ["Invalid or expired token"] * 3
    assert (answers[3]["code"], answers[3]["message"]) == ("rate_limited", "Rate limit exceeded")
    assert answers[3]["retry_after"] == 10.0
    actions = say(new(Tokens(), failures), type="auth", token="bad")
    assert actions[0] == Refused(messages.AuthMessage.RATE_LIMITED, TokenRefusal.BAD_SIGNATURE)
    assert actions[-1] == Stop(Close.AUTH_LIMITED)
    assert Close.AUTH_LIMITED.code == 1013


@pytest.mark.parametrize("way", ["message", "header"])
def test_failures_of_others_behind_the_same_address_keep_no_good_token_out(way: str) -> None:
    failures = FailureLimit(0.1, 3)
    for _ in range(500):
        say(new(Tokens(), failures), type="auth", token="bad")
    session = new(Tokens(), failures)
    actions = session.opened("good", 1.0) if way == "header" else say(session, type="auth", token="good")
    assert sent(actions)[0]["type"] == "auth_success"


def test_an_expired_token_is_refused_as_such_during_a_rate_limit_of_its_address() -> None:
    failures = FailureLimit(0.1, 3)
    for _ in range(20):
        say(new(Tokens(), failures), type="auth", token="bad")
    actions = say(new(Tokens(), failures), type="auth", token="ended")
    assert sent(actions)[0]["message"] == "Invalid or expired token"
    assert actions[-1] == Stop(Close.AUTH_REQUIRED)


def test_guesses_on_an_open_connection_are_limited_over_all_connections_of_the_client() -> None:
    failures = FailureLimit(0.1, 3)
    sessions = [new(Tokens(), failures) for _ in range(3)]
    for session in sessions:
        say(session, type="auth", token="good")
    answers: list[Any] = []
    for turn in range(12):
        session = sessions[turn % 3]
        actions = say(session, 100.0, type="auth", token=f"guess {turn}")
        answers.extend(sent(actions))
        if session.state is State.CLOSED:
            assert actions[-1] == Stop(Close.RATE_LIMITED)
            break
    assert [answer["code"] for answer in answers] == ["unauthenticated"] * 3 + ["rate_limited"] * 3
    assert answers[-1]["retry_after"] > 20


def test_a_client_that_guessed_too_often_still_gets_in_with_a_good_token() -> None:
    session = new(Tokens(), FailureLimit(0.1, 3))
    say(session, type="auth", token="good")
    for turn in range(4):
        say(session, 100.0 + turn, type="auth", token="guess")
    assert sent(say(session, 110.0, type="auth", token="longer"))[0]["type"] == "auth_success"


def test_ping_and_stats_are_answered() -> None:
    session = admitted()
    (pong,) = sent(say(session, type="ping", id="x"))
    assert (pong["type"], pong["id"]) == ("pong", "x")
    (stats,) = sent(say(session, type="stats"))
    assert stats == {
        "type": "stats",
        "data": {"total_connections": 3, "authenticated_connections": 2, "alerts_broadcast": 1, "auth_failures": 0},
    }


def test_subscribe_attaches_and_unsubscribe_detaches() -> None:
    session = admitted()
    (attach,) = say(session, type="subscribe", filters={"min_btc": 500}, since={"epoch": "e", "offset": 3})
    assert isinstance(attach, Attach)
    assert attach.since == Position("e", 3)
    actions = say(session, type="unsubscribe")
    assert actions[0] == Detach()
    assert sent(actions) == [{"type": "unsubscribed"}]


def test_a_bad_filter_names_its_path_and_attaches_nothing() -> None:
    actions = say(admitted(), type="subscribe", filters={"min_btcc": 5})
    (error,) = sent(actions)
    assert (error["code"], error["path"]) == ("invalid_filter", "filters.min_btcc")
    assert not any(isinstance(action, Attach) for action in actions)


def test_a_token_without_read_is_welcome_but_gets_no_alerts() -> None:
    session = new(Tokens())
    actions = say(session, type="auth", token="mute")
    assert actions[-1] == Admit(Tokens().known["mute"], False)
    assert sent(say(session, type="subscribe"))[0]["code"] == "forbidden"


@pytest.mark.parametrize("raw", [b"{", b"[]", b'{"type":"nonsense"}', b'{"type":"subscribe","since":1}'])
def test_malformed_input_is_answered_and_the_connection_stays(raw: bytes) -> None:
    session = admitted()
    actions = session.received(raw, 1.0)
    assert any(isinstance(action, Rejected) for action in actions)
    assert sent(actions)[0]["type"] == "error"
    assert sent(say(session, type="ping"))[0]["type"] == "pong"


def test_a_client_over_its_rate_gets_a_retry_after_and_is_then_closed() -> None:
    session = admitted()
    answers = [frame for _ in range(60) for frame in sent(say(session, 1.0, type="ping"))]
    kinds = [answer["type"] for answer in answers]
    assert kinds[:18] == ["pong"] * 18
    limited = next(answer for answer in answers if answer["type"] == "error")
    assert limited["code"] == "rate_limited"
    assert limited["retry_after"] > 0
    assert session.state is State.CLOSED


def test_a_client_that_waits_longer_than_its_retry_after_goes_on() -> None:
    session = admitted()
    for _ in range(25):
        say(session, 1.0, type="ping")
    assert sent(say(session, 30.0, type="ping"))[0]["type"] == "pong"


def test_garbage_is_charged_more_than_messages() -> None:
    session = admitted()
    stops = [action for _ in range(20) for action in session.received(b"{", 1.0) if isinstance(action, Stop)]
    assert stops == [Stop(Close.RATE_LIMITED)]


def wide(entries: int, **message: Any) -> dict[str, Any]:
    return {"type": "subscribe", "filters": {"addresses": [f"1{number:020d}" for number in range(entries)]}, **message}


def passed(session: Session, now: float, message: dict[str, Any], most: int = 100) -> int:
    """How many of these messages are done before one is not."""
    for count in range(most):
        if any(isinstance(action, Limited) for action in say(session, now, **message)):
            return count
    return most


@pytest.mark.parametrize(
    "message",
    [
        {"type": "ping", "padding": "x" * 8000},  # bytes
        wide(400),  # values to compare with
        {"type": "subscribe", "since": {"last": 1}},  # a replay
        {"type": "nonsense"},
    ],
)
def test_a_message_is_charged_by_the_work_of_its_response(message: dict[str, Any]) -> None:
    limits = replace(LIMITS, max_addresses=1000)
    small = passed(admitted(limits), 1.0, {"type": "ping"})
    assert 1 <= passed(admitted(limits), 1.0, message) <= small / 3


def test_the_most_expensive_message_passes_on_credit_and_is_paid_by_waiting() -> None:
    session = admitted(replace(LIMITS, max_addresses=1000))
    most = wide(600, since={"last": 1})
    for now in (10.0, 20.0, 30.0):
        assert any(isinstance(action, Attach) for action in say(session, now, **most))
        (refusal,) = sent(say(session, now, type="ping"))
        assert refusal["code"] == "rate_limited"
        assert 1.0 < refusal["retry_after"] < 5.0
    assert session.state is State.READY


def test_a_client_that_waits_exactly_its_retry_after_goes_on() -> None:
    session = admitted()
    now = 1.0
    for _ in range(20):
        while sent(answers := say(session, now, type="ping"))[0]["type"] == "pong":
            pass
        now += sent(answers)[0]["retry_after"] + 0.001
    assert sent(say(session, now, type="ping"))[0]["type"] == "pong"


def test_a_message_over_the_rate_is_not_parsed() -> None:
    session = admitted()
    passed(session, 1.0, {"type": "ping"})
    for raw in (b"{", b"x" * 16_000, json.dumps({"type": "refresh"}).encode()):
        (refusal,) = sent(session.received(raw, 1.0))
        assert refusal["code"] == "rate_limited"
        assert session.last_message is commands.MessageType.INVALID


def test_every_event_that_a_replay_reads_is_charged() -> None:
    session = admitted()
    session.charge_replay(20 * EVENTS_PER_TOKEN)
    assert passed(session, 1.0, {"type": "ping"}) <= 2


def test_all_connections_of_a_client_have_one_budget_and_none_is_closed_for_another() -> None:
    clients = Clients(max_connections=100, rate=1.0, burst=30.0)
    sessions = [admitted(clients=clients) for _ in range(10)]
    answered = [sent(say(session, 1.0, type="ping"))[0]["type"] for _ in range(10) for session in sessions]
    assert answered.count("pong") == 30
    assert all(session.state is State.READY for session in sessions)
    other = new(Tokens(), clients=clients)
    say(other, type="auth", token="other")
    assert sent(say(other, type="ping"))[0]["type"] == "pong"
    # Nor does coming back fill it.
    for session in sessions:
        assert session.client is not None
        clients.leave(session.client)
    back = admitted(clients=clients)
    (refusal,) = sent(say(back, 1.5, type="ping"))
    assert refusal["retry_after"] > 1.0
    assert any(action == Limited(Limit.CLIENT) for action in say(back, 1.5, type="ping"))
    clients.reconfigure(max_connections=100, rate=100.0, burst=400.0)
    assert sent(say(back, 2.0, type="ping"))[0]["type"] == "pong"


def test_the_budget_of_a_client_that_left_is_remembered_until_it_is_full() -> None:
    clients = Clients(max_connections=100, rate=1.0, burst=30.0)
    session = admitted(clients=clients)
    for _ in range(10):
        say(session, 1.0, type="ping")
    assert session.client is not None
    clients.leave(session.client)
    clients.forget_absent(10.0)
    assert (clients.present, clients.absent) == (0, 1)
    clients.forget_absent(11.0)
    assert clients.absent == 0


def test_a_client_with_too_many_connections_is_refused_with_a_retry_after() -> None:
    clients = Clients(max_connections=2, rate=1.0, burst=30.0)
    first, _second = admitted(clients=clients), admitted(clients=clients)
    third = new(Tokens(), clients=clients)
    actions = say(third, type="auth", token="good")
    (error,) = sent(actions)
    assert (error["code"], error["retry_after"]) == ("too_many_connections", 30.0)
    assert "(2)" in error["message"]
    assert actions[-1] == Stop(Close.FULL)
    assert third.client is None
    assert first.client is not None
    clients.leave(first.client)
    assert admitted(clients=clients).state is State.READY
    assert clients.present == 1


def test_expiry_is_announced_and_then_enforced_after_the_grace() -> None:
    session = admitted()
    assert session.next_deadline() == 900.0  # a tenth of its life before
    assert sent(session.tick(900.0))[0]["type"] == "token_expiring"
    assert session.tick(1024.0) == []
    assert session.tick(1025.0) == [Stop(Close.TOKEN_EXPIRED)]


def late(leeway_s: float = 10.0, at: float = 1003.0) -> Session:
    """Let in at 1003 with a token that ended at 1000."""
    session = new(Tokens(), limits=replace(LIMITS, leeway_s=leeway_s))
    assert sent(say(session, at, type="auth", token="good"))[0]["type"] == "auth_success"
    return session


@pytest.mark.parametrize("leeway_s", [5.0, 30.0])
def test_a_token_accepted_after_its_expiry_lasts_for_the_leeway_and_has_no_grace(leeway_s: float) -> None:
    session = late(leeway_s)
    assert sent(session.tick(1003.0))[0]["type"] == "token_expiring"
    assert session.tick(1000.0 + leeway_s - 0.1) == []
    assert session.tick(1000.0 + leeway_s) == [Stop(Close.TOKEN_EXPIRED)]


def test_a_token_accepted_after_its_expiry_is_not_refreshed() -> None:
    (answer,) = sent(say(late(), 1004.0, type="refresh"))
    assert (answer["code"], answer["message"]) == ("forbidden", "this token has ended: ask for a new one")


def test_a_token_that_had_ended_makes_an_open_connection_end_with_the_leeway() -> None:
    session = admitted()
    say(session, 1003.0, type="auth", token="good")
    session.tick(1003.0)
    assert session.tick(1010.0) == [Stop(Close.TOKEN_EXPIRED)]


def test_a_new_token_keeps_a_connection_accepted_after_its_tokens_expiry() -> None:
    session = late()
    assert sent(say(session, 1004.0, type="auth", token="longer"))[0]["type"] == "auth_success"
    assert session.next_deadline() == 8700.0
    assert sent(say(session, 1005.0, type="refresh")) == []  # as for any token: the family of this one has ended


def test_a_refreshed_token_moves_the_end() -> None:
    session = admitted()
    session.tick(900.0)
    (token,) = sent(say(session, 950.0, type="refresh"))
    assert (token["type"], token["token"]) == ("token", "longer")
    assert session.tick(1025.0) == []
    assert session.next_deadline() == 8700.0


def test_a_new_token_in_place_keeps_the_connection() -> None:
    session = admitted()
    assert sent(say(session, type="auth", token="longer"))[0]["type"] == "auth_success"
    assert session.grant == Tokens().known["longer"]


@pytest.mark.parametrize("token", ["bad", "other"])
def test_a_wrong_token_in_place_changes_nothing(token: str) -> None:
    session = admitted()
    actions = say(session, type="auth", token=token)
    assert isinstance(actions[0], Refused)
    assert sent(actions)[0]["message"] == "Invalid or expired token"
    assert session.grant == Tokens().known["good"]


def test_a_late_auth_without_authentication_is_answered_not_punished() -> None:
    session = new(None)
    session.opened(None, 0.0)
    (answer,) = sent(say(session, type="auth", token="anything"))
    assert (answer["type"], answer["client_id"]) == ("auth_success", None)


def test_a_refused_refresh_is_answered_with_forbidden() -> None:
    session = new(Tokens())
    say(session, type="auth", token="other")
    assert sent(say(session, type="refresh"))[0]["code"] == "forbidden"


def test_a_session_whose_key_is_retired_ends() -> None:
    tokens = Tokens()
    session = new(tokens)
    say(session, type="auth", token="good")
    assert session.recheck(2.0) == []
    tokens.retired.add("c1")
    assert session.recheck(2.0) == [Stop(Close.TOKEN_REVOKED)]
    assert session.recheck(2.0) == []


def test_a_second_check_ends_sessions_that_the_clock_ended() -> None:
    session = admitted()
    assert sent(session.recheck(5000.0))[0]["type"] == "token_expiring"
    assert session.recheck(5000.0) == [Stop(Close.TOKEN_EXPIRED)]


def test_a_second_refresh_of_one_token_ends_the_family() -> None:
    session = new(Tokens())
    say(session, type="auth", token="longer")
    actions = say(session, type="refresh")
    assert actions == [FamilyEnded(Tokens().known["longer"]), Stop(Close.TOKEN_REVOKED)]


@pytest.mark.parametrize(("after_s", "is_lost"), [(5.0, True), (300.0, False)])
def test_a_link_that_breaks_right_after_a_refresh_may_have_lost_the_token(after_s: float, is_lost: bool) -> None:
    tokens = Tokens()
    session = new(tokens)
    session.link_lost(1.0)
    say(session, type="auth", token="good")
    session.link_lost(1.0)
    say(session, 2.0, type="refresh")
    session.link_lost(2.0 + after_s)
    assert tokens.lost == ([(tokens.known["good"], tokens.known["longer"])] if is_lost else [])
