"""A certified OpenID provider (the npm package oidc-provider) as a process on loopback."""

import asyncio
import fcntl
import json
import shutil
import subprocess
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from jwt.algorithms import ECAlgorithm, OKPAlgorithm, RSAAlgorithm

from kit.issuers import kid_of, private_key
from kit.paths import ROOT

SOURCE = ROOT / "tools" / "provider"
AUDIENCE = "https://whaled.example"
# The secret of the only client in provider.js.
SECRET = "only-for-tests-on-loopback"
# What the provider needs; Debian 12 has 18.
OLDEST_NODE = 20
# What its installation takes on a slow network, and what its start takes on a busy machine.
INSTALL_S = 240
START_S = 30


def installed() -> Path:
    """Return the directory of the installed provider; npm puts it below var/. Skips without Node or npm."""
    for program in ("node", "npm"):
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed: a real OpenID provider needs it")
    version = subprocess.run(["node", "--version"], capture_output=True, text=True, check=True).stdout.strip()
    if int(version.lstrip("v").partition(".")[0]) < OLDEST_NODE:
        pytest.skip(f"Node {version} is too old for the OpenID provider, which needs {OLDEST_NODE}")
    manifest = (SOURCE / "package.json").read_bytes()
    place = ROOT / "var" / "provider"
    place.mkdir(parents=True, exist_ok=True)
    with (place / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # tests run in several processes
        done = place / "installed.json"
        if not done.exists() or done.read_bytes() != manifest:
            shutil.rmtree(place / "node_modules", ignore_errors=True)
            (place / "package.json").write_bytes(manifest)
            # Without scripts: none of its packages needs one.
            command = ["npm", "install", "--ignore-scripts", "--no-audit", "--no-fund", "--no-package-lock"]
            found = subprocess.run(command, cwd=place, capture_output=True, text=True, timeout=INSTALL_S, check=False)
            if found.returncode:
                pytest.skip(f"npm cannot install the OpenID provider: {found.stderr.strip()[-300:]}")
            done.write_bytes(manifest)
        shutil.copy(SOURCE / "provider.js", place)
    return place


def _private_jwk(algorithm: str, name: str) -> dict[str, Any]:
    encoder: Any = ECAlgorithm if algorithm.startswith("ES") else OKPAlgorithm if algorithm == "EdDSA" else RSAAlgorithm
    found: Mapping[str, Any] = encoder.to_jwk(private_key(algorithm, name), as_dict=True)
    kept = {key: value for key, value in found.items() if key != "key_ops"}
    return {**kept, "kid": kid_of(algorithm, name), "use": "sig", "alg": algorithm}


class Provider:
    """The running provider."""

    def __init__(self, place: Path, algorithm: str) -> None:
        self._place = place
        self._algorithm = algorithm
        self._process: asyncio.subprocess.Process | None = None
        self.issuer = ""

    async def start(self, *names: str) -> None:
        """Start it with these keys, of which the first one signs; after a stop at the same port."""
        node = shutil.which("node")
        assert node is not None
        keys = [_private_jwk(self._algorithm, name) for name in names]
        port = int(self.issuer.rpartition(":")[2] or 0)
        settings = {"port": port, "keys": keys, "algorithm": self._algorithm}
        self._process = await asyncio.create_subprocess_exec(
            node, "provider.js", json.dumps(settings), cwd=self._place, stdout=subprocess.PIPE, stderr=sys.stderr
        )
        assert self._process.stdout is not None
        async with asyncio.timeout(START_S):
            self.issuer = (await self._process.stdout.readline()).decode().strip()
        assert self.issuer, "the provider did not start"

    async def stop(self) -> None:
        """Kill it."""
        if self._process is not None:
            self._process.kill()
            await self._process.wait()
            self._process = None

    async def token(self, scope: str = "whales:read", audience: str = AUDIENCE) -> str:
        """Return an access token by the client credentials grant."""
        form = {"grant_type": "client_credentials", "scope": scope, "resource": audience}
        login = {"Authorization": aiohttp.encode_basic_auth("whale-bot", SECRET)}
        async with aiohttp.ClientSession() as session:
            async with session.post(f"{self.issuer}/token", data=form, headers=login) as response:
                answer = await response.json()
            assert response.status == 200, answer
            token: str = answer["access_token"]
            return token


@asynccontextmanager
async def provider(place: Path, algorithm: str = "RS256") -> AsyncIterator[Provider]:
    """Run a provider with one key."""
    running = Provider(place, algorithm)
    try:
        await running.start("k1")
        yield running
    finally:
        await running.stop()
