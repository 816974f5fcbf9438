"""Faults of the backend, the link to it and the chain: no event is lost or repeated, and every outcome is correct."""

import os
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from faults.net import Cut, Reply, Trouble, Way, text_frame
from faults.rig import Metrics, Rig, rigged
from whaled.model import SAT_PER_BTC
from whaled.simulator.backend import FAILED_POLLS
from whaled.simulator.faults import Garbage

pytestmark = [pytest.mark.faults, pytest.mark.slow, pytest.mark.timeout(900)]

Sections = Mapping[str, Mapping[str, object]]

# The frames of one connection. Up: the handshake, three that subscribe, the requests for the eight projected blocks,
# and the end of these. Down: the handshake, init, the response to `want`, the eight projected blocks, then deltas and
# blocks.
QUESTIONS = 12
ANSWERS = 16
PARTS = (0.0, 0.5, 1.0)
PATIENCE_POLLS = 60
# The seeds of random faults; `make test-faults FAULT_SEEDS=11-60` tests others, and FAULT_SEEDS=7 one.
FIRST, _, LAST = os.environ.get("FAULT_SEEDS", "1-10").partition("-")
SEEDS = range(int(FIRST), int(LAST or FIRST) + 1)
# A silent link is closed soon.
IMPATIENT: Sections = {"upstream": {"ping_interval": "300ms", "stale_after": "1500ms"}}

# A link is not closed or reported as degraded because this machine is busy: tests would take that for the fault.
PATIENT: Sections = {"upstream": {"ping_interval": "20s", "stale_after": "60s"}}


@asynccontextmanager
async def living(
    directory: Path, name: str, seed: int = 1, sections: Sections | None = None, **world: Any
) -> AsyncIterator[Rig]:
    """Run a rig whose whaled has been up for a while and is up to date."""
    async with rigged(directory, name, seed=seed, sections=sections, **world) as rig:
        await rig.go(10)
        await rig.start()
        await rig.settle()
        await rig.go(25)
        await rig.settle()
        yield rig


def away(rig: Rig) -> None:
    """Make the backend unreachable, both the stream and REST."""
    rig.upstream.target = None
    rig.upstream.cut()
    rig.rest.troubles.append(Trouble(Reply.RESET, times=10**9))


def back(rig: Rig) -> None:
    """Make the backend reachable again."""
    rig.upstream.target = ("127.0.0.1", rig.sim.port)
    rig.rest.troubles.clear()


async def lost(rig: Rig, reason: str | None = None, *, more_than: float = 0) -> float:
    """Return how often the link was lost (for a reason), once that exceeds `more_than`."""
    count = 0.0

    async def is_lost() -> bool:
        nonlocal count
        seen = await rig.metrics()
        name = "whaled_upstream_reconnects_total"
        count = seen.total(name) if reason is None else seen.get(name, reason=reason)
        return count > more_than

    if more_than < 0:
        await is_lost()
    else:
        await rig.until(is_lost)
    return count


# --- the link ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [1, 2])
async def test_the_link_can_be_cut_at_every_point_of_subscribe_snapshot_delta_and_block(
    tmp_path: Path, seed: int
) -> None:
    points = [Cut(Way.UP, frame, part) for frame in range(QUESTIONS + 1) for part in PARTS]
    points += [Cut(Way.DOWN, frame, part) for frame in range(ANSWERS + 1) for part in PARTS]
    # Small blocks: a mempool of 200 transactions fills all eight that are projected. It grows slowly: cuts take time.
    async with living(tmp_path, "link cut", seed, rate=12.0, block_weight=20_000, block_interval=4.0) as rig:
        await rig.go(25)
        rig.rng.shuffle(points)
        rig.upstream.cuts.extend(points)
        rig.upstream.cut()
        polls = cut_count = 0
        while rig.upstream.cut_count < len(points):
            await rig.go(pace_s=0.05)
            polls += 1
            if rig.upstream.cut_count > cut_count:
                polls, cut_count = 0, rig.upstream.cut_count
            elif polls % PATIENCE_POLLS == 0:
                # Too few blocks happened to be projected for this cut: try again with the next connection.
                rig.upstream.cut()
        counts = await rig.finish()
        assert counts.cuts == len(points)


