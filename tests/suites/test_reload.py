"""Each key that a reload changes, on one running daemon: its effect before and after, and the state that stays.

A case is registered under its key. It gets the daemon with the first configuration of `ReloadRig`, and changes the key.
"""

import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest

from kit.issuers import AUDIENCE, stand_in_apart
from kit.reload import PAYEE, PAYER, PING, Client, Ended, ReloadRig, claims, payment, until, wrong_token
from whaled.auth import audit
from whaled.auth.audit import Act
from whaled.auth.store import open_directly
from whaled.config.keys import reloadable

pytestmark = pytest.mark.slow

Case = Callable[[ReloadRig], None]
CASES: dict[str, Case] = {}
# Something that a test waits for in vain, because the daemon must not do it.
NOT_S = 0.3
OTHER = "bc1qllllllllllllllllllllllllllllllllfglmy6"
INVALID, LIMITED = "Invalid or expired token", "Rate limit exceeded"


def case(key: str) -> Callable[[Case], Case]:
    """Register the case of a key."""

    def register(run: Case) -> Case:
        assert key not in CASES
        CASES[key] = run
        return run

    return register


@pytest.fixture(scope="module")
def one_rig(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ReloadRig]:
    rig = ReloadRig(tmp_path_factory.mktemp("reload"))
    try:
        yield rig
    finally:
        rig.close()


@pytest.fixture
def rig(one_rig: ReloadRig) -> ReloadRig:
    one_rig.start()
    one_rig.reset()
    return one_rig


def test_every_key_that_a_reload_changes_has_a_case() -> None:
    assert CASES.keys() == reloadable()


# --- detection --------------------------------------------------------------------------------------------------------


@case("detection.threshold_btc")
def _(rig: ReloadRig) -> None:
    assert rig.alert(**{PAYEE: 99.0}) is None
    rig.apply(detection={"threshold_btc": 98})
    assert rig.alert(**{PAYEE: 99.0}) is not None


@case("detection.threshold_usd")
def _(rig: ReloadRig) -> None:
    assert rig.alert(**{PAYEE: 10.0}) is None
    rig.apply(detection={"threshold_usd": 500_000})
    found = rig.alert(**{PAYEE: 10.0})
    assert found is not None
    assert found["matched_rules"] == ["threshold_usd"]


@case("detection.watch")
def _(rig: ReloadRig) -> None:
    book = rig.book((PAYEE, "Example"))
    rig.apply(detection={"address_book": book})
    assert rig.alert(**{PAYEE: 1.0}) is None
    rig.apply(detection={"address_book": book, "watch": [{"name": "mine", "labels": ["Example"]}]})
    found = rig.alert(**{PAYEE: 1.0})
    assert found is not None
    assert found["matched_rules"] == ["watch:mine"]


@case("detection.basis")
def _(rig: ReloadRig) -> None:
    assert rig.alert(**{PAYEE: 60.0, PAYER: 90.0}) is not None
    rig.apply(detection={"basis": "moved"})
    assert rig.alert(**{PAYEE: 60.0, PAYER: 90.0}) is None


@case("detection.price_max_age")
def _(rig: ReloadRig) -> None:
    found = rig.alert(**{PAYEE: 200.0})
    assert found is not None
    assert found["usd_value"] == 10_000_000
    rig.apply(detection={"price_max_age": "10s"})  # the backend's price is a minute old
    found = rig.alert(**{PAYEE: 200.0})
    assert found is not None
    assert found["usd_value"] is None


@case("detection.address_book")
def _(rig: ReloadRig) -> None:
    found = rig.alert(**{PAYEE: 200.0})
    assert found is not None
    assert found["to_labels"] == []
    rig.apply(detection={"address_book": rig.book((PAYEE, "Example"))})
    found = rig.alert(**{PAYEE: 200.0})
    assert found is not None
    assert found["to_labels"] == ["Example"]


@case("detection.max_book_addresses")
def _(rig: ReloadRig) -> None:
    book = rig.book((PAYEE, "Example"))
    rig.apply(detection={"address_book": book, "max_book_addresses": 1})
    rig.book((PAYEE, "Example"), (OTHER, "Example"))
    refused = rig.reload(detection={"address_book": book, "max_book_addresses": 1})
    assert refused is not None
    assert "detection.max_book_addresses" in refused
    assert rig.metric("whaled_address_book_addresses") == 1
    rig.apply(detection={"address_book": book, "max_book_addresses": 2})
    assert rig.metric("whaled_address_book_addresses") == 2


