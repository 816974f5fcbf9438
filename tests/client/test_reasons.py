"""Why a first connection failed, in words: statuses, addresses, certificates."""

import re
import socket
import ssl
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import trustme
from websockets.datastructures import Headers
from websockets.exceptions import InvalidStatus
from websockets.http11 import Response

from kit.odd_answers import ODD, answering
from kit.ports import answers, closed_port, ended, linked_stream, lost, port
from kit.scripted_server import Peer, alert_frame, scripted
from kit.tls import Certificate, context_of
from whaled.client import (
    Connected,
    Disconnected,
    LinkLostError,
    UnusableServerError,
    WhaleAlert,
    probe,
    reasons,
)
from whaled.client.dial import call
from whaled.client.probe import Greeting
from whaled.client.reasons import Place, reason_of

HERE = Place(host="127.0.0.1", port=1, is_secure=False)


# --- statuses ---


def answered(status: int, body: bytes = b"", **headers: str) -> InvalidStatus:
    return InvalidStatus(Response(status, "x", Headers(headers), body))


def test_every_status_from_500_on_but_two_is_tried_again_and_below_it_three() -> None:
    passing = {status for status in range(200, 600) if reasons.is_passing(answered(status))}
    assert passing == {408, 425, 429} | (set(range(500, 600)) - {501, 505})


@pytest.mark.parametrize("status", [500, 502, 503, 504, 520, 521, 522, 523, 524, 525, 526, 530, 599, 429])
async def test_a_first_connection_waits_for_a_server_behind_a_proxy_and_reports_it(status: int) -> None:
    async with port(answers(b"HTTP/1.1 %d x\r\nContent-Length: 0\r\n\r\n" % status)) as place:
        reason = await lost(f"ws://{place}")
    assert reason.startswith(f"{place} answered HTTP {status}")


@pytest.mark.parametrize("status", [400, 401, 403, 404, 405, 407, 409, 421, 426, 431, 451, 499, 501, 505, 301, 200])
async def test_a_status_that_does_not_pass_ends_the_stream_with_its_cause(status: int) -> None:
    async with port(answers(b"HTTP/1.1 %d x\r\nContent-Length: 0\r\n\r\n" % status)) as place:
        reason = await ended(f"ws://{place}")
    assert reason.startswith(f"{place} answered HTTP {status}")
    assert ("(" in reason) == (status not in {409, 499})


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (answered(521), " (the proxy in front of the server cannot reach it)"),
        (answered(526), " (the proxy in front of the server cannot establish TLS with it)"),
        (answered(503, b"come later\n"), ": come later"),
        (
            answered(404, b"<html>edge</html>"),
            " (nothing is served at this path: is the URL right, and does a proxy pass",
        ),
        (answered(403, b"origin not allowed"), ": origin not allowed (a proxy, a firewall or an allow list"),
        (answered(403, b"\x1b[2J"), " (a proxy, a firewall or an allow list refuses this client)"),
        (answered(302, Location="https://u:p@x/?t=1"), " (a redirect to 'https://***@x/?***', which is not followed"),
        (answered(301), " (a redirect, which is not followed: the token is sent to no other server)"),
        (answered(200, b"<p>"), " (a web page, not a WebSocket: is the URL right, does a proxy pass on `Upgrade`?)"),
    ],
)
def test_a_status_is_explained_and_only_plain_text_is_quoted(error: InvalidStatus, text: str) -> None:
    assert reason_of(error, HERE, timeout_s=1).startswith(
        f"127.0.0.1:1 answered HTTP {error.response.status_code}{text}"
    )


@pytest.mark.parametrize(
    ("value", "seconds"),
    [("7", 7.0), ("1.5", 1.5), (" 3 ", 3.0), ("-5", None), ("soon", None), ("", None), ("1e3", None)],
)
def test_retry_after_may_have_decimals(value: str, seconds: float | None) -> None:
    assert reasons.retry_after(InvalidStatus(Response(503, "x", Headers({"Retry-After": value}))), 0.0) == seconds