@pytest.mark.parametrize("seed", [1, 2])
async def test_a_short_stall_is_tolerated_and_a_long_one_closes_the_link(tmp_path: Path, seed: int) -> None:
    async with living(tmp_path, "stalled", seed, IMPATIENT) as rig:
        for is_long in (False, True, False, True):
            before = await lost(rig, more_than=-1)
            rig.sim.stall()
            await rig.go(6)
            if is_long:
                await lost(rig, more_than=before)
            rig.sim.resume()
            await rig.go(6)
            await rig.settle()
        await rig.finish()


@pytest.mark.parametrize("seed", [1, 2])
async def test_a_half_open_link_is_noticed(tmp_path: Path, seed: int) -> None:
    async with living(tmp_path, "half-open", seed, IMPATIENT) as rig:
        for _ in range(3):
            before = await lost(rig, more_than=-1)
            rig.upstream.freeze()
            await rig.go(12)
            await lost(rig, more_than=before)
            await rig.go(6)
            await rig.settle()
        await rig.finish()


# --- frames -----------------------------------------------------------------------------------------------------------

# The metric that whaled counts a fault in, and its label.
Mark = tuple[str, str]
NOT_JSON: Mark = ("upstream_frames_undecodable", "fault=malformed")
NO_OBJECT: Mark = ("upstream_frames_undecodable", "fault=not_an_object")
SKIPPED: Mark = ("upstream_parts_skipped", "")
UNKNOWN: Mark = ("upstream_keys_unknown", "")
TOO_BIG: Mark = ("upstream_reconnects", "reason=too_big")
PROTOCOL: Mark = ("upstream_reconnects", "reason=protocol")
CLOSED: Mark = ("upstream_reconnects", "reason=closed")

GARBAGE: dict[Garbage, Mark] = {
    Garbage.NOT_JSON: NOT_JSON,
    Garbage.TRUNCATED: NOT_JSON,
    Garbage.NULL: NO_OBJECT,
    Garbage.NUMBER: NO_OBJECT,
    Garbage.ARRAY: NO_OBJECT,
    Garbage.EMPTY: NOT_JSON,
    Garbage.WRONG_TYPES: SKIPPED,
    Garbage.MISSING_KEYS: SKIPPED,
    Garbage.NEGATIVE_VALUE: SKIPPED,
    Garbage.DEEP: NOT_JSON,
    Garbage.BINARY: NOT_JSON,
}
BAD_FRAMES: dict[str, tuple[bytes, Mark]] = {
    "announces 4 EiB": (text_frame(b"{}", announced=1 << 62), TOO_BIG),
    "is too big": (text_frame(b'{"x":"' + b"x" * 3_000_000 + b'"}'), TOO_BIG),
    "has reserved bits": (text_frame(b"{}", first_byte=0xF1), PROTOCOL),
    "has an unknown opcode": (text_frame(b"{}", first_byte=0x83), PROTOCOL),
    "continues nothing": (text_frame(b"{}", first_byte=0x80), PROTOCOL),
    "is a close": (b"\x88\x02\x03\xe8", CLOSED),
    "is a close with a forbidden code": (b"\x88\x02\x03\xed", PROTOCOL),
    "is a masked one": (b"\x81\x82abcd\x1a\x1f", PROTOCOL),
    "is not UTF-8": (text_frame(b'{"x":"\xff\xfe"}'), UNKNOWN),
    "is an unrequested giant": (text_frame(b'{"x":"' + b"x" * 900_000 + b'"}'), UNKNOWN),
    "is a tower": (text_frame(b"[" * 200_000 + b"]" * 200_000), NO_OBJECT),
    "is a huge number": (text_frame(b'{"mempool-transactions":{"sequence":' + b"9" * 5_000 + b"}}"), SKIPPED),
}


async def linked(rig: Rig) -> Metrics:
    """Wait until the link is up, so that a frame can be inserted into it, and return the metrics."""

    async def is_linked() -> bool:
        return (await rig.metrics()).get("whaled_upstream_state", state="connected") == 1

    await rig.until(is_linked)
    return await rig.metrics()


def marks(seen: Metrics, mark: Mark) -> float:
    """Return the count of a mark."""
    name, label = mark
    return seen.get(f"whaled_{name}_total", **dict([label.split("=")] if label else []))


async def noticed(rig: Rig, before: Metrics, mark: Mark) -> None:
    """Wait until whaled has counted a mark again."""

    async def is_noticed() -> bool:
        return marks(await rig.metrics(), mark) > marks(before, mark)

    await rig.until(is_noticed)