@case("detection.max_book_loss")
def _(rig: ReloadRig) -> None:
    book = rig.book((PAYEE, "Example"), (OTHER, "Example"))
    rig.apply(detection={"address_book": book, "max_book_loss": 0.4})
    rig.book((PAYEE, "Example"))
    refused = rig.reload(detection={"address_book": book, "max_book_loss": 0.4})
    assert refused is not None
    assert "detection.max_book_loss" in refused
    assert rig.metric("whaled_address_book_addresses") == 2
    rig.apply(detection={"address_book": book, "max_book_loss": 0.6})
    assert rig.metric("whaled_address_book_addresses") == 1


@case("detection.min_flow_share")
def _(rig: ReloadRig) -> None:
    book = rig.book((PAYEE, "Example"))
    rig.apply(detection={"address_book": book})
    found = rig.alert(**{PAYEE: 50.0, OTHER: 950.0})
    assert found is not None
    assert found["flow_type"] == "unknown"
    rig.apply(detection={"address_book": book, "min_flow_share": 0.04})
    found = rig.alert(**{PAYEE: 50.0, OTHER: 950.0})
    assert found is not None
    assert found["flow_type"] == "inflow"


# --- gateway: who may connect -----------------------------------------------------------------------------------------


@case("gateway.origins")
def _(rig: ReloadRig) -> None:
    page = {"Origin": "https://example.org"}
    assert rig.client(headers=page).status == 403
    rig.apply(gateway={"origins": ["https://example.org"]})
    assert rig.client(headers=page).status == 101


FROM_PROXY = {"X-Forwarded-For": "192.0.2.7"}


@case("gateway.trusted_proxies")
def _(rig: ReloadRig) -> None:
    rig.apply(gateway={"trusted_proxies": ["127.0.6.1"], "max_connections_per_address": 1})
    rig.client(source="127.0.6.1", headers=FROM_PROXY)
    assert rig.client(source="127.0.6.1", headers=FROM_PROXY).status == 429
    assert rig.client(source="127.0.6.1", headers={"X-Forwarded-For": "192.0.2.8"}).status == 101


@case("gateway.client_address_header")
def _(rig: ReloadRig) -> None:
    unreadable = {"Forwarded": "for=nobody"}
    rig.apply(gateway={"trusted_proxies": ["127.0.6.2"]})
    assert rig.client(source="127.0.6.2", headers=unreadable).status == 101
    rig.apply(gateway={"trusted_proxies": ["127.0.6.2"], "client_address_header": "forwarded"})
    assert rig.client(source="127.0.6.2", headers=unreadable).status == 400


@case("gateway.proxy_protocol")
def _(rig: ReloadRig) -> None:
    rig.apply(gateway={"trusted_proxies": ["127.0.6.3"]})
    assert rig.client(source="127.0.6.3").status == 101
    rig.apply(gateway={"trusted_proxies": ["127.0.6.3"], "proxy_protocol": "required"})
    with pytest.raises((OSError, EOFError)):
        rig.client(source="127.0.6.3")
    assert rig.metric("whaled_connections_refused_total", reason="proxy_protocol") == 1


@case("gateway.max_connections")
def _(rig: ReloadRig) -> None:
    clients = [rig.client(), rig.client()]
    rig.apply(gateway={"max_connections": 2})
    assert rig.metric("whaled_connections_limit") == 2
    assert rig.client().status == 503
    assert not any(client.is_limited() for client in clients)


@case("gateway.max_connections_per_address")
def _(rig: ReloadRig) -> None:
    rig.client(source="127.0.5.1")
    rig.apply(gateway={"max_connections_per_address": 1})
    assert rig.client(source="127.0.5.1").status == 429
    assert rig.client(source="127.0.5.2").status == 101


@case("gateway.max_connections_per_client")
def _(rig: ReloadRig) -> None:
    token = rig.token()
    rig.client(token)
    assert rig.client(token).ask("pong", type="ping")["type"] == "pong"
    rig.apply(gateway={"max_connections_per_client": 2})
    assert rig.connection().ask("auth_success", type="auth", token=token)["code"] == "too_many_connections"


