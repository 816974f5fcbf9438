"""From a whaled that went away to the pager: real whaled, real Prometheus, real Alertmanager, the shipped files."""

import asyncio
import re
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import yaml
from aiohttp import web

from kit.daemon import running, write_config
from kit.prometheus import ALERTS, DEPLOY, RECORDINGS, alertmanager, free_port, needed, prometheus, rules_of

pytestmark = [pytest.mark.slow, pytest.mark.long]

# Scrape, evaluation, `for`, grouping: a second each; and a machine that runs other tests too.
TOLD_LIMIT_S = 20
EVERYTHING = [(rule["alert"], rule["labels"]["severity"]) for rule in rules_of(ALERTS)]


class Inbox:
    """Who is told: an HTTP endpoint for each receiver."""

    def __init__(self) -> None:
        self.port = 0
        self._heard = asyncio.Condition()
        self._alerts: list[dict[str, Any]] = []

    async def take(self, request: web.Request) -> web.Response:
        """A notification."""
        message = await request.json()
        async with self._heard:
            self._alerts += [{"receiver": request.path.strip("/"), **alert} for alert in message["alerts"]]
            self._heard.notify_all()
        return web.Response()

    async def told(self, receiver: str, name: str, status: str) -> dict[str, Any]:
        """Wait for an alert."""
        async with asyncio.timeout(TOLD_LIMIT_S), self._heard:
            while True:
                for alert in self._alerts:
                    found = alert["receiver"], alert["labels"]["alertname"], alert["status"]
                    if found == (receiver, name, status):
                        return alert
                await self._heard.wait()


@asynccontextmanager
async def inbox() -> AsyncIterator[Inbox]:
    box = Inbox()
    app = web.Application()
    app.router.add_post("/{receiver}", box.take)
    runner = web.AppRunner(app)
    await runner.setup()
    try:
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        box.port = runner.addresses[0][1]
        yield box
    finally:
        await runner.cleanup()


def routing(port: int) -> dict[str, Any]:
    """The example, in a hurry and with the inbox in place of pager and mail."""
    config: dict[str, Any] = yaml.safe_load((DEPLOY / "alertmanager.example.yml").read_text())
    for route in (config["route"], *config["route"]["routes"]):
        route.update(group_wait="0s", group_interval="1s")
    config["receivers"] = [
        {"name": receiver["name"], "webhook_configs": [{"url": f"http://127.0.0.1:{port}/{receiver['name']}"}]}
        for receiver in config["receivers"]
    ]
    return config


def watching(directory: Path, whaled_port: int, alertmanager_address: str) -> dict[str, Any]:
    """The example with everything every second, beside copies of the rules that wait for a second only."""
    for path in (RECORDINGS, ALERTS):
        hurried = re.sub(r"^( +)(for|interval): .*$", r"\1\2: 1s", path.read_text(), flags=re.MULTILINE)
        (directory / path.name).write_text(hurried)
    scraped = {"alert": "Scraped", "expr": 'up{job="whaled"} == 1', "labels": {"severity": "page"}}
    (directory / "scraped.yml").write_text(yaml.safe_dump({"groups": [{"name": "test", "rules": [scraped]}]}))
    config: dict[str, Any] = yaml.safe_load((DEPLOY / "prometheus.example.yml").read_text())
    config["global"] = {"scrape_interval": "1s", "scrape_timeout": "1s", "evaluation_interval": "1s"}
    config["rule_files"].append("scraped.yml")
    config["alerting"]["alertmanagers"][0]["static_configs"][0]["targets"] = [alertmanager_address]
    config["scrape_configs"][0]["static_configs"][0]["targets"] = [f"127.0.0.1:{whaled_port}"]
    return config


async def test_an_outage_and_its_end_reach_the_pager(tmp_path: Path) -> None:
    needed("prometheus")
    needed("alertmanager")
    port = free_port()
    config = write_config(tmp_path, "ws://127.0.0.1:9/", http={"port": port})
    async with (
        inbox() as box,
        alertmanager(tmp_path, routing(box.port)) as alertmanager_address,
        prometheus(tmp_path, watching(tmp_path, port, alertmanager_address)) as prometheus_address,
        aiohttp.ClientSession(f"http://{prometheus_address}") as ask,
    ):
        async with running(config, "--simulate") as daemon:
            await box.told("pager", "Scraped", "firing")
            # Authentication is off in this configuration, which wakes nobody.
            off = await box.told("tickets", "WhaledAuthenticationDisabled", "firing")
            assert off["labels"]["instance"] == f"127.0.0.1:{port}"
            daemon.signal(signal.SIGTERM)
            assert await daemon.ended() == 0
        down = await box.told("pager", "WhaledDown", "firing")
        assert down["annotations"]["summary"] == f"whaled at 127.0.0.1:{port} does not answer"
        assert down["annotations"]["runbook_url"].endswith("runbook.md#whaleddown")
        async with ask.get("/api/v1/rules") as answer:
            groups = (await answer.json())["data"]["groups"]
        assert {rule["name"]: rule.get("lastError") for group in groups for rule in group["rules"]} == {
            rule["name"]: None for group in groups for rule in group["rules"] if rule["health"] == "ok"
        }
        async with running(config, "--simulate"):
            await box.told("pager", "WhaledDown", "resolved")


async def sent(ask: aiohttp.ClientSession, instance: str) -> set[str]:
    """The alerts of an instance that are not inhibited."""
    async with ask.get("/api/v2/alerts", params={"filter": f'instance="{instance}"'}) as answer:
        alerts = await answer.json()
    return {alert["labels"]["alertname"] for alert in alerts if alert["status"]["state"] == "active"}


async def test_consequences_of_an_alert_are_inhibited(tmp_path: Path) -> None:
    instances = {
        "dead": {name for name, _ in EVERYTHING},
        "cut": {"WhaledUpstreamLost", "WhaledUpstreamFlapping", "WhaledNoWhales", "WhaledSequenceGaps"},
        "full": {"WhaledEventLogFails", "WhaledDiskNearlyFull", "WhaledDiskFillsUp", "WhaledCanaryLate"},
        "slow": {"WhaledDeliveryBudgetBurns", "WhaledDeliveryBudgetBurnsFast", "WhaledDeliveryBudgetBurnsSlowly"},
        "fine": {"WhaledMemoryNearLimit", "WhaledNoWhales"},
    }
    expected = {
        "dead": {"WhaledDown"},
        "cut": {"WhaledUpstreamLost", "WhaledSequenceGaps"},
        "full": {"WhaledEventLogFails", "WhaledDiskNearlyFull"},
        "slow": {"WhaledDeliveryBudgetBurnsFast"},
        "fine": {"WhaledMemoryNearLimit", "WhaledNoWhales"},
    }
    alerts = [
        {"labels": {"alertname": name, "severity": severity, "job": "whaled", "instance": instance}}
        for instance, names in instances.items()
        for name, severity in EVERYTHING
        if name in names
    ]
    async with (
        inbox() as box,
        alertmanager(tmp_path, routing(box.port)) as address,
        aiohttp.ClientSession(f"http://{address}") as ask,
    ):
        async with ask.post("/api/v2/alerts", json=alerts) as answer:
            assert answer.status == 200
        # Alertmanager takes them in by and by.
        found: dict[str, set[str]] = {}
        async with asyncio.timeout(TOLD_LIMIT_S):
            while found != expected:
                found = {instance: await sent(ask, instance) for instance in instances}
