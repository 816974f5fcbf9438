"""Credentials over real connections: neighbours, guesses, keys that are retired, tokens that are copied, clocks."""

import asyncio
import json
import time
from pathlib import Path
from typing import Any

import pytest

from kit.gateway import Rig, ask, closed_with, receive, receive_type, running_gateway, until
from kit.tokens import FORGED, GOOD, RING
from kit.whales import NOW
from whaled.auth.ring import KeyRing, SigningKey
from whaled.auth.tokens import TokenAuthenticator, issue
from whaled.config.sections import AuthSettings, GatewaySettings
from whaled.model import Permission

OLD = SigningKey("old", b"o" * 32)
NEW = SigningKey("new", b"n" * 32)
AUTH = AuthSettings(failure_burst=3)
SLOW = AuthSettings(failure_burst=3, failures_per_second=0.001)
WRONG = "eyJhbGciOiJIUzI1NiJ9.e30.c2ln"


class Tokens(TokenAuthenticator):
    """The real authenticator, and tokens for its ring."""

    def __init__(self, *keys: SigningKey) -> None:
        self.made = 0
        super().__init__(KeyRing(keys[-1], keys), AUTH, new_token_id=self._number)

    def _number(self) -> str:
        self.made += 1
        return f"t{self.made}"

    def token(self, key: SigningKey = NEW, *, client_id: str = "c1", ttl_s: float = 600.0) -> str:
        return issue(
            KeyRing(key, (key,)), client_id=client_id, permissions=[Permission.READ], ttl_s=ttl_s, now=time.time(),
            token_id=self._number(), settings=AUTH,
        )[0]  # fmt: skip


async def enter(client: Any, token: str) -> None:
    await ask(client, type="auth", token=token)
    await receive_type(client, "welcome")


async def refused(rig: Rig, token: str) -> tuple[Any, int]:
    """The answer to a token that is not accepted, and the close code."""
    async with rig.connect() as client:
        await ask(client, type="auth", token=token)
        answer = await receive(client)
        return answer, (await closed_with(client))[0]


async def test_wrong_tokens_from_an_address_block_no_valid_token_from_it(tmp_path: Path) -> None:
    tokens = Tokens(NEW)
    good = tokens.token()
    async with running_gateway(tmp_path, authenticator=tokens, auth=AUTH) as rig:
        answers = [await refused(rig, WRONG) for _ in range(6)]
        assert [code for _, code in answers] == [1008] * 3 + [1013] * 3
        last = answers[-1][0]
        assert (last["code"], last["message"]) == ("rate_limited", "Rate limit exceeded")
        assert last["retry_after"] > 0
        async with rig.connect() as client:
            await enter(client, good)
        async with rig.connect(additional_headers={"Authorization": f"Bearer {good}"}) as client:
            assert (await receive(client))["type"] == "auth_success"
        gone = tokens.token(OLD, client_id="neighbour")
        assert (await refused(rig, gone))[0]["message"] == "Invalid or expired token"
        assert rig.value("whaled_authentications_total", outcome="rate_limited") == 3
        assert rig.value("whaled_authentications_total", outcome="success") == 2


async def test_a_reload_forgets_no_failures(tmp_path: Path) -> None:
    tokens = Tokens(NEW)
    async with running_gateway(tmp_path, authenticator=tokens, auth=AUTH) as rig:
        for _ in range(4):
            await refused(rig, WRONG)
        rig.gateway.reconfigure(rig.gateway.settings, AUTH, tokens)
        assert (await refused(rig, WRONG))[1] == 1013


async def test_a_header_is_limited_like_a_message(tmp_path: Path) -> None:
    async with running_gateway(tmp_path, authenticator=Tokens(NEW), auth=AUTH) as rig:
        codes = []
        for _ in range(5):
            async with rig.connect(additional_headers={"Authorization": f"Bearer {WRONG}"}) as client:
                codes.append((await closed_with(client))[0])
        assert codes == [1008, 1008, 1008, 1013, 1013]