@pytest.mark.parametrize("seed", [1, 2])
async def test_garbage_of_every_kind_is_survived(tmp_path: Path, seed: int) -> None:
    async with living(tmp_path, "garbage", seed, {"upstream": {**PATIENT["upstream"], "max_message": "1MiB"}}) as rig:
        for kind in Garbage:
            before = await linked(rig)
            rig.sim.send_garbage(kind)
            await rig.go(2)
            await noticed(rig, before, GARBAGE[kind])
        await rig.settle()
        for frame, mark in BAD_FRAMES.values():
            before = await linked(rig)
            rig.upstream.insert(frame)
            await rig.go(2, pace_s=0.1)
            await noticed(rig, before, mark)
        await rig.settle()
        await rig.finish()


async def test_a_burst_of_2000_transactions_survives_a_cut_frame(tmp_path: Path) -> None:
    async with living(tmp_path, "burst", block_weight=400_000) as rig:
        rig.sim.burst(2000)
        await rig.go(3)
        await rig.settle()
        before = await lost(rig, more_than=-1)
        rig.upstream.cuts.append(Cut(Way.DOWN, 14, 0.7))
        rig.upstream.cut()
        before = await lost(rig, more_than=before)
        await rig.go(4, pace_s=0.05)
        rig.sim.burst(2000)
        await rig.go(6, pace_s=0.05)
        await lost(rig, more_than=before)
        rig.sim.late_block()
        await rig.go(6)
        assert (await rig.finish()).cuts == 1


@pytest.mark.parametrize("seed", [1, 2])
async def test_a_delta_missing_on_an_open_link_is_recovered(tmp_path: Path, seed: int) -> None:
    # Without automatic blocks, a whale that is not mined can be found only in a snapshot.
    async with living(tmp_path, "gap", seed, PATIENT, block_interval=0) as rig:
        at_start = await rig.metrics()
        for each in range(4):
            before = await linked(rig)
            whale = rig.sim.world.pay((150 + each) * SAT_PER_BTC, rate=2.0).txid
            theft = rig.upstream.steal(brings(whale))
            await rig.go()
            await rig.until(theft.was_done)
            if each % 2:
                rig.sim.world.mine()
            await rig.go(2)
            await gaps(rig, more_than=gap_count(before))
            await rig.settle()
        seen = await rig.metrics()
        assert seen.total("whaled_upstream_reconnects_total") == at_start.total("whaled_upstream_reconnects_total")
        await rig.finish(gaps=int(gap_count(seen)))


def brings(txid: str) -> Callable[[bytes], bool]:
    """Return a predicate for the delta that contains a transaction."""
    return lambda frame: b'"mempool-transactions"' in frame and txid.encode() in frame


def gap_count(seen: Metrics) -> float:
    """Return the number of deltas that did not follow the previous one."""
    return seen.get("whaled_upstream_deltas_total", continuity="gap")


async def gaps(rig: Rig, *, more_than: float) -> None:
    """Wait until another gap was counted."""

    async def has_more() -> bool:
        return gap_count(await rig.metrics()) > more_than

    await rig.until(has_more)


# --- restarts of the backend ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("database", [False, True], ids=["no database", "database"])
@pytest.mark.parametrize("how", ["cache", "early", "late"])
async def test_a_restart_of_the_backend_loses_no_event(tmp_path: Path, how: str, database: bool) -> None:
    async with living(tmp_path, f"restart, {how}{', database' if database else ''}", 5, database=database) as rig:
        for missed in (0, 4, 12):
            rig.sim.stall()
            await rig.go(missed)
            connects = (await rig.metrics()).total("whaled_upstream_connects_total")
            await rig.sim.restart(cache=how == "cache", resend=how == "early", down=0.1)
            rig.sim.resume()

            async def is_connected(connects: float = connects) -> bool:
                return (await rig.metrics()).total("whaled_upstream_connects_total") > connects

            if how == "early":
                await rig.until(is_connected)  # subscribed before the backend has polled its node
            await rig.go(8, pace_s=0.02)
            await rig.settle()
        await rig.finish()


# --- REST -------------------------------------------------------------------------------------------------------------