@case("gateway.max_unauthenticated")
def _(rig: ReloadRig) -> None:
    first = rig.connection()
    rig.connection()
    assert not first.has_ended(NOT_S)
    rig.apply(gateway={"max_unauthenticated": 2})
    rig.connection()
    assert first.has_ended(5)


@case("gateway.max_failed_connects")
def _(rig: ReloadRig) -> None:
    def reset_of(count: int) -> float:
        """Return how many of so many connections are reset, which arrive faster than they can be accepted."""
        before = rig.metric("whaled_connections_refused_total", reason="connect_rate")
        opened = rig.metric("whaled_connections_unauthenticated")
        rig.signal(signal.SIGSTOP)
        for _ in range(count):
            with socket.socket() as sock:
                sock.bind(("127.0.6.1", 0))
                sock.connect(("127.0.0.1", rig.port))
        rig.signal(signal.SIGCONT)
        until(lambda: rig.metric("whaled_connections_unauthenticated") <= opened)
        return rig.metric("whaled_connections_refused_total", reason="connect_rate") - before

    limits = {"max_unauthenticated": 10_000, "max_connections_per_address": 10_000}  # nothing has to be displaced
    rig.apply(gateway={**limits, "max_failed_connects": 1_000_000})
    assert reset_of(3_000) == 0
    rig.apply(gateway={**limits, "max_failed_connects": 1})
    until(lambda: reset_of(3_000) > 0)


@case("gateway.tls.certificate")
def _(rig: ReloadRig) -> None:
    _check_certificate(rig, "certificate", rig.key)


@case("gateway.tls.private_key")
def _(rig: ReloadRig) -> None:
    _check_certificate(rig, "private_key", rig.certificate)


def _check_certificate(rig: ReloadRig, name: str, partner: Path) -> None:
    """Change one of the two keys, and the contents of the file that the other one names, so that they fit."""
    before, contents = rig.client().sock.getpeercert(True), partner.read_bytes()
    chain, key = rig.issue_certificate(name)
    files = {"certificate": chain, "private_key": key}
    try:
        partner.write_bytes((chain if partner == rig.certificate else key).read_bytes())
        tls = {"certificate": str(rig.certificate), "private_key": str(rig.key), name: str(files[name])}
        rig.apply(gateway={"tls": tls})
        # The handshake succeeds, so the server has the new certificate and has signed with its key.
        assert rig.client().sock.getpeercert(True) != before
    finally:
        partner.write_bytes(contents)


# --- gateway: time limits ---------------------------------------------------------------------------------------------


@case("gateway.handshake_timeout")
def _(rig: ReloadRig) -> None:
    def is_cut(within_s: float) -> bool:
        with socket.create_connection(("127.0.0.1", rig.port), within_s) as sock:
            try:
                return sock.recv(1) == b""
            except TimeoutError:
                return False
            except ConnectionResetError:
                return True

    assert not is_cut(NOT_S)
    rig.apply(gateway={"handshake_timeout": "50ms"})
    assert is_cut(4)


@case("gateway.auth_timeout")
def _(rig: ReloadRig) -> None:
    assert not rig.connection().has_ended(NOT_S)
    rig.apply(gateway={"auth_timeout": "50ms"})
    assert rig.connection().close_code(4) == 1008


@case("gateway.slow_timeout")
def _(rig: ReloadRig) -> None:
    def too_slow() -> float:
        return rig.metric("whaled_connections_closed_total", code="1013")

    rig.apply(gateway={"close_timeout": "50ms"})
    rig.alerts(300)
    rig.client(is_small=True).send(type="subscribe", since={"last": 300})
    before = too_slow()
    time.sleep(NOT_S)
    assert too_slow() == before
    rig.apply(gateway={"close_timeout": "50ms", "slow_timeout": "100ms"})
    rig.client(is_small=True).send(type="subscribe", since={"last": 300})
    until(lambda: too_slow() > before)


@case("gateway.ping_interval")
def _(rig: ReloadRig) -> None:
    rig.apply(gateway={"ping_interval": "1h"})
    assert not _is_pinged(rig.client(), NOT_S)
    rig.apply(gateway={"ping_interval": "100ms"})
    assert _is_pinged(rig.client(), 5)


