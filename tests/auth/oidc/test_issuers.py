import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
from aiohttp import web
from structlog.testing import capture_logs

from kit.issuers import ISSUER, StandIn, access_token, claims, issuer_settings, public_jwk, stand_in
from kit.tokens import GOOD
from whaled.auth.oidc import issuers as module
from whaled.auth.oidc.issuers import Issuers
from whaled.auth.oidc.meters import IssuerMeter
from whaled.config.sections import AuthSettings, IssuerSettings
from whaled.errors import TokenError, TokenRefusal
from whaled.model import Grant, Permission
from whaled.registry import Registry


class Rig:
    """Issuers that run, with the stand-in in place of one of them."""

    def __init__(self, server: StandIn, registry: Registry, issuers: Issuers, **more: Any) -> None:
        self.server = server
        self.registry = registry
        self.issuers = issuers
        self.more = more

    def value(self, name: str, issuer: str = "corp") -> float | None:
        return self.registry.collectors.get_sample_value(name, {"issuer": issuer})

    def verify(self, name: str = "k1", **more: object) -> Grant:
        return self.issuers.verify(self.server.token(name, **more), time.time())

    def refusal(self, name: str = "k1", **more: object) -> TokenRefusal:
        with pytest.raises(TokenError) as caught:
            self.verify(name, **more)
        return caught.value.reason

    def reconfigure(self, *settings: IssuerSettings) -> None:
        self.issuers.reconfigure(AuthSettings(issuers=settings))

    async def until(self, is_true: Callable[[], bool]) -> None:
        async with asyncio.timeout(10):
            while not is_true():
                self.server.fetched.clear()
                if not is_true():
                    await asyncio.wait([asyncio.create_task(self.server.fetched.wait())], timeout=0.02)


# As short as the configuration does not allow: tests do not wait for 30 s.
SHORT: dict[str, Any] = {"unknown_key_interval": 0.05, "timeout": 5.0}


@asynccontextmanager
async def running(**more: Any) -> AsyncIterator[Rig]:
    registry = Registry()
    async with stand_in() as server:
        settings = server.settings(**SHORT | more)
        issuers = Issuers(AuthSettings(issuers=(settings,)), IssuerMeter(registry))
        async with issuers.running():
            yield Rig(server, registry, issuers, **more)


async def test_a_token_is_accepted_from_the_first_moment_on() -> None:
    async with running() as rig:
        grant = rig.verify()
        assert (grant.client_id, [*grant.permissions]) == ("corp:bot", [Permission.READ])
        assert rig.issuers.is_in_force(grant, time.time())
        assert (rig.value("whaled_issuer_key_fetches_total"), rig.value("whaled_issuer_keys")) == (1, 1)
        assert rig.value("whaled_issuer_key_fetch_failures_total") == 0
        assert abs((rig.value("whaled_issuer_keys_fetched_timestamp_seconds") or 0) - time.time()) < 60


async def test_only_a_configured_issuer_is_known_and_only_its_tokens_are_verified() -> None:
    issuers = Issuers(AuthSettings(issuers=(issuer_settings(),)), IssuerMeter(Registry()))
    assert issuers.knows(ISSUER)
    assert not issuers.knows(ISSUER + "/")
    for other in (GOOD, "whk_abc", "", "a.b.c", access_token(claims(iss="https://evil.example"))):
        with pytest.raises(TokenError, match="not a trusted issuer"):
            issuers.verify(other, time.time())


async def test_a_new_key_is_fetched_once_a_token_names_it_and_the_old_one_ends_no_session() -> None:
    async with running() as rig:
        grant = rig.verify()
        rig.server.published = [public_jwk(name="k2")]
        assert rig.refusal("k2") is TokenRefusal.UNKNOWN_KEY
        await rig.until(lambda: rig.value("whaled_issuer_key_fetches_total") == 2)
        assert rig.verify("k2").client_id == "corp:bot"
        assert rig.refusal("k1") is TokenRefusal.UNKNOWN_KEY
        assert rig.issuers.is_in_force(grant, time.time())


async def test_a_flood_of_unknown_keys_causes_one_fetch_in_the_interval_and_waits_for_nothing() -> None:
    async with running(unknown_key_interval=3600.0) as rig:
        tokens = [rig.server.token("k2") for _ in range(3)]
        asked = len(rig.server.asked)
        began_s = time.perf_counter()
        for _ in range(300):
            for token in tokens:
                with pytest.raises(TokenError):
                    rig.issuers.verify(token, time.time())
        assert (time.perf_counter() - began_s) / 900 < 0.005
        for _ in range(20):
            await asyncio.sleep(0)
        assert len(rig.server.asked) == asked


async def test_tokens_that_no_key_set_could_verify_cause_no_fetch() -> None:
    async with running() as rig:
        keeper = next(iter(rig.issuers._keepers.values()))
        for change in ({"aud": "x"}, {"exp": 1}, {"iss": "https://evil.example"}):
            with pytest.raises(TokenError):
                rig.verify(**change)
        with pytest.raises(TokenError):
            rig.issuers.verify(access_token(claims(time.time(), iss=rig.server.url), "ES256"), time.time())
        assert not keeper._is_wanted.is_set()