async def test_guesses_on_open_connections_of_one_client_end_them_and_no_other(tmp_path: Path) -> None:
    tokens = Tokens(NEW)
    async with (
        running_gateway(tmp_path, authenticator=tokens, auth=SLOW) as rig,
        rig.connect() as first,
        rig.connect() as second,
        rig.connect() as other,
    ):
        for client in (first, second):
            await enter(client, tokens.token(client_id="guesser"))
        await enter(other, tokens.token(client_id="other"))
        codes = []
        for turn in range(7):
            client = (first, second)[turn % 2]
            await ask(client, type="auth", token=WRONG)
            codes.append((await receive_type(client, "error"))["code"])
        assert codes == ["unauthenticated"] * 3 + ["rate_limited"] * 4
        assert await closed_with(first) == (1008, "Rate limit exceeded")
        await ask(other, type="ping")
        assert (await receive_type(other, "pong"))["type"] == "pong"


async def test_retiring_a_key_ends_only_its_own_sessions_within_a_second(tmp_path: Path) -> None:
    tokens = Tokens(OLD, NEW)
    async with (
        running_gateway(tmp_path, authenticator=tokens, auth=AUTH) as rig,
        rig.connect() as old,
        rig.connect() as new,
        rig.connect() as moved,
    ):
        await enter(old, tokens.token(OLD))
        await enter(new, tokens.token(NEW))
        await enter(moved, tokens.token(OLD))
        await ask(moved, type="refresh")
        await receive_type(moved, "token")
        tokens.replace_ring(KeyRing(NEW, (NEW,)), AUTH)
        rig.gateway.reconfigure(rig.gateway.settings, AUTH, tokens)
        async with asyncio.timeout(1.0):
            assert await closed_with(old) == (1008, "Token revoked")
        for client in (new, moved):
            await ask(client, type="ping")
            await receive_type(client, "pong")
        assert rig.value("whaled_connections_closed_total", code="1008") == 1


async def test_a_reload_that_changes_no_key_ends_nothing(tmp_path: Path) -> None:
    tokens = Tokens(OLD, NEW)
    async with running_gateway(tmp_path, authenticator=tokens, auth=AUTH) as rig, rig.connect() as client:
        await enter(client, tokens.token(OLD))
        tokens.replace_ring(KeyRing(NEW, (OLD, NEW)), AUTH)
        rig.gateway.reconfigure(GatewaySettings(port=0), AUTH, tokens)
        await ask(client, type="ping")
        await receive_type(client, "pong")


async def test_two_refreshes_of_one_token_end_every_session_of_its_family(tmp_path: Path) -> None:
    tokens = Tokens(NEW)
    token = tokens.token()
    async with (
        running_gateway(tmp_path, authenticator=tokens, auth=AUTH) as rig,
        rig.connect() as owner,
        rig.connect() as thief,
        rig.connect() as other,
    ):
        await enter(owner, token)
        await enter(thief, token)
        await enter(other, tokens.token())
        await ask(owner, type="refresh")
        child = (await receive_type(owner, "token"))["token"]
        await ask(thief, type="refresh")
        assert await closed_with(thief) == (1008, "Token revoked")
        assert await closed_with(owner) == (1008, "Token revoked")
        for known in (token, child):
            assert (await refused(rig, known))[0]["message"] == "Invalid or expired token"
        assert rig.value("whaled_authentications_total", outcome="revoked") == 2
        assert rig.value("whaled_token_families_ended_total") == 1
        await ask(other, type="ping")
        await receive_type(other, "pong")


async def test_a_client_that_lost_the_response_to_its_refresh_can_repeat_it(tmp_path: Path) -> None:
    tokens = Tokens(NEW)
    token = tokens.token()
    async with running_gateway(tmp_path, authenticator=tokens, auth=AUTH) as rig:
        async with rig.connect() as client:
            await enter(client, token)
            await ask(client, type="refresh")
            await receive_type(client, "token")
            client.transport.abort()
        await until(lambda: rig.gateway.connections == 0)
        async with rig.connect() as client:
            await enter(client, token)
            await ask(client, type="refresh")
            assert (await receive_type(client, "token"))["token"]


