"""The simulator gives what a real backend gave for the like transaction: keys, their order, types, and ugly values."""

from collections.abc import Callable, Iterator
from typing import Any

import aiohttp
import pytest

from kit.recordings import Answer, Json, Recording, like, like_body, recording
from whaled.model import SAT_PER_BTC
from whaled.simulator.frames import ENCODER
from whaled.simulator.market import Seen
from whaled.simulator.scripts import Network
from whaled.simulator.server import Simulator
from whaled.simulator.settings import Mode, SimulatorSettings
from whaled.simulator.transactions import Tx, TxKind
from whaled.simulator.txframes import (
    classified,
    compressed,
    electrs_tx,
    found_tx,
    mempool_tx,
    mined_rate,
    page_tx,
    sigops,
    unrounded,
)

# What is spent is made up here: scripts and signatures have the type, not the value. So have ids and sizes that follow.
MADE_UP = {
    "scriptsig", "scriptsig_asm", "witness", "inner_redeemscript_asm", "inner_witnessscript_asm", "firstSeen", "uid",
    "time", "lastBoosted", "position", "ancestors", "descendants",
}  # fmt: skip
# Differ where a signature is longer or shorter than it is here.
SIZES = {
    "txid", "order", "size", "weight", "vsize", "adjustedVsize", "feePerVsize", "adjustedFeePerVsize", "rate",
    "effectiveFeePerVsize",
}  # fmt: skip
# All inputs are P2WPKH: every byte of these has its place here too, and so the txid is the same.
MINED = (
    "seen1", "seen14", "unseen1", "unseen14", "fee13230", "fee0", "ds_winner", "ds14_winner", "rbf1_b", "cyc_c",
    "pkg_parent", "pkg_child", "zerofee_parent", "odd_outputs",
)  # fmt: skip
PENDING = ("pend1", "pend2", "pend14", "pend_new", "pend_parent", "pend_child", "pend_odd")
REPLACED = ("rbf2_b", "cyc_b", "evict_parent", "evict_child")
# Other inputs: signatures of another length, or scripts that there are none of here.
OTHERS = ("tr_key", "p2pk_spend", "legacy_spend", "p2sh_spend", "legacy_unseen", "p2sh_unseen", "multisig_spend")


def differences(real: object, ours: object, path: str, loose: set[str]) -> Iterator[str]:
    """Where our value is not like the real one: keys and their order, types, and values but those that are made up."""
    if isinstance(real, dict) and isinstance(ours, dict):
        if list(real) != list(ours):
            yield f"{path}: {list(ours)}, really {list(real)}"
        for key in real.keys() & ours.keys() - loose - MADE_UP:
            yield from differences(real[key], ours[key], f"{path}.{key}", loose)
        for key in real.keys() & ours.keys() & MADE_UP:
            if type(real[key]) is not type(ours[key]):
                yield f"{path}.{key}: {ours[key]!r}, really {real[key]!r}"
    elif isinstance(real, list) and isinstance(ours, list) and len(real) == len(ours):
        for place, (each, own) in enumerate(zip(real, ours, strict=True)):
            yield from differences(each, own, f"{path}[{place}]", loose)
    elif type(real) is not type(ours) or real != ours:
        yield f"{path}: {ours!r}, really {real!r}"


def check(real: Json, ours: Json, *, loose: set[str] | None = None) -> None:
    encoded = ENCODER.encode(ours)
    assert list(differences(real, _decoded(encoded), "", loose or set())) == []


def _decoded(encoded: bytes) -> Any:
    return Answer("", "", None, 200, None, encoded.decode()).json


def in_mempool(tx: Tx, real: Json, *, electrs: bool) -> Seen:
    """As the backend has it from its mempool, with the relatives that the recorded one has."""
    seen = Seen(tx, tx.fee, 1, 1, real["effectiveFeePerVsize"], sigops=sigops(tx, prevouts=electrs))
    seen.ancestors = (tx,) * len(real["ancestors"])
    seen.descendants = (tx,) * len(real["descendants"])
    seen.is_replacement = real.get("replacement", False)
    return seen


