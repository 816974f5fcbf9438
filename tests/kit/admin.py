"""The admin API over a Unix socket, in front of a running gateway."""

import json
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp

from kit.gateway import Rig, running_gateway
from whaled.admin.calls import Route
from whaled.admin.desk import Desk, Parts
from whaled.admin.server import AdminServer
from whaled.config.sections import AdminSettings, DetectionSettings, MemorySettings
from whaled.ingest.committer import Committer
from whaled.ingest.ingest import Ingest
from whaled.ingest.intake import Intake
from whaled.ops import memory
from whaled.ops.memory_watch import MemoryWatch
from whaled.whales.detect import Detector, Rules


class Canary:
    """A canary that arrives."""

    def is_alive(self) -> bool:
        return True

    def since_arrival_s(self) -> float:
        return 2.5


class Reloads:
    """Reloads that end as the test wants."""

    def __init__(self) -> None:
        self.problem: str | None = None
        self.ended_at: float | None = None

    async def perform(self) -> str | None:
        self.ended_at = time.time()
        return self.problem


class AdminRig:
    """A gateway with an admin API."""

    def __init__(self, gateway: Rig, path: Path, reloads: Reloads) -> None:
        self.gateway = gateway
        self.path = path
        self.reloads = reloads

    async def call(self, method: str, target: str, body: bytes | None = None) -> tuple[int, Any]:
        """Return status and body of a response."""
        async with (
            aiohttp.ClientSession(connector=aiohttp.UnixConnector(str(self.path))) as session,
            session.request(method, f"http://admin{target}", data=body) as response,
        ):
            assert response.content_type == "application/json"
            return response.status, json.loads(await response.read())


@asynccontextmanager
async def running_admin(directory: Path, *, routes: Sequence[Route] = (), **settings: Any) -> AsyncIterator[AdminRig]:
    """Run a gateway and an admin API, whose socket is `admin.sock` in `directory`."""
    path = directory / "admin.sock"
    async with running_gateway(directory) as rig:
        ingest = Ingest(Detector(Rules.of(DetectionSettings()), seen_limit=100))
        detection = rig.metrics.detection
        committer = Committer(event_log=rig.log, publisher=rig.gateway, meter=detection, settled=ingest.forget)
        reloads = Reloads()
        parts = Parts(
            gateway=rig.gateway,
            event_log=rig.log,
            path=str(directory / "whaled.db"),
            committer=committer,
            intake=Intake(
                ingest=ingest,
                committer=committer,
                event_log=rig.log,
                publisher=rig.gateway,
                priority=rig.gateway.share,
                meter=detection,
                inputs=None,
            ),
            memory_watch=MemoryWatch(MemorySettings(), rig.gateway, rig.metrics.memory, memory.Gauge()),
            canary=Canary(),
            reloads=reloads,
            is_stopping=lambda: rig.gateway.is_draining,
        )
        server = AdminServer(
            AdminSettings(socket=str(path), **settings),
            routes=(*Desk(parts, time.time()).routes(), *routes),
            event_log=directory / "whaled.db",
            meter=rig.metrics.admin,
        )
        async with server.serving():
            yield AdminRig(rig, path, reloads)
