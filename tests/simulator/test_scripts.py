"""Scripts, addresses and sizes are what Bitcoin's rules say."""

from random import Random

import pytest

from whaled.addresses import base58check, segwit_address
from whaled.simulator.scripts import SPENDABLE, Network, Scripts, ScriptType, spend
from whaled.simulator.settings import SimulatorSettings
from whaled.simulator.transactions import Tx, TxKind
from whaled.simulator.txframes import core_tx, status_of
from whaled.simulator.world import World


@pytest.mark.parametrize(
    ("prefix", "script", "address"),
    [
        # BIP 173 and BIP 350 give these; the last is from the recording of a real backend.
        ("bc", "0014751e76e8199196d454941c45d1b3a323f1433bd6", "bc1qw508d6qejxtdg4y5r3zarvary0c5xw7kv8f3t4"),
        (
            "bc",
            "512079be667ef9dcbbac55a06295ce870b07029bfcdb2dce28d959f2815b16f81798",
            "bc1p0xlxvlhemja6c4dqv22uapctqupfhlxm9h8z3k2e72q4k9hcz7vqzk5jj0",
        ),
        ("bc", "51024e73", "bc1pfeessrawgf"),
        (
            "bcrt",
            "00201863143c14c5166804bd19203356da136c985678cd4d27a1b8c6329604903262",
            "bcrt1qrp33g0q5c5txsp9arysrx4k6zdkfs4nce4xj0gdcccefvpysxf3qzf4jry",
        ),
    ],
)
def test_segwit_addresses_follow_the_bips(prefix: str, script: str, address: str) -> None:
    opcode = int(script[:2], 16)
    assert segwit_address(prefix, opcode - 0x50 if opcode else 0, bytes.fromhex(script[4:])) == address


@pytest.mark.parametrize(
    ("version", "digest", "address"),
    [
        (0x6F, "a748373eb3c1c9ea6aea93da83bd31665ef45c87", "mvmTejNyHqL2a5jRmyfh5kbz9MPBxZvfki"),
        (0xC4, "e82593b73e84c69830422a1a4d6606b65177c916", "2NEQhmghr48mx9cZvk5PZAixRAjNqqBFkfL"),
        (0x00, "62e907b15cbf27d5425399ebf6f0fb50ebb88f18", "1A1zP1eP5QGefi2DMPTfTL5SLmv7DivfNa"),
    ],
)
def test_base58_addresses_follow_the_recording_and_the_genesis_block(version: int, digest: str, address: str) -> None:
    assert base58check(version, bytes.fromhex(digest)) == address


@pytest.mark.parametrize("kind", list(ScriptType))
@pytest.mark.parametrize("network", list(Network))
def test_each_script_type_has_an_address_if_one_is_defined(network: Network, kind: ScriptType) -> None:
    script = Scripts(network, Random(3)).make(kind)
    assert script.type is kind
    bare = {ScriptType.P2PK, ScriptType.OP_RETURN, ScriptType.MULTISIG, ScriptType.NONSTANDARD}
    assert (script.address == "") == (kind in bare)
    bytes.fromhex(script.hex)


@pytest.mark.parametrize("kind", list(SPENDABLE))
def test_signature_data_has_the_documented_sizes(kind: ScriptType) -> None:
    data = spend(kind, "salt")
    assert len(data.scriptsig) // 2 == SPENDABLE[kind].scriptsig
    witness = 1 + sum(1 + len(item) // 2 for item in data.witness) if data.witness else 0
    assert witness == SPENDABLE[kind].witness
    assert data == spend(kind, "salt") != spend(kind, "pepper")


def serialised(tx: Tx) -> tuple[int, int]:
    """(size, weight) counted byte by byte from the frame a backend would send."""
    frame = core_tx(tx, tx.fee, status_of(None), prevouts=False)

    def count(items: int) -> int:
        return 1 if items < 253 else 3

    base = 4 + count(len(frame["vin"])) + count(len(frame["vout"])) + 4
    witness = 0
    for vin in frame["vin"]:
        base += 32 + 4 + 1 + len(vin["scriptsig"]) // 2 + 4
        witness += 1 + sum(1 + len(item) // 2 for item in vin["witness"])
    for vout in frame["vout"]:
        base += 8 + 1 + len(vout["scriptpubkey"]) // 2
    witness = 0 if witness == len(frame["vin"]) else witness + 2
    return base + witness, base * 4 + witness


@pytest.mark.parametrize("kind", [kind for kind in TxKind if kind.value != "coinbase"][:9])
def test_size_and_weight_are_those_of_the_parts(kind: TxKind) -> None:
    world = World(SimulatorSettings(rate=0), 1e9)
    for _ in range(20):
        tx = world.transact(kind, 10_000_000_000)
        assert serialised(tx) == (tx.size, tx.weight)


def test_the_recorded_one_input_two_output_payment_has_the_same_size_here() -> None:
    tx = World(SimulatorSettings(rate=0), 1e9).wallets.exact(19_999_998_530, 10.0, 1e9)
    if {payment.script.type for payment in tx.outputs} == {ScriptType.P2WPKH}:
        assert (tx.size, tx.weight) == (222, 561)
    assert serialised(tx) == (tx.size, tx.weight)
