import contextlib
import json
from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from whaled.errors import ClientError, ClientErrorCode
from whaled.gateway import commands
from whaled.model import Position


@pytest.mark.parametrize(
    ("raw", "command"),
    [
        (b'{"type":"auth","token":"t"}', commands.Auth("t")),
        (b'{"type":"auth","api_key":"whk_1"}', commands.Auth("whk_1")),
        (b'{"type":"auth"}', commands.Auth(None)),
        (b'{"type":"auth","token":""}', commands.Auth(None)),
        (b'{"type":"auth","token":7}', commands.Auth(None)),
        (b'{"type":"ping"}', commands.Ping(None)),
        (b'{"type":"ping","id":7,"extra":1}', commands.Ping(7)),
        (b'{"type":"stats"}', commands.Stats()),
        (b'{"type":"unsubscribe"}', commands.Unsubscribe()),
        (b'{"type":"refresh"}', commands.Refresh()),
        (b'{"type":"subscribe"}', commands.Subscribe({}, None)),
        (b'{"type":"subscribe","since":{"last":3}}', commands.Subscribe({}, commands.Last(3))),
        (b'{"type":"subscribe","since":{"epoch":"e","offset":4}}', commands.Subscribe({}, Position("e", 4))),
    ],
)  # fmt: skip
def test_commands_are_read(raw: bytes, command: commands.Command) -> None:
    assert commands.parse(raw) == command


def since_time(value: object) -> str:
    command = commands.parse(json.dumps({"type": "subscribe", "since": {"time": value}}).encode())
    assert isinstance(command, commands.Subscribe)
    assert isinstance(command.since, commands.At)
    return command.since.time.isoformat()


def test_a_time_without_zone_is_utc() -> None:
    assert since_time("2026-01-01T00:00:00") == "2026-01-01T00:00:00+00:00"


@pytest.mark.parametrize("text", ["2026-01-01", "2026-01-01T00:00Z", "20260101T000000Z", "2026-01-01T01:00+01:00[CET]"])
def test_a_time_is_read_as_clients_in_other_languages_write_it(text: str) -> None:
    assert datetime.fromisoformat(since_time(text)) == datetime(2026, 1, 1, tzinfo=UTC)


def test_a_unix_time_is_refused_with_the_time_it_may_mean() -> None:
    with pytest.raises(ClientError, match=r"as milliseconds it would be 2026-01-01T00:00:00\+00:00"):
        since_time(1767225600000)


@pytest.mark.parametrize(
    ("raw", "code", "path"),
    [
        (b"", ClientErrorCode.INVALID_JSON, None),
        (b"{", ClientErrorCode.INVALID_JSON, None),
        (b"\xff", ClientErrorCode.INVALID_JSON, None),
        (b"[" * 5000, ClientErrorCode.INVALID_JSON, None),
        (b"[]", ClientErrorCode.INVALID_MESSAGE, None),
        (b"null", ClientErrorCode.INVALID_MESSAGE, None),
        (b"{}", ClientErrorCode.INVALID_MESSAGE, "type"),
        (b'{"type":1}', ClientErrorCode.INVALID_MESSAGE, "type"),
        (b'{"type":"nonsense"}', ClientErrorCode.UNKNOWN_TYPE, None),
        (b'{"type":"ping","id":{}}', ClientErrorCode.INVALID_MESSAGE, "id"),
        (b'{"type":"subscribe","since":5}', ClientErrorCode.INVALID_POSITION, "since"),
        (b'{"type":"subscribe","since":{}}', ClientErrorCode.INVALID_POSITION, "since"),
        (b'{"type":"subscribe","since":{"last":-1}}', ClientErrorCode.INVALID_POSITION, "since"),
        (b'{"type":"subscribe","since":{"epoch":"e","offset":"4"}}', ClientErrorCode.INVALID_POSITION, "since"),
        (b'{"type":"subscribe","since":{"time":"yesterday"}}', ClientErrorCode.INVALID_POSITION, "since"),
        (b'{"type":"subscribe","since":{"time":null}}', ClientErrorCode.INVALID_POSITION, "since"),
        (b'{"type":"subscribe","since":{"time":true}}', ClientErrorCode.INVALID_POSITION, "since"),
        (b'{"type":"subscribe","since":{"time":1e400}}', ClientErrorCode.INVALID_JSON, None),
        (b'{"type":"subscribe","since":{"time":"2026-01-01","x":1}}', ClientErrorCode.INVALID_POSITION, "since"),
    ],
)  # fmt: skip
def test_an_invalid_command_is_named(raw: bytes, code: ClientErrorCode, path: str | None) -> None:
    with pytest.raises(ClientError) as caught:
        commands.parse(raw)
    assert (caught.value.code, caught.value.path) == (code, path)


def test_invalid_json_has_the_text_clients_know() -> None:
    with pytest.raises(ClientError, match=r"^Invalid JSON$"):
        commands.parse(b"nope")


@given(st.binary(max_size=200) | st.recursive(
    st.none() | st.booleans() | st.floats(allow_nan=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(
        st.sampled_from(["type", "token", "since", "filters", "id", "last", "offset", "epoch", "time"]), inner
    ),
    max_leaves=12,
).map(lambda value: json.dumps(value).encode()))  # fmt: skip
def test_any_message_is_a_command_or_a_client_error(raw: bytes) -> None:
    with contextlib.suppress(ClientError):
        commands.parse(raw)
