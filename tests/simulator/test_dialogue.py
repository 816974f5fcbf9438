"""What the stream tells is true, whaled's own decoder reads all of it, and only what polls cannot see is left out."""

from functools import cache, partial
from math import ceil

import pytest

from kit.whales import NOW
from whaled.simulator.backend import Backend
from whaled.simulator.dialogue import Dialogue
from whaled.simulator.life import Life
from whaled.simulator.messages import Messages, join
from whaled.simulator.settings import SimulatorSettings
from whaled.simulator.truth import Fate, Record
from whaled.simulator.world import World
from whaled.sources.mempool_space.dialect import Frame, decode

POLLS = 110
LATENCY = 0.02
# A block comes in the midst of a poll of the second.
SEEDS = (2, 39)


@cache
def busy(seed: int) -> tuple[World, list[Frame]]:
    """A busy world without reorganisations (these seeds bring none), and every frame a client of its backend got."""
    settings = SimulatorSettings(rate=10, whale_share=0.5, block_interval=15, events=2, keep_blocks=10_000, seed=seed)
    world = World(settings, NOW)
    life = Life(world)
    backend = Backend(world.chain, settings, NOW, usd=settings.usd)
    messages, dialogue = Messages(backend, world), Dialogue()
    wants = b'{"action":"want","data":["blocks","stats","mempool-blocks"],"track-mempool":true}'
    dialogue.receive(wants, NOW, messages)
    frames = []
    for poll in range(POLLS):
        now = NOW + 2 * poll
        life.advance(now - LATENCY)
        for update in backend.poll(now, usd=world.usd, meanwhile=partial(life.advance, now)):
            messages.changed()
            frames.append(decode(join(dialogue.push(update, messages.update(update), messages))))
    return world, frames


def left_before_it_was_fetched(record: Record) -> bool:
    """Whether it was gone by the time of the first poll that could have seen it."""
    first_poll = ceil((record.turns[0].at - NOW + LATENCY) / 2)
    return record.turns[1].at <= NOW + 2 * first_poll


@pytest.mark.slow
@pytest.mark.parametrize("seed", SEEDS)
def test_the_stream_matches_the_truth_except_for_changes_between_polls(seed: int) -> None:
    world, frames = busy(seed)
    assert [frame for frame in frames if frame.skipped or frame.unknown] == []
    deltas = [frame.delta for frame in frames if frame.delta]
    assert sum(delta.malformed for delta in deltas) == 0
    added = {tx.txid: tx for delta in deltas for tx in delta.at_least(0)}
    mined = {txid for delta in deltas for txid in delta.mined}
    removed = {txid for delta in deltas for txid in delta.removed}
    for txid, tx in added.items():
        assert tx.value_sat == world.truth[txid].out_sat
        assert tx.fee_sat in (world.truth[txid].fee_sat, None)
        assert [(each.txid, each.vout) for each in tx.inputs]
    last_poll = NOW + 2 * (POLLS - 1)
    for record in world.truth.records():
        if record.turns[-1].at > last_poll - LATENCY or record.sent_at < NOW:
            continue
        assert (record.txid in mined) == (record.fate is Fate.CONFIRMED)
        if record.txid not in added:
            assert record.via_block or left_before_it_was_fetched(record)
        elif record.fate in (Fate.REPLACED, Fate.EVICTED):
            assert record.txid in removed
    unheard = [record for record in world.truth.whales() if record.txid not in mined | added.keys()]
    assert unheard, "no whale was replaced within a poll: this seed tests nothing"


@pytest.mark.slow
@pytest.mark.parametrize("seed", SEEDS)
def test_every_visible_replacement_is_sent_except_by_winners_mined_before_their_fetch(seed: int) -> None:
    world, frames = busy(seed)
    told = {(pair.replaced, pair.by) for frame in frames if frame.delta for pair in frame.delta.replaced}
    added = {tx.txid: tx for frame in frames if frame.delta for tx in frame.delta.at_least(0)}
    seen = {
        (record.txid, record.replaced_by)
        for record in world.truth.records()
        if record.fate is Fate.REPLACED and record.txid in added and record.replaced_by in added
    }
    assert len(seen) > 20
    # The backend takes two for strangers if the second pays no more: a package's parent, or what was mined before it
    # was fetched, whose fee is told as 0.
    poorer = {(loser, by) for loser, by in seen if by and world.truth[by].fee_sat <= world.truth[loser].fee_sat}
    assert poorer, "no package replaced anything: this seed tests nothing"
    if seed == SEEDS[1]:
        assert seen - told - poorer
    assert all(added[by].is_confirmed for _, by in seen - told - poorer if by)
