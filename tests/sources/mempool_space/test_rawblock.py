"""Blocks of a real node (Bitcoin Core, regtest) as it serialises them, and bytes that are no block."""

import gzip
import json
from typing import Any

import pytest

from kit.paths import DATA
from whaled.addresses import address_of, network_of
from whaled.sources.mempool_space.rawblock import SerialError, spenders_in, transaction_in

RECORDED = DATA / "bitcoind-blocks.json.gz"
BLOCKS: list[dict[str, Any]] = json.loads(gzip.decompress(RECORDED.read_bytes()))
SENT = DATA / "bitcoind-transactions.json.gz"
TRANSACTIONS: list[dict[str, Any]] = json.loads(gzip.decompress(SENT.read_bytes()))
NOWHERE = f"{'ab' * 32}:0"


def expected(block: dict[str, Any]) -> dict[str, str]:
    """What the node itself decoded: the spender of each outpoint."""
    return {outpoint: txid for txid, spent in block["spends"] for outpoint in spent}


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: f"{len(block['spends'])} transactions")
def test_every_spender_of_a_block_is_found(block: dict[str, Any]) -> None:
    spenders = expected(block)
    assert spenders_in(bytes.fromhex(block["raw"]), [*spenders, NOWHERE]) == spenders


def test_the_recorded_blocks_have_segregated_witnesses_and_a_hundred_inputs() -> None:
    assert max(len(expected(block)) for block in BLOCKS) > 100
    assert any("0001" in block["raw"] for block in BLOCKS)


def test_invalid_outpoints_are_in_no_block() -> None:
    raw = bytes.fromhex(BLOCKS[-1]["raw"])
    assert spenders_in(raw, ["", "no outpoint", "zz:0", f"{'ab' * 32}:-1", f"{'ab' * 32}:{2**32}", NOWHERE]) == {}


@pytest.mark.parametrize("cut", [1, 40, 400])
def test_a_truncated_block_is_refused(cut: int) -> None:
    block = BLOCKS[-1]
    (first, *_) = expected(block)
    with pytest.raises(SerialError):
        spenders_in(bytes.fromhex(block["raw"])[:-cut], [first])


def test_counts_that_cannot_be_are_refused_before_anything_is_read() -> None:
    block = BLOCKS[-1]
    (first, *_) = expected(block)
    raw = bytes.fromhex(block["raw"])
    for count in (b"\xfe\xff\xff\xff\xff", b"\xff" * 9):
        with pytest.raises(SerialError, match="transactions in"):
            spenders_in(raw[:80] + count + raw[81:], [first])


# --- transactions ---


@pytest.mark.parametrize("sent", TRANSACTIONS, ids=lambda sent: str(sent["txid"][:8]))
def test_a_transaction_is_read_as_the_node_reads_it(sent: dict[str, Any]) -> None:
    raw = transaction_in(bytes.fromhex(sent["hex"]))
    assert (raw.txid, raw.vsize) == (sent["txid"], sent["vsize"])
    assert [list(each) for each in raw.outputs] == [[value, script] for value, script, _ in sent["outputs"]]
    if sent["inputs"][0][0] != "0" * 64:
        assert [list(each) for each in raw.inputs] == sent["inputs"]


def test_a_script_has_the_same_address_as_in_the_node() -> None:
    found = {address: script for sent in TRANSACTIONS for _, script, address in sent["outputs"]}
    network = network_of(next(address for address in found if address))
    assert network is not None
    assert len(found) > 20
    for address, script in found.items():
        assert address_of(script, network) == address


def test_bytes_before_or_behind_a_transaction_make_it_none() -> None:
    raw = bytes.fromhex(TRANSACTIONS[0]["hex"])
    for odd in (b"", raw[:-1], raw + b"\0", b"\0" + raw, bytes(100), b"\xff" * 100):
        with pytest.raises(SerialError):
            transaction_in(odd)