PATHS = (
    "blocks/tip/height", "block-height/.*", "block/[0-9a-f]*", "block/.*/summary", "block/.*/txs/.*", "tx/[0-9a-f]*",
    "tx/.*/status", "tx/.*/rbf", "mempool/txids", "prevouts",
)  # fmt: skip
TROUBLES: dict[str, dict[str, Any]] = {
    "404": {"reply": Reply.STATUS, "status": 404},
    "429 with Retry-After": {"reply": Reply.STATUS, "status": 429, "headers": {"Retry-After": "1"}},
    "429 with a date": {
        "reply": Reply.STATUS, "status": 429, "headers": {"Retry-After": "Wed, 21 Oct 2015 07:28:00 GMT"},
    },
    "500": {"reply": Reply.STATUS, "status": 500},
    "503": {"reply": Reply.STATUS, "status": 503},
    "no answer": {"reply": Reply.HANG},
    "slow": {"reply": Reply.SLOW, "seconds": 0.4},
    "garbage": {"reply": Reply.GARBAGE},
    "truncated": {"reply": Reply.TRUNCATED},
    "reset": {"reply": Reply.RESET},
}  # fmt: skip
# These requests fail completely, once: whaled sends a request three times, unless the response would be the same.
# whaled waits longer after each failure, so the other requests fail only at their first attempt.
AS_A_WHOLE = {"blocks/tip/height", "block/.*/summary", "tx/[0-9a-f]*", "tx/.*/status", "mempool/txids"}
AT_ONCE = {"404", "garbage"}


@pytest.mark.parametrize("trouble", TROUBLES)
async def test_every_request_can_fail_during_snapshot_scan_and_outcome(tmp_path: Path, trouble: str) -> None:
    async with living(tmp_path, f"REST {trouble}", 7, rate=20.0) as rig:
        await rig.go(10)
        await rig.settle()
        for txid in rig.waiting_whales()[:5]:  # only REST requests determine the outcomes of these
            rig.sim.world.chain.evict(txid)
        rig.upstream.target = None
        rig.upstream.cut()
        await rig.go(15)  # whales that only the snapshot and blocks contain, and outcomes that need REST requests
        times = {path: 3 if path in AS_A_WHOLE and trouble not in AT_ONCE else 1 for path in PATHS}
        rig.rest.troubles = [Trouble(path=path, times=times[path], **TROUBLES[trouble]) for path in PATHS]
        back_to = ("127.0.0.1", rig.sim.port)
        rig.upstream.target = back_to
        await rig.go(10, pace_s=0.1)
        await rig.settle()
        tried = {each.path: each.tried for each in rig.rest.troubles}
        await rig.finish(**{"REST faults": sum(tried.values())})
        assert all(tried.values()), tried


# --- the chain --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_away", [False, True], ids=["up", "away"])
@pytest.mark.parametrize("database", [False, True], ids=["no database", "database"])
@pytest.mark.parametrize("depth", [1, 3, 20])
async def test_a_reorganisation_is_followed(tmp_path: Path, depth: int, database: bool, is_away: bool) -> None:
    name = f"reorg {depth}{', database' if database else ''}{', link away' if is_away else ''}"
    async with living(tmp_path, name, 11, database=database, block_interval=3.0) as rig:
        world = rig.sim.world
        for each in range(2):
            while world.chain.tip.height < 900_000 + depth + 9:
                await rig.go()
            spent = world.pay(150 * SAT_PER_BTC, rate=90.0).txid
            waits = world.pay(160 * SAT_PER_BTC, rate=1.0).txid
            await rig.go()
            if rig.sim.truth[spent].height is None:
                world.mine(only={spent})
            await rig.go(2)
            await rig.settle()
            if is_away:
                away(rig)
            # Two whales, one mined and one not, are double-spent in the new branch.
            world.reorg(depth, double_spend=[txid for txid in (spent, waits) if is_double_spendable(rig, txid, depth)])
            await rig.go(1 + each)
            back(rig)
            await rig.go(5)
            await rig.settle()
            assert (await rig.metrics()).total("whaled_reorgs_total") > each
        reorgs = (await rig.metrics()).total("whaled_reorgs_total")
        await rig.finish(reorgs=int(reorgs))


def is_double_spendable(rig: Rig, txid: str, depth: int) -> bool:
    """Return whether the transaction is in the mempool, or in a block that is about to leave the chain."""
    height = rig.sim.truth[txid].height
    return height is None or height > rig.sim.world.chain.tip.height - depth