GARBAGE: dict[str, web.Response | int] = {"html": 200, "status": 503, "redirect": 302, "no keys": 0, "wrong issuer": 1}


@pytest.mark.parametrize("what", GARBAGE)
async def test_garbage_changes_nothing_for_those_who_are_in_and_for_those_who_come(what: str) -> None:
    async def answer(request: web.Request) -> web.StreamResponse:
        if what == "no keys":
            return web.json_response({"keys": []})
        if what == "wrong issuer":
            return web.json_response({"issuer": "https://evil.example", "jwks_uri": f"{rig.server.url}/jwks"})
        return web.Response(status=int(str(GARBAGE[what])), text="<html>", headers={"Location": "/"})

    async with running() as rig:
        grant = rig.verify()
        setattr(rig.server, "discovery" if what == "wrong issuer" else "keys", answer)
        with capture_logs() as lines:
            assert rig.refusal("k2") is TokenRefusal.UNKNOWN_KEY
            await rig.until(lambda: rig.value("whaled_issuer_key_fetch_failures_total") == 1)
        assert [line["event"] for line in lines] == ["issuer_keys_unavailable"]
        assert (lines[0]["issuer"], lines[0]["keys"]) == ("corp", 1)
        assert rig.issuers.is_in_force(grant, time.time())
        assert rig.verify().client_id == "corp:bot"
        rig.server.heal()
        rig.server.published = [public_jwk(name="k2")]
        assert rig.refusal("k2") is TokenRefusal.UNKNOWN_KEY
        await rig.until(lambda: rig.value("whaled_issuer_key_fetches_total") == 2)
        assert rig.verify("k2").client_id == "corp:bot"


async def test_an_issuer_that_is_away_at_the_start_delays_it_only_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FIRST_KEYS_S", 0.05)

    async def silent(request: web.Request) -> web.StreamResponse:
        await asyncio.Event().wait()
        raise AssertionError

    registry = Registry()
    async with stand_in() as server:
        server.keys = silent
        issuers = Issuers(AuthSettings(issuers=(server.settings(**SHORT),)), IssuerMeter(registry))
        async with issuers.running():
            with pytest.raises(TokenError) as caught:
                issuers.verify(server.token(), time.time())
            assert caught.value.reason is TokenRefusal.UNKNOWN_KEY
            assert registry.collectors.get_sample_value("whaled_issuer_keys", {"issuer": "corp"}) == 0


async def test_a_bug_in_a_fetch_is_logged_and_the_keys_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    async with running() as rig:
        monkeypatch.setattr("whaled.auth.oidc.fetch.read_key_set", lambda raw, algorithms: 1 / 0)
        with capture_logs() as lines:
            rig.refusal("k2")
            await rig.until(lambda: rig.value("whaled_issuer_key_fetch_failures_total") == 1)
        assert [line["event"] for line in lines] == ["issuer_fetch_failed"]
        assert rig.verify().client_id == "corp:bot"


async def test_a_reload_removes_an_issuer_with_its_grants_and_its_series() -> None:
    async with running() as rig:
        grant = rig.verify()
        rig.reconfigure()
        assert not rig.issuers.is_in_force(grant, time.time())
        assert not rig.issuers.knows(rig.server.url)
        assert rig.value("whaled_issuer_keys") is None


async def test_a_reload_that_changes_what_tokens_grant_ends_their_grants_and_keeps_the_keys() -> None:
    async with running() as rig:
        grant = rig.verify()
        rig.reconfigure(rig.server.settings(**SHORT, leeway=5.0))
        assert rig.issuers.is_in_force(grant, time.time())
        rig.reconfigure(rig.server.settings(**SHORT, write=("scope=whales:read",)))
        assert not rig.issuers.is_in_force(grant, time.time())
        assert rig.verify().permissions == {Permission.READ, Permission.WRITE}
        rig.reconfigure(rig.server.settings(**SHORT, audience="other"))
        assert rig.refusal() is TokenRefusal.BAD_CLAIMS


async def test_a_reload_adds_an_issuer_whose_keys_are_fetched_at_once() -> None:
    async with running() as rig, stand_in() as second:
        rig.reconfigure(rig.server.settings(**SHORT), second.settings(name="lab", **SHORT))
        async with asyncio.timeout(10):
            while rig.value("whaled_issuer_keys", "lab") != 1:
                await asyncio.wait([asyncio.create_task(second.fetched.wait())], timeout=0.02)
        assert rig.issuers.verify(second.token(), time.time()).client_id == "lab:bot"
        assert rig.verify().client_id == "corp:bot"


async def test_the_ids_of_an_issuers_clients_are_its_own() -> None:
    issuers = Issuers(AuthSettings(issuers=(issuer_settings(),)), IssuerMeter(Registry()))
    assert issuers.owns("corp:bot")
    for other in ("corp", "corporate:bot", "bot", ":corp", ""):
        assert not issuers.owns(other)
