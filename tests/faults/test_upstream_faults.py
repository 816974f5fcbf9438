from pathlib import Path

import pytest

from faults.kit import rigged

pytestmark = [pytest.mark.faults, pytest.mark.slow, pytest.mark.timeout(120)]


async def test_quiet(tmp_path: Path) -> None:
    async with rigged(tmp_path, "quiet", seed=1) as rig:
        await rig.sim.poll()
        await rig.go(10)
        await rig.start()
        await rig.settle()
        await rig.go(40)
        await rig.settle()
        rig.upstream.cut()
        await rig.go(20)
        await rig.settle()
        await rig.kill()
        await rig.go(20)
        await rig.start()
        await rig.finish()
