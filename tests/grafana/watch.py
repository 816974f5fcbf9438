"""Hold a scene for a while and let a program look at it: `watch.py MINUTES PROGRAM ARGUMENTS...`, see `make picture`.

The program gets the address of the Prometheus as its last argument.
"""

import asyncio
import datetime as dt
import signal
import ssl
import sys
import tempfile
from pathlib import Path

import trustme

from grafana.scene import acting
from kit import daemon
from whaled.simulator.settings import SimulatorSettings

BUSY = SimulatorSettings(seed=7, rate=8.0, whale_share=0.1, poll_interval=1, block_interval=45.0, port=0)


def certificate(directory: Path) -> tuple[Path, Path, ssl.SSLContext]:
    """A certificate for localhost, as the tests have it."""
    authority = trustme.CA()
    ends = dt.datetime.now(dt.UTC) + dt.timedelta(days=80)
    issued = authority.issue_cert("localhost", not_after=ends)
    chain, key = directory / "chain.pem", directory / "key.pem"
    for pem in issued.cert_chain_pems:
        pem.write_to_path(str(chain), append=True)
    issued.private_key_pem.write_to_path(str(key))
    key.chmod(0o600)
    context = ssl.create_default_context()
    authority.configure_trust(context)
    return chain, key, context


async def main(minutes: float, *program: str) -> int:
    """Run the scene, with a restart after a third of the time and a reload after two; then the program."""
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        async with acting(directory, certificate(directory), BUSY, pace=40, canary_s=10, scrape_s=5) as (scene, ask):
            async with daemon.running(scene.config) as whaled:
                await asyncio.sleep(minutes * 20)
                whaled.signal(signal.SIGTERM)
                await whaled.ended()
            async with daemon.running(scene.config) as whaled:
                await asyncio.sleep(minutes * 20)
                whaled.signal(signal.SIGHUP)
                await asyncio.sleep(minutes * 20)
                return await (await asyncio.create_subprocess_exec(*program, ask.url)).wait()


if __name__ == "__main__":
    sys.exit(asyncio.run(main(float(sys.argv[1]), *sys.argv[2:])))
