import json

import pytest

from kit.whales import alert_draft
from whaled.errors import ClientError
from whaled.gateway import commands, messages
from whaled.model import Event


def test_an_error_quotes_a_client_only_in_part() -> None:
    raw = json.dumps({"type": "subscribe", "since": {"last": 5, "9" * 5_000: None}}).encode()
    with pytest.raises(ClientError) as caught:
        commands.parse(raw)
    message = json.loads(messages.error(caught.value.code, str(caught.value)))["message"]
    assert "unknown field `999" in message
    assert len(message) == messages.MAX_ERROR_CHARACTERS
    assert message.endswith("9…")


def test_an_event_is_json_without_a_frame_around_it() -> None:
    draft = alert_draft(1)
    event = Event(offset=7, kind=draft.kind, at=draft.at, whale=draft.whale)
    message = json.loads(messages.event(event, "e"))
    assert (message["type"], message["position"]) == ("whale_alert", {"epoch": "e", "offset": 7})
    assert "matched_addresses" not in message
    assert json.loads(messages.event(event, "e", ("a",)))["matched_addresses"] == ["a"]