@pytest.mark.slow
@pytest.mark.parametrize("head", ODD.values(), ids=ODD.keys())
async def test_a_malformed_response_is_a_failure_of_the_stream_and_nothing_else(
    head: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stream that works goes on trying; one that never did may call it a mistake in the URL."""
    monkeypatch.setattr(probe, "GREETING_S", 0.01)
    async with answering(head) as place, scripted(Peer.open_and_linger) as server:
        async with linked_stream(f"ws://{place}", compression=True, reconnect=False) as source:
            with pytest.raises((LinkLostError, UnusableServerError)) as caught:
                await anext(source)
        dial = linked_stream(f"ws://{place}", compression=True)._dial
        with pytest.raises(LinkLostError) as lost:
            await call(dial, is_first=False)
        assert str(caught.value)
        assert lost.value.retry_after_s is None or 0 <= lost.value.retry_after_s <= 600
        async with linked_stream(server.url) as source:  # nothing is left behind that disturbs the next
            assert isinstance(await anext(source), Connected)


@pytest.mark.parametrize(
    ("head", "says", "wait_s"),
    [
        ("two Retry-After headers", "HTTP 503", 9.0),
        ("429, two Retry-After headers", "HTTP 429 (too many connections from this address)", 9.0),
        ("a valid and an invalid Retry-After", "HTTP 503", 3.0),
        ("two invalid Retry-After headers", "HTTP 429", None),
        ("a nonexistent year", "HTTP 503", None),
        ("a nonexistent time zone", "HTTP 429", None),
        ("two locations", "a redirect to 'http://a.example/', which is not followed", None),
        ("two empty locations", "a redirect, which is not followed", None),
    ],
)
async def test_the_readable_part_of_a_repeated_header_counts(head: str, says: str, wait_s: float | None) -> None:
    async with answering(ODD[head]) as place:
        with pytest.raises(LinkLostError, match=re.escape(says)) as lost:
            await call(linked_stream(f"ws://{place}")._dial, is_first=False)
    assert lost.value.retry_after_s == wait_s


async def test_a_busy_server_with_two_retry_after_headers_is_tried_again() -> None:
    async with answering(ODD["two Retry-After headers"]) as place, linked_stream(f"ws://{place}") as source:
        lost = await anext(source)
        assert isinstance(lost, Disconnected)
        assert 9 <= lost.retry_in_s < 9.1


# --- the wrong port, the wrong scheme ---


def test_a_ports_greeting_is_quoted_in_part_and_without_control_characters() -> None:
    assert Greeting(is_open=True).service is None
    assert Greeting(is_open=True, received=b"HTTP/1.1 200 OK\r\n").service is None
    service = Greeting(is_open=True, received=b"\x1b[31m" + b"x" * 200).service
    assert service is not None
    assert service.isprintable()
    assert len(service) < 80


# --- nobody there ---


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (socket.gaierror(socket.EAI_NONAME, "Name or service not known"), "no address found for 127.0.0.1: is the"),
        (socket.gaierror(socket.EAI_AGAIN, "Temporary failure"), "the name server does not respond for 127.0.0.1"),
        (OSError("Multiple exceptions: [Errno 111] Connect call failed, [Errno 111] x"), "Connection refused"),
        (OSError("Multiple exceptions: [Errno 101] x, [Errno 111] y"), "Connection refused, Network is unreachable"),
        (ConnectionRefusedError(111, "Connect call failed"), "Connection refused"),
        (OSError("odd"), "odd"),
    ],
)  # fmt: skip
def test_the_reason_of_a_failed_connection_is_given_in_words(error: OSError, text: str) -> None:
    assert reasons.is_passing(error)
    assert reason_of(error, HERE, timeout_s=1).startswith(f"cannot connect to 127.0.0.1:1: {text}")


@pytest.mark.parametrize("name", ["HTTPS_PROXY", "http_proxy", "ALL_PROXY"])
async def test_a_proxy_of_the_environment_is_not_used_and_named_where_nothing_is_reached(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, "http://127.0.0.1:1")
    number = closed_port()
    assert await lost(f"ws://127.0.0.1:{number}") == (
        f"cannot connect to 127.0.0.1:{number}: Connection refused (the environment's {name} is not used: give a "
        "proxy with `proxy=`, `whaled tail --proxy`)"
    )

    async def script(peer: Peer) -> None:
        await peer.open()
        await peer.say(alert_frame(1))
        await peer.linger()

    async with scripted(script) as server, linked_stream(server.url, link_events=False) as source:
        assert isinstance(await anext(source), WhaleAlert)


# --- certificates ---


async def refused_certificate(
    tmp_path: Path,
    name: str = "127.0.0.1",
    *,
    is_trusted: bool = True,
    not_before: datetime | None = None,
    not_after: datetime | None = None,
) -> str:
    authority = trustme.CA()
    issued = authority.issue_cert(name, not_before=not_before, not_after=not_after)
    chain = tmp_path / f"{name}-{is_trusted}-{not_before}-{not_after}.pem"
    for pem in (issued.private_key_pem, *issued.cert_chain_pems):
        pem.write_to_path(str(chain), append=True)
    trusting = ssl.create_default_context()
    if is_trusted:
        authority.configure_trust(trusting)
    async with scripted(tls=context_of(chain, chain)) as server:
        reason = await ended(server.url, ssl=trusting)
        place = server.url.removeprefix("wss://")
    assert reason.startswith(f"the certificate of {place} is not accepted: ")
    return reason


async def test_a_certificate_error_suggests_a_remedy(tmp_path: Path) -> None:
    now, day = datetime.now(UTC), timedelta(days=1)
    unknown = await refused_certificate(tmp_path, is_trusted=False)
    assert "; trust its authority (ssl=ssl.create_default_context(cafile=...), `whaled tail --ca-file FILE`)" in unknown
    other = await refused_certificate(tmp_path, "other.example")
    assert other.endswith("; connect by a name or an address that is in the certificate")
    ended_ = await refused_certificate(tmp_path, not_before=now - 2 * day, not_after=now - day)
    assert ended_.endswith("has expired; the server needs a new one; is the clock of this machine right?")
    early = await refused_certificate(tmp_path, not_before=now + day)
    assert early.endswith("not yet valid; is the clock of this machine right?")


@pytest.mark.slow
async def test_a_server_that_hangs_up_during_the_tls_handshake_is_reported(certificate: Certificate) -> None:
    chain, key, _ = certificate
    context = context_of(chain, key)
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    strict = ssl.create_default_context()
    strict.minimum_version = ssl.TLSVersion.TLSv1_3
    async with scripted(tls=context) as server:
        reason = await lost(server.url, ssl=strict)
    assert " hung up during the TLS handshake: no TLS version in common" in reason


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("TLSV1_ALERT_PROTOCOL_VERSION", "no TLS version in common"),
        ("TLSV13_ALERT_CERTIFICATE_REQUIRED", "the server requires a client certificate"),
        ("SSLV3_ALERT_HANDSHAKE_FAILURE", "sslv3 alert handshake failure"),
    ],
)
def test_a_failed_tls_handshake_is_described_in_words(name: str, words: str) -> None:
    error = ssl.SSLError(1, f"[SSL: {name}] (_ssl.c:1006)")
    error.reason = name
    assert reason_of(error, HERE, timeout_s=1) == f"the TLS handshake with 127.0.0.1:1 failed: {words}"
