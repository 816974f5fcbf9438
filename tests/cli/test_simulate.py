"""`whaled simulate` says where it is, serves, and ends when asked."""

import argparse
import asyncio
import re
import signal
import sys

import aiohttp
import pytest

from whaled.cli import simulate
from whaled.errors import ConfigError
from whaled.simulator.settings import DEMO, SimulatorSettings


def parse(*options: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    simulate.register(parser.add_subparsers())
    return parser.parse_args(["simulate", *options])


def test_the_options_defaults_are_the_settings_defaults() -> None:
    arguments = vars(parse())
    defaults = DEMO
    names = [name for name in SimulatorSettings.__struct_fields__ if name in arguments]
    assert {"host", "port", "rate", "whale_share", "block_interval", "poll_interval", "network"} < set(names)
    assert {name: arguments[name] for name in names} == {name: getattr(defaults, name) for name in names}


def test_a_seed_is_kept_and_another_world_is_made_without_one() -> None:
    assert parse("--seed", "5").seed == 5
    assert "seed" not in parse()


def test_a_value_out_of_range_is_refused_before_anything_listens() -> None:
    arguments = parse("--rate", "-3")
    with pytest.raises(ConfigError, match=r"rate: -3\.0 is out of range"):
        arguments.run(arguments)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
async def test_it_serves_until_a_signal_and_exits_with_zero(number: signal.Signals) -> None:
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-c",
        "from whaled.cli.main import entry; entry()",
        *("simulate", "--port", "0", "--rate", "50", "--poll-interval", "0.05"),
        stdout=asyncio.subprocess.PIPE,
    )
    assert process.stdout is not None
    async with asyncio.timeout(20):
        line = (await process.stdout.readline()).decode()
        rest = re.search(r"http://\S+/api/v1", line)
        assert rest is not None
        async with aiohttp.ClientSession() as session, session.get(f"{rest[0]}/blocks/tip/height") as response:
            assert (await response.text()).isdecimal()
        process.send_signal(number)
        assert await process.wait() == 0