def _is_pinged(client: Client, within_s: float) -> bool:
    ends = time.monotonic() + within_s
    try:
        while client.frame(max(0.001, ends - time.monotonic()))[0] != PING:
            pass
    except TimeoutError:
        return False
    return True


@case("gateway.ping_timeout")
def _(rig: ReloadRig) -> None:
    rig.apply(gateway={"ping_interval": "100ms"})
    client = rig.client()
    assert _is_pinged(client, 5)
    assert not client.has_ended(NOT_S)
    rig.apply(gateway={"ping_interval": "100ms", "ping_timeout": "50ms"})
    assert client.has_ended(5)


@case("gateway.close_timeout")
def _(rig: ReloadRig) -> None:
    def closing_client() -> Client:
        client = rig.connection()
        client.send(type="ping")  # not the token
        assert client.close_code() == 1008
        return client

    assert not closing_client().has_ended(NOT_S)
    rig.apply(gateway={"close_timeout": "50ms"})
    assert closing_client().has_ended(4)


@case("gateway.position_interval")
def _(rig: ReloadRig) -> None:
    client = rig.client()
    with pytest.raises(TimeoutError):
        client.message("position", within_s=NOT_S)
    rig.apply(gateway={"position_interval": "50ms"})
    client = rig.client()
    assert client.ask("subscribed", type="subscribe", filters={"min_btc": 1e6})["type"] == "subscribed"
    rig.alerts(1)
    client.message("position", within_s=4)


@case("gateway.drain_window")
def _(rig: ReloadRig) -> None:
    rig.apply(gateway={"drain_window": "200ms"})
    rig.client()  # it does not answer the close, for which it has an hour
    rig.signal(signal.SIGTERM)
    assert rig.ended() == 0


# --- gateway: messages ------------------------------------------------------------------------------------------------


@case("gateway.max_frame")
def _(rig: ReloadRig) -> None:
    rig.client().ask("pong", type="ping", padding="x" * 5_000)
    rig.apply(gateway={"max_frame": "1KiB"})
    client = rig.client()
    client.send(type="ping", padding="x" * 5_000)
    assert client.close_code() == 1009


@case("gateway.compression")
def _(rig: ReloadRig) -> None:
    offer = {"Sec-WebSocket-Extensions": "permessage-deflate; client_max_window_bits"}
    assert "permessage-deflate" in rig.connection(headers=offer).head
    rig.apply(gateway={"compression": False})
    assert "permessage-deflate" not in rig.connection(headers=offer).head


@case("gateway.max_addresses")
def _(rig: ReloadRig) -> None:
    wanted = {"addresses": [PAYER, PAYEE]}
    assert rig.client().ask("subscribed", type="subscribe", filters=wanted)["type"] == "subscribed"
    rig.apply(gateway={"max_addresses": 1})
    assert rig.client().ask("subscribed", type="subscribe", filters=wanted)["code"] == "invalid_filter"


@case("gateway.messages_per_second")
def _(rig: ReloadRig) -> None:
    rig.apply(gateway={"message_burst": 1, "messages_per_second": 0.001})
    client = rig.client()
    assert [client.is_limited(), client.is_limited()] == [False, True]
    rig.apply(gateway={"message_burst": 1, "messages_per_second": 1_000_000})
    client = rig.client()
    assert [client.is_limited(), client.is_limited()] == [False, False]


@case("gateway.message_burst")
def _(rig: ReloadRig) -> None:
    rig.apply(gateway={"message_burst": 1, "messages_per_second": 0.001})
    client = rig.client()
    assert [client.is_limited(), client.is_limited()] == [False, True]
    rig.apply(gateway={"message_burst": 2, "messages_per_second": 0.001})
    client = rig.client()
    assert [client.is_limited() for _ in range(3)] == [False, False, True]


@case("gateway.client_messages_per_second")
def _(rig: ReloadRig) -> None:
    rig.apply(gateway={"client_message_burst": 1, "client_messages_per_second": 0.001})
    client = rig.client()
    assert [client.is_limited(), client.is_limited()] == [False, True]
    rig.apply(gateway={"client_message_burst": 1, "client_messages_per_second": 1_000_000})
    assert [client.is_limited(), client.is_limited()] == [False, False]