STREAMED = [
    (mode, label)
    for mode in ("none", "esplora")
    for label in (*MINED, *PENDING, *REPLACED, *OTHERS)
    if label in recording(mode).streamed()
]


def test_most_of_them_were_streamed_in_both_modes() -> None:
    assert len(STREAMED) > 30
    assert {mode for mode, _ in STREAMED} == {"none", "esplora"}


@pytest.mark.parametrize(("mode", "label"), STREAMED)
def test_a_transaction_of_the_mempool_is_written_as_a_backend_writes_it(mode: str, label: str) -> None:
    real = recording(mode).added(label)
    electrs = mode == "esplora"
    ours = mempool_tx(in_mempool(like(label), real, electrs=electrs), electrs=electrs)
    check(real, ours, loose=SIZES if label in OTHERS else set())


@pytest.mark.parametrize("label", [*MINED, *PENDING])
def test_the_txid_is_the_hash_of_the_same_bytes(label: str) -> None:
    tx = like(label)
    assert tx.txid == recording("none").txids[label]
    assert (tx.size, tx.weight) == tuple(recording("none").tx(label).json[key] for key in ("size", "weight"))


@pytest.mark.parametrize("pair", [("ds_loser", "ds_winner"), ("ds14_loser", "ds14_winner")])
@pytest.mark.parametrize("mode", ["none", "esplora"])
def test_the_winner_of_a_double_spend_has_the_fee_that_the_backend_reckons(mode: str, pair: tuple[str, str]) -> None:
    real, is_in_block = recording(mode).replacer(*pair)
    assert is_in_block
    tx = like(pair[1])
    seen = Seen(tx, unrounded(tx.fee), None, None, 0.0, is_replacement=True, is_from_node=True)
    seen.rate = mined_rate(seen)
    ours = mempool_tx(seen, electrs=mode == "esplora")
    check(real | {"status": None}, ours | {"status": None})


def test_the_fee_of_the_issue_is_not_whole() -> None:
    real, _ = recording("none").replacer("ds_loser", "ds_winner")
    assert real["fee"] == unrounded(13230) == 13229.999999999998


@pytest.mark.parametrize("label", [*MINED, *OTHERS])
def test_a_mined_transaction_is_found_as_a_backend_finds_it(label: str) -> None:
    real = recording("none").tx(label).json
    check(real, found_tx(like(label), real["status"]), loose=SIZES if label in OTHERS else set())


@pytest.mark.parametrize("label", PENDING)
def test_a_pending_transaction_is_found_with_its_prevouts(label: str) -> None:
    real = recording("none").tx(label).json
    seen = in_mempool(like(label), real, electrs=False)
    seen.has_prevouts = True
    check(real, mempool_tx(seen, electrs=False))


@pytest.mark.parametrize("label", [*MINED, *PENDING, *OTHERS])
def test_electrs_writes_a_transaction_as_electrs_does(label: str) -> None:
    real = recording("electrs").tx(label).json
    check(real, electrs_tx(like(label), real["status"]), loose=SIZES if label in OTHERS else set())


PAGED = {"fees": ("fee13230", "fee0"), "doublespend14": ("ds14_winner",), "odd3": ("legacy_unseen", "p2sh_unseen")}


@pytest.mark.parametrize(("block", "label"), [(block, label) for block, labels in PAGED.items() for label in labels])
def test_a_page_of_a_block_is_written_as_a_backend_writes_it(block: str, label: str) -> None:
    page = recording("none").block(block, "/txs").json
    real = next(tx for tx in page if tx["txid"] == recording("none").txids[label])
    check(real, page_tx(like(label), real["status"]), loose=SIZES if label in OTHERS else set())