@pytest.mark.slow
@pytest.mark.parametrize("step_s", [2700.0, 90 * 86400.0])
async def test_a_token_that_a_step_of_the_clock_ended_is_not_served_on(tmp_path: Path, step_s: float) -> None:
    tokens, ahead_s = Tokens(NEW), [0.0]
    async with (
        running_gateway(tmp_path, authenticator=tokens, auth=AUTH, clock=lambda: time.time() + ahead_s[0]) as rig,
        rig.connect() as brief,
        rig.connect() as lasting,
    ):
        await enter(brief, tokens.token(ttl_s=1800))
        ahead_s[0] = step_s
        async with asyncio.timeout(3.0):
            assert await closed_with(brief) == (1008, "Token expired")
        await enter(lasting, issue(
            KeyRing(NEW, (NEW,)), client_id="c2", permissions=[], ttl_s=1800, now=rig.gateway.now(), token_id="x",
            settings=AUTH,
        )[0])  # fmt: skip


@pytest.mark.slow
async def test_a_clock_that_is_set_back_only_delays_the_end(tmp_path: Path) -> None:
    tokens, ahead_s = Tokens(NEW), [3600.0]
    async with running_gateway(
        tmp_path, authenticator=tokens, auth=AuthSettings(expiry_grace=0.001), clock=lambda: time.time() + ahead_s[0]
    ) as rig, rig.connect() as client:  # fmt: skip
        token = issue(
            KeyRing(NEW, (NEW,)), client_id="c1", permissions=[], ttl_s=600, now=rig.gateway.now(), token_id="x",
            settings=AUTH,
        )[0]  # fmt: skip
        await enter(client, token)
        ahead_s[0] = 0.0
        await until(lambda: rig.gateway.rechecks.clock_steps == 1)
        await ask(client, type="ping")
        await receive_type(client, "pong")
        ahead_s[0] = 3600.0 + 601.0
        assert await closed_with(client) == (1008, "Token expired")


@pytest.mark.slow
async def test_a_clock_that_is_ahead_is_accepted_within_the_leeway_only(tmp_path: Path) -> None:
    tokens, ahead_s = Tokens(NEW), [0.0]
    token = tokens.token(ttl_s=600)
    async with running_gateway(
        tmp_path, authenticator=tokens, auth=AUTH, clock=lambda: time.time() + ahead_s[0]
    ) as rig:
        ahead_s[0] = 600.0 + AUTH.leeway - 5.0
        async with rig.connect() as client:
            await enter(client, token)
            await receive_type(client, "token_expiring")
            await ask(client, type="refresh")
            assert (await receive_type(client, "error"))["code"] == "forbidden"
            ahead_s[0] += 6.0
            async with asyncio.timeout(3.0):
                assert await closed_with(client) == (1008, "Token expired")
        answer, code = await refused(rig, token)
        assert (answer["message"], code) == ("Invalid or expired token", 1008)


async def test_a_clock_that_is_behind_is_accepted_within_the_leeway_only(tmp_path: Path) -> None:
    tokens, ahead_s = Tokens(NEW), [0.0]
    token = tokens.token(ttl_s=600)
    async with running_gateway(
        tmp_path, authenticator=tokens, auth=AUTH, clock=lambda: time.time() + ahead_s[0]
    ) as rig:
        ahead_s[0] = 5.0 - AUTH.leeway
        async with rig.connect() as client:
            await enter(client, token)
        ahead_s[0] = -5.0 - AUTH.leeway
        answer, code = await refused(rig, token)
        assert (answer["message"], code) == ("Invalid or expired token", 1008)
        assert rig.value("whaled_authentications_total", outcome="not_yet_valid") == 1


async def test_forged_tokens_are_refused_with_the_same_text_in_message_and_header(tmp_path: Path) -> None:
    judge = TokenAuthenticator(RING, AUTH, new_token_id=lambda: "t2")
    patient = AuthSettings(failure_burst=1_000)
    async with running_gateway(tmp_path, authenticator=judge, auth=patient, clock=lambda: NOW) as rig:
        async with rig.connect() as client:
            await enter(client, GOOD)
        answers = set()
        for token in FORGED.values():
            async with rig.connect() as client:
                await ask(client, type="auth", token=token)
                answers.add((await client.recv(), *await closed_with(client)))
            if token.isascii() and token.isprintable() and token.strip() == token != "":
                async with rig.connect(additional_headers={"Authorization": f"Bearer {token}"}) as client:
                    answers.add((await client.recv(), *await closed_with(client)))
        ((answer, code, reason),) = answers
        assert json.loads(answer)["message"] == "Invalid or expired token"
        assert (code, reason) == (1008, "Authentication required")
        assert rig.value("whaled_authentications_total", outcome="success") == 1
