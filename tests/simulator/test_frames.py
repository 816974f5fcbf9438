"""Every frame of the simulator has the shape of the recorded ones: the same keys, the same JSON types."""

import gzip
from collections import defaultdict
from collections.abc import Iterable, Iterator
from functools import cache, partial
from typing import Any

import msgspec
import pytest

from kit.paths import DATA
from whaled.simulator.backend import Backend
from whaled.simulator.dialogue import Dialogue
from whaled.simulator.life import Life
from whaled.simulator.messages import Messages, join
from whaled.simulator.scripts import Network
from whaled.simulator.settings import SimulatorSettings
from whaled.simulator.world import World

RECORDING = DATA / "regtest-1.jsonl.gz"
NOW = 1_795_376_507.0

# JavaScript numbers that happened to be whole in the recording, where fees were at their minimum.
# A fee is not whole where a block brought a transaction that the backend had not seen; none of these was in it.
FRACTIONAL = {
    "fee",
    "medianFee",
    "hourFee",
    "economyFee",
    "difficultyChange",
    "fastestFee",
    "halfHourFee",
    "vsize",
    "rate",
}
# Not in the recording: `rbfSummary` comes once the mempool changed, and what replaces another transaction may have
# relatives, as anything that is added.
MAY_COME = {"rbfSummary", "cpfpChecked", "lastBoosted"}
BY, ADDED = "delta.mempool-transactions.replaced[].by", "delta.mempool-transactions.added[]"


def kind(frame: dict[str, Any]) -> str:
    """Frames have no type: they are told apart by their keys."""
    if "backendInfo" in frame:
        return "init" if "da" in frame else "starting init"
    if "block" in frame:
        return "block"
    if "mempool-transactions" in frame:
        return "delta"
    if "blocks" in frame:
        return "want" if "da" in frame else "starting want"
    return next(iter(frame))


class Shape:
    """Of all values met at one path: their types, and how often each key was there."""

    def __init__(self) -> None:
        self.types: set[str] = set()
        self.objects = 0
        self.keys: dict[str, int] = defaultdict(int)

    @property
    def required(self) -> set[str]:
        return {key for key, count in self.keys.items() if count == self.objects}


def shapes(frames: Iterable[dict[str, Any]]) -> dict[str, Shape]:
    found: dict[str, Shape] = defaultdict(Shape)

    def walk(path: str, value: object) -> None:
        shape = found[path]
        shape.types.add(type(value).__name__)
        if isinstance(value, dict):
            shape.objects += 1
            for key, each in value.items():
                shape.keys[key] += 1
                walk(f"{path}.{key}", each)
        elif isinstance(value, list):
            for each in value:
                walk(f"{path}[]", each)

    for frame in frames:
        walk(kind(frame), frame)
    return found


@cache
def recorded() -> dict[str, Shape]:
    lines = gzip.decompress(RECORDING.read_bytes()).splitlines()
    entries = [msgspec.json.decode(line) for line in lines]
    return shapes(msgspec.json.decode(entry["raw"]) for entry in entries if entry["dir"] == "in")


def mine_late(world: World, step: int) -> None:
    """Now and then a block comes while the backend fetches."""
    if step % 20 == 7:
        world.mine()


def conversation() -> Iterator[dict[str, Any]]:
    """What a client is told that asks for everything, by a busy backend, and by one that starts anew."""
    settings = SimulatorSettings(
        network=Network.REGTEST, rate=8, block_interval=12, events=4, seed=7, start_height=263, whale_share=0.3
    )
    world = World(settings, NOW)
    life = Life(world)
    backend = Backend(world.chain, settings, NOW, usd=settings.usd)
    for _ in backend.poll(NOW):
        pass
    now = NOW
    for process in range(2):
        messages, dialogue = Messages(backend, world), Dialogue()
        for said in (
            b'{"action":"init"}',
            b'{"action":"want","data":["blocks","stats","mempool-blocks"]}',
            b'{"track-mempool":true}',
        ):
            answer = dialogue.receive(said, now, messages)
            if answer:
                yield msgspec.json.decode(join(answer))
        for step in range(60):
            now += 2
            life.advance(now)
            for update in backend.poll(now, meanwhile=partial(mine_late, world, step)):
                messages.changed()
                yield msgspec.json.decode(join(dialogue.push(update, messages.update(update), messages)))
        if process == 0:
            backend = Backend(world.chain, settings, now, usd=settings.usd)


@cache
def told() -> tuple[dict[str, Any], ...]:
    return tuple(conversation())


@cache
def simulated() -> dict[str, Shape]:
    return shapes(told())


# Lists that were empty in the recording's own frames of that kind; their elements have the shape of other kinds'.
EMPTY_THERE = ("init.transactions", "init.mempool-blocks", "want.mempool-blocks")


def last_key(path: str) -> str:
    return path.rsplit(".", maxsplit=1)[-1]


def differences(path: str) -> Iterator[str]:
    real, ours = recorded()[path], simulated().get(path)
    if ours is None:
        yield f"{path} is never simulated"
        return
    allowed = set(real.types)
    if "float" in real.types or last_key(path) in FRACTIONAL:
        allowed |= {"int", "float"}
    if not ours.types <= allowed:
        yield f"{path} is {ours.types}, recorded {real.types}"
    if ours.objects and real.objects:
        if missing := real.required - ours.required:
            yield f"{path} lacks {missing}"
        if extra := ours.keys.keys() - real.keys.keys() - MAY_COME:
            yield f"{path} has {extra} too many"


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind_of_frame",
    ["init", "want", "delta", "block", "loadingIndicators", "starting init", "starting want"],
)
def test_frames_have_the_recorded_keys_and_types(kind_of_frame: str) -> None:
    paths = [path for path in recorded() if path == kind_of_frame or path.startswith(f"{kind_of_frame}.")]
    assert paths
    assert [difference for path in paths for difference in differences(path)] == []


def test_no_other_kind_of_frame_or_part_is_sent() -> None:
    known = recorded().keys()
    extra = {path for path in simulated() if not any(f".{key}" in path for key in MAY_COME)} - known
    extra = {path for path in extra if path.replace(BY, ADDED) not in known}
    assert {path for path in extra if not path.startswith(tuple(f"{path}[]" for path in EMPTY_THERE))} == set()


@pytest.mark.slow
def test_whole_numbers_are_written_as_javascript_writes_them() -> None:
    for frame in told():
        text = msgspec.json.encode(frame["fees"]) if "fees" in frame else b""
        assert b".0," not in text
        assert b".0}" not in text