def test_from_13_inputs_on_a_page_gives_no_fee_and_from_14_on_not_all_prevouts() -> None:
    body = recording("none").tx("ds14_winner").json
    thirteen = page_tx(like_with_inputs(body, 13), {"confirmed": False})
    fourteen = page_tx(like_with_inputs(body, 14), {"confirmed": False})
    twelve = page_tx(like_with_inputs(body, 12), {"confirmed": False})
    assert (thirteen["fee"], fourteen["fee"], twelve["fee"] > 0) == (-1, -1, True)
    assert thirteen["effectiveFeePerVsize"] < 0
    assert [vin["prevout"] is None for vin in thirteen["vin"]] == [False] * 13
    assert [vin.get("lazy") for vin in fourteen["vin"]] == [None] * 13 + [True]


def like_with_inputs(body: Json, count: int) -> Tx:
    return like_body(body | {"vin": body["vin"][:count]})


SUMMARISED = {"seen": ("seen1", "seen14"), "unseen": ("unseen1", "unseen14"), "fees": ("fee13230", "fee0")}


@pytest.mark.parametrize(
    ("block", "label"), [(block, label) for block, labels in SUMMARISED.items() for label in labels]
)
def test_a_summary_of_a_block_seen_in_the_mempool_is_the_one_that_the_backend_keeps(block: str, label: str) -> None:
    lines = recording("none").block(block, "/summary").json
    real = next(line for line in lines if line["txid"] == recording("none").txids[label])
    tx = like(label)
    if block == "seen":
        seen = Seen(tx, tx.fee, 1, 1, tx.rate, sigops=sigops(tx, prevouts=False))
    else:
        seen = Seen(tx, unrounded(tx.fee), None, None, 0.0)
    check(real, classified(seen, mined_rate(seen), prevouts=False))


@pytest.mark.parametrize("label", ["ds_winner", "pkg_child", "zerofee_parent"])
def test_a_summary_of_an_older_block_is_read_again(label: str) -> None:
    lines = recording("none").block("doublespend" if label == "ds_winner" else "rbf", "/summary").json
    real = next(line for line in lines if line["txid"] == recording("none").txids[label])
    tx = like(label)
    seen = Seen(tx, tx.fee, None, None, tx.rate)
    check(real, classified(seen, tx.rate, prevouts=True))


def test_projected_blocks_are_written_as_a_backend_writes_them() -> None:
    frames = [
        frame.json["projected-block-transactions"] for frame in recording("none").frames if frame.label == "projected"
    ]
    whole, deltas = frames[0], [frame["delta"] for frame in frames if "delta" in frame]
    tx = like("seen1")
    ours = compressed(Seen(tx, tx.fee, 1, 1, tx.rate), prevouts=False)
    for line in (*whole["blockTransactions"], *deltas[0]["added"]):
        assert [type(each) for each in line[:4]] == [type(each) for each in ours[:4]]
        assert (len(line), round(line[4], 2), type(line[5])) == (len(ours), line[4], int)
    assert {tuple(delta) for delta in deltas} == {("added", "removed", "changed")}


# --- whole answers ---

# Routes that the simulator does not have: it says of them what a backend says of those it does not have.
NOT_SIMULATED = (
    "fullrbf/", "validate-address", "stale-tips", "fee-estimates", "txs/outspends", "address/", "scripthash/",
)  # fmt: skip
# Older than the blocks that are kept.
TOO_OLD = ("block-height/1", "blocks/0", "blocks/150")
# Keys that this version of the node has and an older one has not.
MAY_LACK = {
    "incrementalrelayfee",
    "permitbaremultisig",
    "maxdatacarriersize",
    "limitclustercount",
    "limitclustersize",
    "optimal",
}
# Numbers that are whole by chance, on either side.
EITHER = {"int", "float"}


def asked(name: str) -> list[Answer]:
    """What can be asked of any world: about ids that are none or unknown, and about nothing in particular."""
    found = {
        (answer.path, answer.data): answer
        for answer in recording(name).answers
        if answer.label in ("unknown", "bad", "prevouts", "early", "mined", "pending")
        and not answer.path.startswith(NOT_SIMULATED)
        and answer.path not in TOO_OLD
    }
    return list(found.values())


