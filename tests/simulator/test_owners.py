"""The invented owners of the simulated world: one address book fits every world, and the demo shows flows and hurry."""

from collections import Counter

import pytest
from msgspec.structs import replace

from kit.whales import NOW
from whaled.cli.tail_lines import bar
from whaled.model import FeeMarket, Flow, Input, Output, Transaction
from whaled.simulator.life import Life
from whaled.simulator.owners import BOOKS, OWNERS, book, scripts_of
from whaled.simulator.responses import GENESIS
from whaled.simulator.scripts import Network
from whaled.simulator.settings import DEMO, SimulatorSettings
from whaled.simulator.transactions import Payment, Tx, TxKind
from whaled.simulator.world import World
from whaled.sources.mempool_space import identity
from whaled.whales.bookkeys import elsewhere
from whaled.whales.fees import urgency
from whaled.whales.labels import AddressBook

POLL_S = 2.0


def output_of(payment: Payment) -> Output:
    return Output(payment.value, payment.script.hex, payment.script.address or None)


def as_sent(tx: Tx) -> Transaction:
    """A transaction of the world as whaled knows it once its inputs are known."""
    return Transaction(
        txid=tx.txid,
        inputs=tuple(
            Input(coin.txid, coin.vout, tx.sequence, output_of(Payment(coin.value, coin.script))) for coin in tx.inputs
        ),
        outputs=tuple(map(output_of, tx.outputs)),
        fee_sat=tx.fee,
        vsize=tx.vsize,
    )


def shipped(network: Network) -> AddressBook:
    return AddressBook.parse(BOOKS[network].read_text(), BOOKS[network].name)


@pytest.mark.parametrize("network", Network)
def test_the_book_that_is_shipped_lists_the_owners_of_the_world_and_calls_them_invented(network: Network) -> None:
    assert BOOKS[network].read_text() == book(network)
    assert book(network).startswith("# Invented. ")
    assert all(owner.label.startswith("Invented ") for owner in OWNERS)
    known = shipped(network)
    for owner in OWNERS:
        for script in scripts_of(owner, network):
            assert known.owner(Output(1, script.hex, script.address)) is not None
    assert len(known.owners) == sum(len(scripts_of(owner, network)) for owner in OWNERS)


@pytest.mark.parametrize("network", Network)
def test_the_book_that_is_shipped_fits_the_network_that_the_simulator_names(network: Network) -> None:
    named = str(identity.Network(GENESIS[network]))
    owners = shipped(network).owners
    assert (named, owners.notes) == (f"simulated {network}", ())
    assert elsewhere(owners.networks, named) == {}
    for real in ("mainnet", "regtest"):
        assert not identity.Network(GENESIS[network]).same_as(
            identity.Network(next(key for key, name in identity.NETWORKS.items() if name == real))
        )


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("network", Network)
def test_whales_of_every_flow_and_degree_of_urgency_turn_up_in_the_demo(seed: int, network: Network) -> None:
    world = World(replace(DEMO, seed=seed, network=network), NOW)
    life = Life(world)
    known = shipped(network)
    flows: Counter[Flow] = Counter()
    bars: Counter[str] = Counter()
    judged: set[str] = set()
    while world.now < NOW + 300:
        life.advance(world.now + POLL_S)
        rates = world.recommended()
        fees = FeeMarket(rates.fastest, rates.half_hour, rates.hour, rates.economy, rates.minimum)
        for txid in (record.txid for record in world.truth.whales() if record.txid not in judged):
            judged.add(txid)
            entry = world.chain.mempool.get(txid)
            if entry is not None:
                flows[known.involved(as_sent(entry.tx)).flow] += 1
                bars[bar(urgency(entry.score, fees))] += 1
    assert set(flows) == set(Flow)
    assert flows[Flow.UNKNOWN] < flows.total() * 0.6
    assert len(bars) >= 5
    assert max(bars.values()) < bars.total() * 0.7


def test_a_backlog_waits_from_the_start_and_after_every_block_and_holds_no_whale() -> None:
    world = World(SimulatorSettings(backlog=300), NOW)
    life = Life(world)
    assert len(world.chain.mempool) >= 290
    assert world.truth.whales() == []
    for _ in range(5):
        life.advance(world.now + 30)
        world.mine()
        assert len(world.chain.mempool) >= 290


def test_change_of_an_owner_returns_to_it() -> None:
    world = World(SimulatorSettings(owner_share=1.0, events=0, block_interval=0), NOW)
    Life(world).advance(NOW + 120)
    known = shipped(Network.MAINNET)
    payments = [entry.tx for entry in world.chain.mempool.values() if entry.tx.kind is TxKind.PAYMENT]
    assert len(payments) > 100
    for tx in payments:
        sent = as_sent(tx)
        (payer,) = {owner.label for spent in sent.inputs if (owner := known.owner(spent.prevout)) is not None}
        payees = {owner.label for paid in sent.outputs if (owner := known.owner(paid)) is not None}
        assert payer in payees