@case("gateway.client_message_burst")
def _(rig: ReloadRig) -> None:
    rig.apply(gateway={"client_message_burst": 1, "client_messages_per_second": 0.001})
    client = rig.client()
    assert [client.is_limited(), client.is_limited()] == [False, True]
    rig.apply(gateway={"client_message_burst": 10, "client_messages_per_second": 0.001})
    assert not client.is_limited()


@case("gateway.max_unsent")
def _(rig: ReloadRig) -> None:
    def lags() -> bool:
        """Return whether a client that reads nothing is served from the log, after many alerts."""
        before = rig.metric("whaled_clients_lagged_total")
        rig.client(is_small=True)
        rig.alerts(500)
        return rig.metric("whaled_clients_lagged_total") > before

    assert not lags()
    rig.apply(gateway={"max_unsent": "16KiB"})
    assert lags()


@case("gateway.replay_page")
def _(rig: ReloadRig) -> None:
    def largest_write() -> int:
        client = rig.client()
        client.send(type="subscribe", since={"last": 100})
        return max(client.sizes_of_records(60_000))

    rig.alerts(100)
    assert largest_write() > 8_000
    rig.apply(gateway={"replay_page": 1})
    assert largest_write() < 4_000


# --- auth -------------------------------------------------------------------------------------------------------------


@case("auth.token_ttl")
def _(rig: ReloadRig) -> None:
    def life_s() -> float:
        found = rig.client().ask("token", type="refresh")
        return float(claims(found["token"])["exp"] - claims(found["token"])["iat"])

    assert life_s() == 3_600
    rig.apply(auth={"token_ttl": "60s"})
    assert life_s() == 60


@case("auth.max_token_ttl")
def _(rig: ReloadRig) -> None:
    assert rig.refusal(rig.token(ttl_s=7_200)) == ""
    rig.apply(auth={"token_ttl": "1h", "max_token_ttl": "1h"})
    assert rig.refusal(rig.token(ttl_s=7_200)) == INVALID
    assert rig.refusal(rig.token(ttl_s=3_600)) == ""


@case("auth.expiry_grace")
def _(rig: ReloadRig) -> None:
    before = rig.client(rig.token(ttl_s=2))  # it expires after one second at least
    rig.apply(auth={"expiry_grace": "1ms"})
    assert rig.client(rig.token(ttl_s=2)).close_code() == 1008
    assert not before.has_ended(0.1)


@case("auth.leeway")
def _(rig: ReloadRig) -> None:
    def expired() -> str:
        return rig.token(ttl_s=10, age_s=15)

    assert rig.refusal(expired()) == ""
    rig.apply(auth={"leeway": "1s"})
    assert rig.refusal(expired()) == INVALID


@case("auth.failures_per_second")
def _(rig: ReloadRig) -> None:
    def refusals() -> list[str]:
        return [rig.refusal(wrong_token("a"), source="127.0.8.1") for _ in range(2)]

    rig.apply(auth={"failure_burst": 1, "failures_per_second": 0.001})
    assert refusals() == [INVALID, LIMITED]
    rig.apply(auth={"failure_burst": 1, "failures_per_second": 1_000_000})
    assert refusals() == [INVALID, INVALID]


@case("auth.failure_burst")
def _(rig: ReloadRig) -> None:
    rig.apply(auth={"failure_burst": 1, "failures_per_second": 0.001})
    messages = [rig.refusal(wrong_token("b"), source="127.0.8.3") for _ in range(2)]
    assert messages == [INVALID, LIMITED]
    rig.apply(auth={"failure_burst": 5, "failures_per_second": 0.001})
    assert rig.refusal(wrong_token("b"), source="127.0.8.3") == INVALID


@case("auth.issuer")
def _(rig: ReloadRig) -> None:
    assert rig.refusal(rig.token()) == ""
    rig.apply(auth={"issuer": "me"})
    assert rig.refusal(rig.token()) == INVALID
    assert rig.refusal(rig.token(issuer="me")) == ""


@case("auth.audience")
def _(rig: ReloadRig) -> None:
    assert rig.refusal(rig.token()) == ""
    rig.apply(auth={"audience": "you"})
    assert rig.refusal(rig.token()) == INVALID
    assert rig.refusal(rig.token(audience="you")) == ""