def shape(value: object) -> object:
    """Keys and types, without values; a list has the shape of its elements, once each."""
    if isinstance(value, dict):
        return {key: shape(each) for key, each in value.items()}
    if isinstance(value, list):
        shapes: list[object] = []
        for each in map(shape, value):
            if each not in shapes:
                shapes.append(each)
        return shapes
    return "number" if type(value).__name__ in EITHER else type(value).__name__


def unlike(real: object, ours: object, path: str = "") -> Iterator[str]:
    if isinstance(real, dict) and isinstance(ours, dict):
        if missing := real.keys() - ours.keys() - MAY_LACK:
            yield f"{path} lacks {missing}"
        if extra := ours.keys() - real.keys():
            yield f"{path} has {extra} too many"
        for key in real.keys() & ours.keys() - {"loadingIndicators"}:
            yield from unlike(real[key], ours[key], f"{path}.{key}")
    elif isinstance(real, list) and isinstance(ours, list):
        if real and ours:
            yield from unlike(real[0], ours[0], f"{path}[]")
    elif real != ours and "NoneType" not in (real, ours):
        yield f"{path} is {ours}, really {real}"


async def ask(session: aiohttp.ClientSession, base: str, answer: Answer) -> Answer:
    url = f"{base}/{answer.path}"
    if answer.data is None:
        request = session.get(url)
    else:
        request = session.post(url, data=answer.data, headers={"Content-Type": "application/json"})
    async with request as response:
        body = (await response.read()).decode()
        return Answer(
            answer.label, answer.path, answer.data, response.status, response.headers.get("Content-Type"), body
        )


def compare(real: Answer, ours: Answer) -> Iterator[str]:
    if (real.status, real.type) != (ours.status, ours.type):
        yield f"{real.path}: {ours.status} {ours.type}, really {real.status} {real.type}"
    elif real.status >= 400 and "DOCTYPE" in real.body and real.data is None:
        if ours.body.replace("&#39;", "'") != real.body:
            yield f"{real.path}: {ours.body}, really {real.body}"
    elif real.type is not None and "json" in real.type:
        if real.status >= 400 and ours.json != real.json:
            yield f"{real.path}: {ours.body}, really {real.body}"
        yield from unlike(shape(real.json), shape(ours.json), real.path)
    elif real.status >= 400 and real.data is None and ours.body != real.body:
        yield f"{real.path}: {ours.body}, really {real.body}"


@pytest.mark.parametrize(
    ("name", "mode", "base"),
    [
        ("none", Mode.NONE, lambda sim: sim.rest_url),
        ("esplora", Mode.ESPLORA, lambda sim: sim.rest_url),
        ("electrs", Mode.ESPLORA, lambda sim: sim.electrs_url),
    ],
)
async def test_the_simulators_responses_match_a_real_backends(
    name: str, mode: Mode, base: Callable[[Simulator], str]
) -> None:
    settings = SimulatorSettings(
        port=0, manual=True, rate=0, block_interval=0, network=Network.REGTEST, start_height=240, mode=mode
    )
    wrong: list[str] = []
    async with Simulator(settings) as sim, aiohttp.ClientSession() as session:
        for kind in (TxKind.PAYMENT, TxKind.OP_RETURN):
            sim.world.transact(kind, 100 * SAT_PER_BTC)
        first = sim.world.pay(100 * SAT_PER_BTC)
        await sim.poll()
        sim.world.replace(first.txid)
        await sim.poll()
        for real in asked(name):
            wrong += compare(real, await ask(session, base(sim), real))
    assert wrong == []


def test_nothing_of_the_machine_is_in_the_recordings() -> None:
    for name in ("none", "none-3.2.1", "esplora", "electrs"):
        found: Recording = recording(name)
        for text in (*(answer.body for answer in found.answers), *(frame.raw for frame in found.frames)):
            assert "/work" not in text
            assert "/root" not in text
