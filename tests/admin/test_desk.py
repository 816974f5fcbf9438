"""Each act of the admin API, over a real Unix socket."""

import contextlib
from pathlib import Path
from typing import Any

import pytest

from kit.admin import running_admin
from kit.gateway import ask, closed_with, receive_type
from whaled import __version__


async def test_the_version_is_that_of_the_daemon(tmp_path: Path) -> None:
    async with running_admin(tmp_path) as admin:
        assert await admin.call("GET", "/v1/version") == (200, {"version": __version__, "api": 1})


async def test_the_status_shows_head_epoch_and_clients(tmp_path: Path) -> None:
    async with running_admin(tmp_path) as admin, admin.gateway.connect() as client:
        await receive_type(client, "welcome")
        await admin.gateway.alerts(1, 2)
        _, found = await admin.call("GET", "/v1/status")
        assert (found["head"], found["epoch"], found["connections"]) == (2, admin.gateway.log.epoch, 1)
        assert (found["canary_arrives"], found["last_reload_at"], found["last_whale"]) == (True, None, None)


async def test_the_clients_are_listed_with_filter_position_and_delivery(tmp_path: Path) -> None:
    async with running_admin(tmp_path) as admin, admin.gateway.connect() as client:
        rules = ["threshold_btc", "threshold_usd", "watch:a", "watch:b"]
        await ask(client, type="subscribe", filters={"min_btc": 500, "rules": rules})
        await receive_type(client, "subscribed")
        await admin.gateway.alerts(1)
        _, found = await admin.call("GET", "/v1/clients")
        (row,) = found["clients"]
        assert (row["delivery"], row["offset"], row["lag"]) == ("live", 1, 0)
        assert (row["filter"], row["address"]) == ("min_btc 500, rules 4", "127.0.0.1")
        assert found["next"] is None


async def test_pages_have_every_connection_once(tmp_path: Path) -> None:
    async with running_admin(tmp_path) as admin, contextlib.AsyncExitStack() as stack:
        for _ in range(7):
            await receive_type(await stack.enter_async_context(admin.gateway.connect()), "welcome")
        after: Any = "0-0"
        numbers: list[int] = []
        while after is not None:
            _, page = await admin.call("GET", f"/v1/clients?limit=2&after={after}")
            assert 1 <= len(page["clients"]) <= 2
            numbers += [row["connection"] for row in page["clients"]]
            after = page["next"]
        assert sorted(numbers) == list(range(1, 8))


async def test_a_disconnect_closes_that_connection_only(tmp_path: Path) -> None:
    async with running_admin(tmp_path) as admin, admin.gateway.connect() as one, admin.gateway.connect() as other:
        await receive_type(one, "welcome")
        await receive_type(other, "welcome")
        body = b'{"connection": 1}'
        assert await admin.call("POST", "/v1/disconnect", body) == (200, {"disconnected": 1})
        assert (await closed_with(one))[0] == 1001
        await (await other.ping())
        status, error = await admin.call("POST", "/v1/disconnect", body)
        assert (status, error["error"]["code"]) == (404, "not_found")
        assert admin.gateway.value("whaled_admin_acts_total", outcome="done") == 1
        assert admin.gateway.value("whaled_admin_acts_total", outcome="refused") == 1


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (b"{}", "bad_request"),
        (b'{"connection": "1"}', "bad_request"),
        (b'{"connection": true}', "bad_request"),
        (b'{"connection": -1}', "bad_request"),
        (b'{"client_id": ""}', "bad_request"),
        (b'{"client_id": "a", "connection": 1}', "bad_request"),
        (b'{"client_id": "nobody"}', "not_found"),
    ],
)
async def test_a_disconnect_without_a_target_is_refused(tmp_path: Path, body: bytes, code: str) -> None:
    async with running_admin(tmp_path) as admin:
        _, error = await admin.call("POST", "/v1/disconnect", body)
        assert error["error"]["code"] == code


async def test_a_reload_reports_that_it_was_applied_or_why_not(tmp_path: Path) -> None:
    async with running_admin(tmp_path) as admin:
        _, answer = await admin.call("POST", "/v1/reload")
        assert (answer["applied"], answer["problem"]) == (True, None)
        admin.reloads.problem = "gateway.port: found 0"
        _, answer = await admin.call("POST", "/v1/reload", b"{}")
        assert (answer["applied"], answer["problem"]) == (False, "gateway.port: found 0")
        admin.gateway.gateway.is_draining = True
        status, error = await admin.call("POST", "/v1/reload")
        assert (status, error["error"]["code"]) == (409, "conflict")


@pytest.mark.parametrize("query", ["limit=x", "limit=501", "limit=-1", "after=1", "after=a-b", "after=1-2-3"])
async def test_an_odd_page_is_refused(tmp_path: Path, query: str) -> None:
    async with running_admin(tmp_path) as admin:
        status, error = await admin.call("GET", f"/v1/clients?{query}")
        assert (status, error["error"]["code"]) == (400, "bad_request")