def _record(rig: ReloadRig, *ages_s: float) -> None:
    """Add records of these ages to the audit log, as an operator's commands do."""
    with open_directly(rig.directory / "whaled.access.db") as database:
        for age_s in ages_s:
            act = Act(at=time.time() - age_s, actor="a", origin="o", act="token revoked", target="jti t1")
            database.write(partial(audit.record, act=act))
    until(lambda: rig.metric("whaled_audit_records") >= len(ages_s))


@case("auth.audit_limit")
def _(rig: ReloadRig) -> None:
    _record(rig, 0, 0, 0)
    rig.apply(auth={"audit_limit": 2})
    until(lambda: rig.metric("whaled_audit_records") == 2)


@case("auth.audit_retention")
def _(rig: ReloadRig) -> None:
    # Only this record remains of those of other cases: a new one would keep the old ones after it, too.
    _record(rig, 7_200)
    rig.apply(auth={"audit_limit": 1})
    until(lambda: rig.metric("whaled_audit_records") == 1)
    rig.apply()
    _record(rig, 7_200, 0)
    until(lambda: rig.metric("whaled_audit_records") == 3)
    rig.apply(auth={"audit_retention": "1h"})
    until(lambda: rig.metric("whaled_audit_records") == 1)


@case("auth.issuers")
def _(rig: ReloadRig) -> None:
    with stand_in_apart() as server:
        token = server.token()
        assert rig.refusal(token) == INVALID
        trusted = {"name": "corp", "issuer": server.url, "audience": AUDIENCE, "read": ["scope=whales:read"]}
        rig.apply(auth={"issuers": [trusted]})
        until(lambda: rig.metric("whaled_issuer_keys", issuer="corp") == 1)
        kept, client = rig.client(), rig.client(token)
        assert client.ask("pong", type="ping")["type"] == "pong"
        rig.apply()
        assert client.close_code(5) == 1008
        assert rig.refusal(token) == INVALID
        assert kept.ask("pong", type="ping")["type"] == "pong"


# --- http -------------------------------------------------------------------------------------------------------------


@case("http.allowed_hosts")
def _(rig: ReloadRig) -> None:
    assert rig.get("/healthz", "whale.internal")[0] == 421
    rig.apply(http={"allowed_hosts": ["whale.internal"]})
    assert rig.get("/healthz", "whale.internal")[0] == 200


@case("http.max_connections")
def _(rig: ReloadRig) -> None:
    with rig.http() as first, rig.http():
        assert rig.get("/healthz")[0] == 200
        rig.apply(http={"max_connections": 2})
        with rig.http():
            assert _is_cut(first, 4)


@case("http.max_connections_per_address")
def _(rig: ReloadRig) -> None:
    with rig.http(source="127.0.7.1") as first, rig.http(source="127.0.7.1"):
        assert not _is_cut(first, NOT_S)
        rig.apply(http={"max_connections_per_address": 2})
        with rig.http(source="127.0.7.1"):
            assert _is_cut(first, 4)


@case("http.header_timeout")
def _(rig: ReloadRig) -> None:
    with rig.http() as before:
        assert not _is_cut(before, NOT_S)
    rig.apply(http={"header_timeout": "50ms"})
    with rig.http() as after:
        assert _is_cut(after, 4)


@case("http.idle_timeout")
def _(rig: ReloadRig) -> None:
    with rig.http() as client:
        client.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert client.recv(65536).startswith(b"HTTP/1.1 200")
        assert not _is_cut(client, NOT_S)
        rig.apply(http={"idle_timeout": "50ms"})
        assert _is_cut(client, 4)