@pytest.mark.parametrize("is_away", [False, True], ids=["up", "away"])
@pytest.mark.parametrize("count", [16, 20])
async def test_many_blocks_at_once_are_scanned(tmp_path: Path, count: int, is_away: bool) -> None:
    async with living(tmp_path, f"{count} blocks at once{', link away' if is_away else ''}", 13) as rig:
        for _ in range(2):
            if is_away:
                away(rig)
            for each in range(count):
                rig.sim.world.pay((100 + each) * SAT_PER_BTC, rate=90.0)
                rig.sim.world.mine([rig.sim.world.pay((200 + each) * SAT_PER_BTC, relay=False)])
            await rig.go(2)
            back(rig)
            await rig.go(4)
            await rig.settle()
        await rig.finish()


@pytest.mark.parametrize("seed", [1, 2])
async def test_known_whales_have_an_outcome_after_more_blocks_than_are_scanned(tmp_path: Path, seed: int) -> None:
    async with living(tmp_path, "away too long", seed, block_interval=0, max_blocks=4) as rig:
        skipped = 0
        for depth in (2, 6):
            for _ in range(depth):
                await rig.go(4)
                rig.sim.world.mine()
                await rig.go()
                await rig.settle()  # otherwise this block may be skipped as well
            skipped += int((await rig.metrics()).total("whaled_blocks_skipped_total"))
            await rig.kill()
            rig.sim.world.reorg(depth)
            for _ in range(8):
                await rig.go()
                rig.sim.world.mine()
            await rig.start()
            await rig.go(4)
            await rig.settle()
        skipped += int((await rig.metrics()).total("whaled_blocks_skipped_total"))
        assert skipped > 0
        await rig.finish(skipped=skipped)


async def degraded(rig: Rig) -> None:
    """Wait until whaled reports its backend as degraded."""

    async def is_degraded() -> bool:
        return (await rig.metrics()).get("whaled_upstream_state", state="degraded") == 1

    await rig.until(is_degraded)


@pytest.mark.parametrize("forget", [False, True], ids=["keeps its mempool", "loses its mempool"])
async def test_an_outage_of_bitcoind_loses_no_event(tmp_path: Path, forget: bool) -> None:
    async with living(tmp_path, f"bitcoind {'loses' if forget else 'keeps'} its mempool", 17, PATIENT) as rig:
        for fails in (FAILED_POLLS - 2, FAILED_POLLS + 3):
            rig.sim.lose_bitcoind(forget=forget)
            rig.rest.troubles.append(Trouble(Reply.STATUS, times=10**9))
            await rig.go(fails)
            if fails >= FAILED_POLLS:
                await degraded(rig)
            rig.sim.find_bitcoind()
            rig.rest.troubles.clear()
            await rig.go(8)
            await rig.settle()
        await rig.finish()


# --- everything together ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", SEEDS)
async def test_random_faults_in_sequence(tmp_path: Path, seed: int) -> None:
    async with living(tmp_path, "by chance", seed, IMPATIENT, rate=20.0, database=bool(seed % 2)) as rig:
        for _ in range(14):
            await by_chance(rig)
            await rig.go(rig.rng.randint(1, 6), pace_s=0.02)
            if rig.rng.random() < 0.3:
                back(rig)
                await rig.settle()
        back(rig)
        await rig.finish()


async def by_chance(rig: Rig) -> None:  # noqa: C901 - a list, not a decision
    sim, rng = rig.sim, rig.rng
    match rng.randrange(13):
        case 0:
            rig.upstream.cut()
        case 1:
            away(rig)
        case 2:
            back(rig)
        case 3:
            rig.upstream.freeze()
        case 4:
            rig.upstream.cuts.append(Cut(rng.choice((Way.UP, Way.DOWN)), rng.randint(0, 14), rng.random()))
        case 5:
            sim.stall()
            await rig.go(rng.randint(0, 5))
            await sim.restart(cache=rng.random() < 0.5, resend=rng.random() < 0.5, down=0.05)
            sim.resume()
        case 6:
            sim.send_garbage(rng.choice(list(Garbage)))
        case 7:
            sim.reorg(rng.randint(1, 3))
        case 8:
            sim.late_block()
        case 9:
            sim.lose_bitcoind(forget=rng.random() < 0.3)
            await rig.go(rng.randint(1, 7))
            sim.find_bitcoind()
        case 10:
            kind = rng.choice([each for each in TROUBLES if each != "404"])
            rig.rest.troubles = [Trouble(path=rng.choice(PATHS), times=rng.randint(1, 5), **TROUBLES[kind])]
        case 11:
            for _ in range(rng.randint(2, 20)):
                sim.world.mine()
        case _:
            await rig.kill()
            await rig.go(rng.randint(0, 5))
            await rig.start()
