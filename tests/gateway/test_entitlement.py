"""Fixed filters, networks and rates of a credential: by themselves, in sessions, and over a real socket."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kit.gateway import ask, closed_with, receive_type, running_gateway
from kit.whales import NOW, alert_draft
from whaled.auth.apikeydesk import ApiKeyDesk, Order
from whaled.auth.apikeykeeper import ApiKeyKeeper
from whaled.auth.apikeys import ApiKeys
from whaled.auth.store import AccessStore
from whaled.errors import ClientError, TokenError, TokenRefusal
from whaled.gateway.budget import Budget
from whaled.gateway.clients import Clients
from whaled.gateway.entitlement import fixed_filter, judge, narrowed
from whaled.gateway.interest import Interest
from whaled.gateway.limits import SessionLimits
from whaled.metrics import Metrics
from whaled.model import CredentialKind, Grant, Permission
from whaled.whales.filters import EVERYTHING, Filter, Subject, parse_filter

READ = frozenset({Permission.READ})
GRANT = Grant(client_id="c1", permissions=READ, kind=CredentialKind.API_KEY, token_id="whkid_1")


def granted(**more: Any) -> Grant:
    fields: dict[str, Any] = {"client_id": "c1", "permissions": READ, "kind": "api_key", "token_id": "whkid_1", **more}
    return Grant(**fields)


# --- networks ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("address", "networks", "is_allowed"),
    [
        ("10.1.2.3", ("10.1.0.0/16",), True),
        ("10.2.2.3", ("10.1.0.0/16",), False),
        ("10.2.2.3", ("10.1.0.0/16", "10.2.0.0/16"), True),
        ("::ffff:10.1.2.3", ("10.1.0.0/16",), True),
        ("2001:db8::7", ("2001:db8::/48",), True),
        ("2001:db8::7", ("10.1.0.0/16",), False),
        ("fe80::1%eth0", ("fe80::/10",), True),
        ("", ("0.0.0.0/0", "::/0"), False),
        ("unix", ("0.0.0.0/0", "::/0"), False),
        ("10.1.2.3", ("no network",), False),
        ("10.1.2.3", (), True),
        ("unix", (), True),
    ],
)
def test_a_client_connects_from_its_networks_only(address: str, networks: tuple[str, ...], is_allowed: bool) -> None:
    if is_allowed:
        assert judge(granted(networks=networks), address) == EVERYTHING
        return
    with pytest.raises(TokenError) as caught:
        judge(granted(networks=networks), address)
    assert caught.value.reason is TokenRefusal.WRONG_NETWORK


# --- the fixed filter -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["", "[]", "{", '{"min_btc":"1"}', '{"nonsense":1}', "null", "\ud800", "[" * 9000])
def test_a_filter_that_cannot_be_read_permits_nothing(text: str) -> None:
    with pytest.raises(ClientError):
        fixed_filter(text)
    with pytest.raises(TokenError):
        judge(granted(fixed_filter=text), "10.0.0.1")


FILTERS = st.fixed_dictionaries(
    {},
    optional={
        "min_btc": st.integers(0, 300),
        "max_btc": st.integers(300, 600),
        "addresses": st.lists(
            st.sampled_from(["1BoatSLRHtKNngkdXEeobR76b53LETtpyT", "no" * 8]), min_size=1, max_size=2
        ),
        "kinds": st.lists(st.sampled_from(["alert", "update"]), min_size=1, max_size=2),
        "updates_of": st.sampled_from(["sent", "all"]),
    },
)


@given(FILTERS, FILTERS, st.integers(1, 700))
def test_a_client_receives_what_passes_both_filters(fixed: Any, wanted: Any, btc: int) -> None:
    ours, theirs = parse_filter(fixed, max_addresses=9), parse_filter(wanted, max_addresses=9)
    both = narrowed(theirs, Filter(within=ours))
    draft = alert_draft(1, float(btc), NOW)
    assert both.matches(draft) is (ours.matches(draft) and theirs.matches(draft))
    assert both.normalised() == theirs.normalised()


class Group:
    def __init__(self, chosen: Filter) -> None:
        self.filter = chosen


@given(FILTERS, FILTERS, st.integers(1, 700))
def test_the_index_of_filters_finds_a_narrowed_filter_whenever_it_matches(fixed: Any, wanted: Any, btc: int) -> None:
    ours, theirs = parse_filter(fixed, max_addresses=9), parse_filter(wanted, max_addresses=9)
    group = Group(narrowed(theirs, Filter(within=ours)))
    interest = Interest[Group]()
    interest.add(group)
    subject = Subject(alert_draft(1, float(btc), NOW))
    if group.filter.passes(subject):
        assert interest.groups([subject]) == [group]
    interest.discard(group)
    assert interest.groups([subject]) == []
    assert len(interest) == 0


def test_without_addresses_of_its_own_a_client_sees_which_of_the_fixed_ones_matched() -> None:
    draft = alert_draft(1, 150.0, NOW)
    address = draft.whale.addresses[0]
    ours = Filter(addresses=frozenset({address}))
    assert Filter(within=ours).matched_addresses(draft) == (address,)
    assert Filter(within=ours).matched_in(Subject(draft)) == (address,)
    assert Filter(addresses=frozenset({"x" * 20}), within=ours).matched_addresses(draft) == ()


# --- the rate ---------------------------------------------------------------------------------------------------------

LIMITS = SessionLimits(messages_per_second=10.0, message_burst=20.0, max_addresses=10, expiry_grace_s=25.0)


def passed(rate: float | None, seconds: int) -> int:
    """The number of messages that pass when 100 a second are sent after the burst."""
    clients = Clients(max_connections=3, rate=10.0, burst=20.0)
    budget = Budget(LIMITS, clients, 0.0)
    budget.client = clients.enter("c1", 0.0, budget.factor(rate))
    budget.scale(rate)
    budget.charge(20.0)
    return sum(budget.may_pass(n / 100) and budget.take(n / 100, 1.0) is None for n in range(100 * seconds))


@pytest.mark.parametrize(("rate", "expected"), [(None, 100), (1.0, 10), (50.0, 500)])
def test_a_rate_replaces_that_of_the_connection_and_of_its_client(rate: float | None, expected: int) -> None:
    burst = 0 if rate is None or rate < 10 else 80  # a higher rate has a larger burst
    assert expected - 2 <= passed(rate, 10) - burst <= expected + 2


def test_a_reload_keeps_the_factor_of_a_client_and_its_next_visit_starts_anew() -> None:
    clients = Clients(max_connections=3, rate=10.0, burst=20.0)
    client = clients.enter("c1", 0.0, 5.0)
    assert client is not None
    clients.enter("c1", 0.0)
    assert client.factor == 5.0
    clients.reconfigure(max_connections=3, rate=20.0, burst=20.0)
    assert client.factor == 5.0
    clients.leave(client)
    clients.leave(client)
    assert clients.enter("c1", 0.0) is client
    assert client.factor == 1.0


# --- over a real socket -----------------------------------------------------------------------------------------------


class OnlyKeys(ApiKeys):
    """API keys without tokens beside them."""

    def refresh(self, grant: Grant, now: float) -> tuple[str, Grant]:
        raise AssertionError

    def answer_lost(self, parent: Grant, child: Grant) -> None:
        raise AssertionError


class Wall:
    now = NOW

    def __call__(self) -> float:
        return self.now


async def made(desk: ApiKeyDesk, **order: Any) -> tuple[str, str]:
    fields: dict[str, Any] = {"client_id": "c1", "permissions": READ, **order}
    text, key = await desk.create(Order(**fields), actor="uid 0", origin="test")
    return text, key.id


async def test_keys_over_a_real_socket(tmp_path: Path) -> None:
    clock, keys = Wall(), OnlyKeys()
    async with (
        AccessStore.open(tmp_path / "a.access.db") as store,
        running_gateway(tmp_path, authenticator=keys, clock=clock) as rig,
    ):
        keeper = ApiKeyKeeper(Metrics().api_keys, keys, clock)

        async def changed() -> None:
            await keeper.load(store)
            rig.gateway.rechecks.request()

        desk = ApiKeyDesk(store, changed=changed, clock=clock)
        narrow, _ = await made(desk, fixed_filter='{"min_btc":500}')
        far, _ = await made(desk, networks=("192.0.2.0/24",))
        short, _ = await made(desk, expires_at=NOW + 30, networks=("127.0.0.0/8",))
        stolen, stolen_id = await made(desk)

        # By a header, in the first message, as a subprotocol.
        async with rig.connect(additional_headers={"Authorization": f"Bearer {narrow}"}) as client:
            await receive_type(client, "welcome")
            small, large = (await rig.alerts(1, btc=150.0))[0], (await rig.alerts(2, btc=700.0))[0]
            assert (await receive_type(client, "whale_alert"))["position"]["offset"] == large.offset
            await ask(client, type="subscribe", filters={"min_btc": 1}, since={"last": 10})
            answer = await receive_type(client, "subscribed")
            assert (answer["filters"], answer["fixed_filters"]) == ({"min_btc": 1.0}, {"min_btc": 500.0})
            replayed = await receive_type(client, "whale_alert")  # the replay is narrowed too
            assert replayed["position"]["offset"] == large.offset != small.offset
            await ask(client, type="auth", api_key=stolen)
            assert (await receive_type(client, "error"))["code"] == "forbidden"
            await ask(client, type="refresh")
            assert (await receive_type(client, "error"))["code"] == "forbidden"

        for refused in (far, "whk_wrong"):
            async with rig.connect() as client:
                await ask(client, type="auth", api_key=refused)
                assert (await receive_type(client, "error"))["message"] == "Invalid or expired token"
                assert await closed_with(client) == (1008, "Authentication required")

        async with rig.connect() as client:
            await ask(client, type="auth", api_key=stolen)
            await receive_type(client, "welcome")
            assert await desk.revoke(stolen_id, actor="uid 0", origin="test")
            assert await closed_with(client) == (1008, "Token revoked")

        async with rig.connect(subprotocols=["whaled.v1", f"bearer.{short}"]) as client:
            await receive_type(client, "welcome")
            clock.now = NOW + 31
            rig.gateway.rechecks.request()
            await receive_type(client, "token_expiring")
            rig.gateway.rechecks.request()
            assert await closed_with(client) == (1008, "Token expired")

        await keeper.look(store)  # not a minute yet
        assert [key.last_used_at for key in await desk.list()] == [None] * 4
        clock.now = NOW + 61
        await keeper.look(store)
        assert [key.last_used_at for key in await desk.list()] == [NOW, NOW, NOW, NOW]