@case("http.write_timeout")
def _(rig: ReloadRig) -> None:
    def cuts() -> float:
        return rig.metric("whaled_http_connections_cut_total", reason="write_timeout")

    with rig.http(is_small=True) as client:
        client.sendall(b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n" * 20)
        time.sleep(NOT_S)
        assert cuts() == 0
        rig.apply(http={"write_timeout": "50ms"})
        until(lambda: cuts() == 1)


@case("http.max_request")
def _(rig: ReloadRig) -> None:
    head = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nX: " + b"x" * 5_000
    with rig.http() as client:
        client.sendall(head)
        assert not _is_cut(client, NOT_S)
    rig.apply(http={"max_request": "1KiB"})
    with rig.http() as client:
        client.sendall(head)
        assert client.recv(65536).startswith(b"HTTP/1.1 431")


@case("http.requests_per_second")
def _(rig: ReloadRig) -> None:
    rig.apply(http={"requests_per_second": 0.001})
    with suppress(TimeoutError):
        for _ in range(50):  # more than the burst
            rig.get("/healthz", within_s=1)
    with pytest.raises(TimeoutError):
        rig.get("/healthz", within_s=NOT_S)
    rig.apply(http={"requests_per_second": 10_000})
    assert all(rig.get("/healthz", within_s=4)[0] == 200 for _ in range(50))


@case("http.render_interval")
def _(rig: ReloadRig) -> None:
    rig.apply(http={"render_interval": "1h"})
    before = rig.metric("whaled_connections_opened_total")
    rig.client()
    assert rig.metric("whaled_connections_opened_total") == before
    rig.apply(http={"render_interval": "1ms"})
    rig.client()
    until(lambda: rig.metric("whaled_connections_opened_total") == before + 2, 4)


def _is_cut(sock: socket.socket, within_s: float) -> bool:
    sock.settimeout(within_s)
    try:
        return sock.recv(65536) == b""
    except TimeoutError:
        return False
    except ConnectionResetError:
        return True


# --- canary, memory, log ----------------------------------------------------------------------------------------------


@case("canary.interval")
def _(rig: ReloadRig) -> None:
    sent = rig.metric("whaled_canaries_sent_total")
    rig.apply(canary={"interval": "50ms"})
    assert rig.get("/healthz")[0] == 200  # the last canary is older than the new interval, but nothing hangs
    until(lambda: rig.metric("whaled_canaries_sent_total") >= sent + 3, 4)


@case("canary.deadline")
def _(rig: ReloadRig) -> None:
    def late() -> float:
        return rig.metric("whaled_canaries_failed_total", reason="late")

    rig.apply(canary={"interval": "50ms", "deadline": "1m"})
    before = late()
    time.sleep(NOT_S)
    assert late() == before
    rig.apply(canary={"interval": "50ms", "deadline": "1ms"})
    until(lambda: late() > before)


@case("canary.lost_after")
def _(rig: ReloadRig) -> None:
    rig.apply(canary={"interval": "20ms", "deadline": "1ms", "lost_after": "1m"})
    time.sleep(NOT_S)
    assert rig.get("/healthz")[0] == 200
    rig.apply(canary={"interval": "20ms", "deadline": "1ms", "lost_after": "1ms"})
    until(lambda: rig.get("/healthz")[0] == 503)


@case("memory.limit")
def _(rig: ReloadRig) -> None:
    used = int(rig.metric("whaled_memory_used_bytes"))
    rig.apply(memory={"shed_at": 0.4, "limit": f"{4 * used}B"})
    assert rig.client().status == 101
    rig.apply(memory={"shed_at": 0.4, "limit": f"{max(used, 128 * 1024**2)}B"})
    until(lambda: _is_memory_short(rig))


@case("memory.shed_at")
def _(rig: ReloadRig) -> None:
    used = int(rig.metric("whaled_memory_used_bytes"))
    rig.apply(memory={"limit": f"{4 * used}B", "shed_at": 0.9})
    assert rig.client().status == 101
    rig.apply(memory={"limit": f"{4 * used}B", "shed_at": 0.1})
    until(lambda: _is_memory_short(rig))


def _is_memory_short(rig: ReloadRig) -> bool:
    """Return whether a new client is refused. It may also be cut off, when the next look frees memory."""
    try:
        return rig.client().status == 503
    except (OSError, Ended):
        return False


@case("log.level")
def _(rig: ReloadRig) -> None:
    def lines() -> int:
        return len(rig.logged("client_connected"))

    before = lines()
    rig.client()
    until(lambda: lines() == before + 1)
    rig.apply(log={"level": "error", "format": "json"})
    rig.client()
    time.sleep(NOT_S)
    assert lines() == before + 1


@case("log.format")
def _(rig: ReloadRig) -> None:
    rig.apply(log={"format": "text"})
    until(lambda: not rig.text().splitlines()[-1].startswith("{"))
    assert "reloaded" in rig.text().splitlines()[-1]


# --- the tests --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", CASES)
def test_a_reload_changes_the_key(key: str, rig: ReloadRig) -> None:
    CASES[key](rig)


def test_a_reload_forgets_no_failed_authentication(rig: ReloadRig) -> None:
    limit = {"failure_burst": 2, "failures_per_second": 0.001}
    rig.apply(auth=limit)
    assert [rig.refusal(wrong_token("c"), source="127.0.8.4") for _ in range(3)] == [INVALID, INVALID, LIMITED]
    rig.apply(auth={**limit, "leeway": "10s"}, gateway={"max_frame": "1KiB"})
    assert rig.refusal(wrong_token("c"), source="127.0.8.4") == LIMITED
    rig.apply(auth={"failure_burst": 2, "failures_per_second": 0.002})
    assert rig.refusal(wrong_token("c"), source="127.0.8.4") == LIMITED


def test_a_reload_fills_no_budget(rig: ReloadRig) -> None:
    limits = {"message_burst": 2, "messages_per_second": 0.001}
    rig.apply(gateway=limits)
    client = rig.client()
    assert [client.is_limited() for _ in range(3)] == [False, False, True]
    limits = {"client_message_burst": 2, "client_messages_per_second": 0.001}
    rig.apply(gateway=limits)
    assert client.is_limited()
    token = rig.token()
    assert [rig.client(token).is_limited() for _ in range(3)] == [False, False, True]
    rig.apply(gateway={**limits, "client_messages_per_second": 0.002})
    assert rig.client(token).is_limited()


def test_memory_is_still_short_after_a_reload(rig: ReloadRig) -> None:
    memory = {"limit": f"{4 * int(rig.metric('whaled_memory_used_bytes'))}B", "shed_at": 0.1}
    rig.apply(memory=memory)
    until(lambda: _is_memory_short(rig))
    rig.apply(memory=memory, gateway={"replay_page": 7})
    assert rig.metric("whaled_memory_shedding") == 1
    until(lambda: _is_memory_short(rig))


def test_a_replay_goes_on_through_a_reload_and_loses_nothing(rig: ReloadRig) -> None:
    rig.alerts(300)
    client = rig.client(is_small=True)
    client.send(type="subscribe", since={"last": 300})
    until(lambda: rig.metric("whaled_clients_replaying") == 1)
    rig.apply(gateway={"replay_page": 7, "max_unsent": "16KiB", "slow_timeout": "1m", "compression": False})
    assert rig.metric("whaled_clients_replaying") == 1
    rig.alerts(5)
    offsets = [client.message("whale_alert")["position"]["offset"] for _ in range(305)]
    rig.alerts(1)
    offsets.append(client.message("whale_alert")["position"]["offset"])
    assert offsets == list(range(offsets[0], offsets[0] + 306))


def test_connections_stay_open_and_counted(rig: ReloadRig) -> None:
    token = rig.token()
    clients = [rig.client(token, source="127.0.5.1") for _ in range(3)]
    rig.apply(gateway={"max_connections": 3})
    assert rig.metric("whaled_connections") == 3
    assert rig.client().status == 503
    rig.apply(gateway={"max_connections_per_address": 3})
    assert rig.client(source="127.0.5.1").status == 429
    rig.apply(gateway={"max_connections_per_client": 3})
    assert rig.connection().ask("auth_success", type="auth", token=token)["code"] == "too_many_connections"
    rig.apply(gateway={"max_connections": 1, "max_connections_per_address": 1, "max_connections_per_client": 1})
    assert not any(client.is_limited() for client in clients)


def test_a_token_family_that_ended_stays_ended(rig: ReloadRig) -> None:
    token = rig.token()
    first, second = rig.client(token), rig.client(token)
    fresh = first.ask("token", type="refresh")["token"]
    second.send(type="refresh")
    assert second.close_code() == 1008
    rig.apply(auth={"token_ttl": "30m", "leeway": "10s"})
    assert [rig.refusal(each) for each in (token, fresh)] == [INVALID, INVALID]


def test_no_transaction_is_alerted_again(rig: ReloadRig) -> None:
    sent = payment(**{PAYEE: 500.0})
    rig.backend.send(sent)
    until(lambda: sent["txid"] in rig.text())
    rig.apply(detection={"threshold_btc": 1, "basis": "moved"})
    whales = rig.metric("whaled_whales_total", flow="unknown")
    rig.backend.send(sent)
    rig.alerts(1)
    assert rig.metric("whaled_whales_total", flow="unknown") == whales + 1
