"""The address book: what it takes, what it refuses, and what it says of a transaction."""

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kit.recordings import recorded_frames
from kit.transactions import ADDRESSES, relaxed, spent, transaction
from kit.whales import BTC
from whaled.addresses import base58check, fault_in
from whaled.errors import ConfigError
from whaled.model import NULL_TXID, Flow, Input, Output, OwnerType, Transaction
from whaled.sources.mempool_space.dialect import decode
from whaled.whales.labels import AddressBook
from whaled.whales.owners import Owner

HOT, COLD, RIVAL, POOL, VAULT = ADDRESSES
BOOK = AddressBook.parse(
    f"""label,address,type
Kraken,{HOT},exchange
Kraken,{COLD},exchange
Bitfinex,{RIVAL},exchange
F2Pool,{POOL},miner
Trust,{VAULT},custodian
""",
    "book.csv",
)
NOBODY, SOMEBODY = "bc1qnobody", "bc1qsomebody"


def pay(*outputs: tuple[str, float]) -> list[Output]:
    """Outputs: address and BTC."""
    return [Output(round(btc * BTC), f"script of {address}", address) for address, btc in outputs]


def take(*inputs: tuple[str, float]) -> list[Input]:
    """Inputs: address and BTC."""
    return [spent(round(btc * BTC), f"script of {address}", address) for address, btc in inputs]


def moves(inputs: Sequence[tuple[str, float]], outputs: Sequence[tuple[str, float]]) -> Transaction:
    """A transaction between addresses."""
    return transaction(pay(*outputs), take(*inputs))


def faults(text: str) -> list[str]:
    """What a book is refused for."""
    with pytest.raises(ConfigError) as refused:
        AddressBook.parse(text, "book.csv")
    assert {fault.source for fault in refused.value.faults} == {"book.csv"}
    return [f"{fault.where}: {fault.problem}" for fault in refused.value.faults]


# --- addresses ---


@pytest.mark.parametrize("address", ADDRESSES)
def test_addresses_of_every_sort_are_right_and_any_mistyped_character_is_noticed(address: str) -> None:
    assert fault_in(address) is None
    for index in range(len(address)):
        wrong = "q" if address[index] != "q" else "p"
        assert fault_in(address[:index] + wrong + address[index + 1 :]) is not None


def test_every_address_a_backend_sent_is_right() -> None:
    # The first 40 frames hold every script type; the burst behind them is one type, thousands of times.
    seen: set[str] = set()
    for raw in recorded_frames()[:40]:
        change = decode(raw).delta
        found = change.at_least(0) if change is not None else []
        seen.update(output.address for entry in found for output in entry.outputs if output.address)
    assert len(seen) > 100
    assert [address for address in seen if fault_in(address)] == []


@pytest.mark.parametrize(
    ("address", "problem"),
    [
        ("", "not a Bitcoin address"),
        ("0xde0B295669a9FD93d5F28D9Ec85E40f4cb697BAe", "is an address of Ethereum or another EVM chain"),
        ("ltc1qw508d6qejxtdg4y5r3zarvary0c5xw7kgmn4n9", "is an address of Litecoin"),
        ("bitcoincash:qzf60xrhzh9eergtrtgrtjz2pzt5qkde0es5wpyewtqc", "is an address of Bitcoin Cash"),
        ("bitcoin:bc1qw508d6qejxtdg4y5r3zarvary0c5xw7kv8f3t4", "is a payment link (BIP 21): write the address alone"),
        ("\u200bbc1qw508d6qejxtdg4y5r3zarvary0c5xw7kv8f3t4", "no address has: U+200B ZERO WIDTH SPACE"),
        ("xpub661MyMwAqRbcFtXgS5sYJABqqG9YLmC4Q1Rdap9gSE8Nq", "is an extended public key"),
        ("1A1zP1eP5QGefi2DMPTfTL5SLmv7DivfNb", "checksum"),
        ("1A1zP1eP5QGefi2DMPTfTL5SLmv7Divf0a", "'0'"),
        ("bc1qw508d6qejxtdg4y5r3zarvary0c5xw7kv8f3t5", "checksum"),
        ("bc1qW508d6qejxtdg4y5r3zarvary0c5xw7kv8f3t4", "capital"),
        ("bc1qw508d6qejxtdg4y5r3zarvary0c5xw7kv8f3tb", "'b'"),
        ("bc1p0xlxvlhemja6c4dqv22uapctqupfhlxm9h8z3k2e72q4k9hcz7vqh2y7hd", "checksum"),  # bech32 where bech32m is due
        ("BC1QW508D6QEJXTDG4Y5R3ZARVARY0C5XW7KV8F3T4", None),
        ("tb1qw508d6qejxtdg4y5r3zarvary0c5xw7kxpjzsx", None),
        ("mipcBbFg9gMiCh81Kj8tqqdgoZub1ZJRfn", None),
        ("LVuDpNCSSj6pQ7t9Pv6d6sUkLKoqDEVUnJ", "is an address of Litecoin"),
    ],
)
def test_the_fault_in_an_address_is_described(address: str, problem: str | None) -> None:
    said = fault_in(address)
    assert said is None if problem is None else problem in (said or "")


@relaxed
@given(st.text(max_size=100))
def test_no_text_makes_the_address_check_fail_otherwise(text: str) -> None:
    assert fault_in(text) is None or fault_in(text)


# --- the book ---


def test_a_book_may_have_comments_blank_lines_quotes_a_byte_order_mark_and_capitals() -> None:
    text = f'\ufefflabel,address,type\n\n# "cold wallets\n"Bank, the",{POOL.upper()}, Other\nBank,{HOT},exchange\n'
    book = AddressBook.parse(text, "book.csv")
    assert len(book.owners) == 2
    assert book.owners.get(POOL) == Owner("Bank, the", OwnerType.OTHER)
    assert book.owners.get(HOT) == Owner("Bank", OwnerType.EXCHANGE)


def test_the_line_with_the_columns_is_not_needed_and_the_same_line_twice_is_no_fault() -> None:
    assert len(AddressBook.parse(f"Kraken,{HOT},exchange\nKraken,{HOT},exchange\n", "book.csv").owners) == 1


def test_an_empty_book_is_a_book() -> None:
    assert AddressBook.parse("", "book.csv") == AddressBook()


def test_every_fault_is_reported_with_its_line_and_the_allowed_values() -> None:
    text = f"""label,address,type
Kraken,{HOT},exchange
Kraken,{HOT[:-1]}b,exchange
Bitfinex,{HOT},exchange
Kraken,{COLD},broker
Kraken,{COLD}
,{COLD},exchange
"Kraken,{COLD},exchange
Kraken,{COLD},exchange
"""
    assert faults(text) == [
        f"line 3: address '{HOT[:-1]}b' has a wrong checksum: a character is mistyped",
        "line 5: type must be one of exchange, custodian, service, miner, fund, government, own, other; found 'broker'",
        "line 6: expected 3 columns, label,address,type, found 2; put a label with a comma in quotes",
        "line 7: label must be 1 to 64 printable characters, found ''",
        (
            "line 8: a quote opens and does not close in this line: quotes in a label are doubled, and a label has no "
            "line break"
        ),
    ]


@relaxed
@given(st.text(max_size=200))
def test_any_text_is_a_book_or_refused_with_lines(text: str) -> None:
    try:
        assert len(AddressBook.parse(text, "book.csv").owners) <= len(text.splitlines())
    except ConfigError as error:
        places = {fault.where.split()[0] for fault in error.faults}
    else:
        places = {"line"}
    assert places == {"line"}


# --- several labels of one address ---

SEVERAL = AddressBook.parse(
    f"Kraken,{HOT},exchange\nKraken 8,{HOT},exchange\nHacker,{HOT},other\nKraken,{COLD},exchange\nPool,{COLD},miner\n",
    "book.csv",
)


def test_the_first_label_decides_and_the_others_are_named() -> None:
    found = SEVERAL.involved(moves([(HOT, 100), (NOBODY, 1)], [(COLD, 100), (HOT, 1)]))
    assert (found.flow, found.from_labels, found.to_labels) == (Flow.INTERNAL, ("Kraken",), ("Kraken",))
    assert (found.from_other_labels, found.to_other_labels) == (("Kraken 8", "Hacker"), ("Pool",))
    assert found.addresses == (HOT, COLD)
    alone = BOOK.involved(moves([(HOT, 100)], [(COLD, 100)]))
    assert (alone.from_other_labels, alone.to_other_labels) == ((), ())


def test_a_label_that_is_the_first_of_another_address_is_not_repeated() -> None:
    book = AddressBook.parse(f"A,{HOT},own\nB,{HOT},own\nB,{COLD},own\n", "book.csv")
    found = book.involved(moves([(HOT, 1), (COLD, 1)], [(NOBODY, 2)]))
    assert (found.from_labels, found.from_other_labels) == (("A", "B"), ())


def test_other_labels_are_bounded() -> None:
    paid = [base58check(0, number.to_bytes(20)) for number in range(20)]
    lines = [f"{name} {number},{address},own" for number, address in enumerate(paid) for name in "ABCD"]
    found = AddressBook.parse("\n".join(lines), "b").involved(moves([(NOBODY, 20)], [(address, 1) for address in paid]))
    assert len(found.to_labels) == 20
    assert found.to_other_labels == tuple(f"{name} {number}" for number in range(11) for name in "BCD")[:32]


# --- flow ---


@pytest.mark.parametrize(
    ("inputs", "outputs", "flow", "flow_btc", "confidence"),
    [
        ([(NOBODY, 100)], [(HOT, 100)], Flow.INFLOW, 100, 0.8),
        ([(NOBODY, 100)], [(HOT, 25), (SOMEBODY, 75)], Flow.INFLOW, 25, 0.2),
        ([(NOBODY, 100)], [(HOT, 25), (NOBODY, 75)], Flow.INFLOW, 25, 0.8),  # the rest is change, proven
        ([(NOBODY, 100)], [(HOT, 25), (VAULT, 5), (SOMEBODY, 70)], Flow.INFLOW, 30, 0.24),
        ([(POOL, 100)], [(VAULT, 100)], Flow.INFLOW, 100, 1.0),  # labelled, but no exchange
        ([(HOT, 100)], [(NOBODY, 100)], Flow.OUTFLOW, 100, 0.8),
        ([(HOT, 100)], [(NOBODY, 10), (COLD, 90)], Flow.OUTFLOW, 10, 0.8),  # change to another address of the payer
        ([(HOT, 500)], [(NOBODY, 5), (SOMEBODY, 3), (HOT, 492)], Flow.OUTFLOW, 8, 0.8),  # a batch, the change proven
        ([(HOT, 50), (SOMEBODY, 50)], [(NOBODY, 100)], Flow.OUTFLOW, 50, 0.4),  # the other half is not the exchange's
        ([(HOT, 50), (SOMEBODY, 50)], [(HOT, 40), (NOBODY, 60)], Flow.OUTFLOW, 10, 0.4),  # it gives 10 net
        ([(HOT, 100)], [(NOBODY, 75), (RIVAL, 25)], Flow.OUTFLOW, 75, 0.75),
        ([(HOT, 100)], [(RIVAL, 100)], Flow.INTERNAL, 100, 1.0),
        ([(HOT, 100)], [(RIVAL, 75), (NOBODY, 25)], Flow.INTERNAL, 75, 0.75),
        ([(HOT, 100)], [(COLD, 100)], Flow.INTERNAL, 100, 1.0),
        ([(HOT, 100)], [(COLD, 60), (HOT, 40)], Flow.INTERNAL, 60, 1.0),
        ([(HOT, 100)], [(HOT, 100)], Flow.INTERNAL, 0, 1.0),
        ([(POOL, 100)], [(POOL, 100)], Flow.INTERNAL, 0, 1.0),
        ([(POOL, 100)], [(NOBODY, 100)], Flow.UNKNOWN, None, None),
        ([(NOBODY, 100)], [(POOL, 100)], Flow.UNKNOWN, None, None),
        ([(NOBODY, 100)], [(SOMEBODY, 100)], Flow.UNKNOWN, None, None),
        ([(NOBODY, 100)], [(NOBODY, 100)], Flow.UNKNOWN, None, None),
    ],
)
def test_flow_follows_the_labels(
    inputs: list[tuple[str, float]],
    outputs: list[tuple[str, float]],
    flow: Flow,
    flow_btc: float | None,
    confidence: float | None,
) -> None:
    found = BOOK.involved(moves(inputs, outputs))
    flow_sat = None if flow_btc is None else round(flow_btc * BTC)
    assert (found.flow, found.flow_sat, found.confidence) == (flow, flow_sat, confidence)


@pytest.mark.parametrize(
    ("inputs", "outputs", "share", "flow"),
    [
        # At the share and just below it, of what leaves.
        ([(NOBODY, 100)], [(HOT, 10), (SOMEBODY, 90)], 0.1, Flow.INFLOW),
        ([(NOBODY, 100)], [(HOT, 9.99999999), (SOMEBODY, 90.00000001)], 0.1, Flow.UNKNOWN),
        ([(NOBODY, 100)], [(HOT, 9.99999999), (SOMEBODY, 90.00000001)], 0.05, Flow.INFLOW),
        # Dust to an exchange, with change that nobody can tell and with change that is proven.
        ([(NOBODY, 500)], [(HOT, 0.00000546), (SOMEBODY, 499.9)], 0.1, Flow.UNKNOWN),
        ([(NOBODY, 500)], [(HOT, 0.00000546), (NOBODY, 499.9)], 0.1, Flow.UNKNOWN),
        ([(NOBODY, 500)], [(HOT, 0.00000546), (NOBODY, 499.9)], 0, Flow.INFLOW),
        ([(NOBODY, 500)], [(HOT, 5), (NOBODY, 495)], 0.1, Flow.INFLOW),
        ([(NOBODY, 500)], [(HOT, 4.9), (NOBODY, 495.1)], 0.1, Flow.UNKNOWN),
        # A crumb of the inputs is the exchange's.
        ([(HOT, 1), (SOMEBODY, 499)], [(NOBODY, 500)], 0.1, Flow.UNKNOWN),
        ([(HOT, 1), (SOMEBODY, 499)], [(RIVAL, 400), (NOBODY, 100)], 0.1, Flow.UNKNOWN),
        ([(HOT, 1), (SOMEBODY, 499)], [(HOT, 500)], 0.1, Flow.UNKNOWN),
        ([(HOT, 100), (SOMEBODY, 400)], [(NOBODY, 500)], 0.1, Flow.OUTFLOW),
        # It is paid more than it pays: a payjoin with an exchange.
        ([(HOT, 30), (SOMEBODY, 100)], [(HOT, 60), (NOBODY, 70)], 0.1, Flow.UNKNOWN),
        # A crumb leaves and the rest stays.
        ([(HOT, 500)], [(NOBODY, 0.5), (COLD, 499.5)], 0.1, Flow.INTERNAL),
        ([(HOT, 500)], [(NOBODY, 0.5), (COLD, 499.5)], 0, Flow.OUTFLOW),
        ([(HOT, 500)], [(RIVAL, 0.5), (COLD, 499.5)], 0.1, Flow.INTERNAL),
        # A crumb of an exchange's payment goes to another one.
        ([(HOT, 500)], [(RIVAL, 0.5), (NOBODY, 499.5)], 0.1, Flow.OUTFLOW),
    ],
)
def test_a_crumb_is_no_flow(
    inputs: list[tuple[str, float]], outputs: list[tuple[str, float]], share: float, flow: Flow
) -> None:
    assert BOOK.involved(moves(inputs, outputs), min_share=share).flow is flow


def test_anchor_and_burnt_outputs_are_no_part_of_the_flow() -> None:
    anchor = Output(240, "51024e73", "bc1pfeessrawgf")
    burnt = Output(50 * BTC, "6a04", None)
    found = BOOK.involved(transaction([*pay((COLD, 100)), anchor, burnt], take((HOT, 151))))
    assert (found.flow, found.flow_sat) == (Flow.INTERNAL, 100 * BTC)


def test_one_payer_is_one_label_on_every_input() -> None:
    assert BOOK.is_one_payer(moves([(HOT, 1), (COLD, 1)], [(NOBODY, 2)]))
    assert not BOOK.is_one_payer(moves([(HOT, 1), (RIVAL, 1)], [(NOBODY, 2)]))
    assert not BOOK.is_one_payer(moves([(HOT, 1), (NOBODY, 1)], [(NOBODY, 2)]))
    assert not BOOK.is_one_payer(transaction(pay((NOBODY, 1)), [*take((HOT, 1)), spent()]))
    assert not AddressBook().is_one_payer(moves([(NOBODY, 1)], [(NOBODY, 1)]))


def test_with_unknown_inputs_the_flow_is_unknown_but_the_labels_are_given() -> None:
    outputs = pay((HOT, 99), (NOBODY, 1))
    for inputs in ([spent()], [*take((NOBODY, 50)), spent()]):
        found = BOOK.involved(transaction(outputs, inputs))
        assert (found.flow, found.confidence) == (Flow.UNKNOWN, None)
        assert (found.from_labels, found.to_labels, found.addresses) == ((), ("Kraken",), (HOT,))


def test_labels_come_once_and_change_is_not_among_the_paid() -> None:
    found = BOOK.involved(moves([(HOT, 50), (COLD, 50)], [(RIVAL, 60), (VAULT, 10), (RIVAL, 5), (HOT, 25)]))
    assert found.from_labels == ("Kraken",)
    assert found.to_labels == ("Bitfinex", "Trust")
    assert found.addresses == (HOT, COLD, RIVAL, VAULT)


def test_newly_minted_coins_have_an_unknown_flow() -> None:
    minted = transaction(pay((HOT, 100)), [Input(NULL_TXID, 0xFFFFFFFF, 0xFFFFFFFF)])
    assert BOOK.involved(minted).flow is Flow.UNKNOWN


def test_without_a_book_everything_is_unknown() -> None:
    found = AddressBook().involved(moves([(HOT, 100)], [(RIVAL, 100)]))
    assert (found.flow, found.confidence, found.from_labels, found.addresses) == (Flow.UNKNOWN, None, (), ())


PARTIES = st.lists(
    st.tuples(st.sampled_from([*ADDRESSES, NOBODY, SOMEBODY]), st.sampled_from([0.0, 0.5, 1.0, 100.0])),
    min_size=1,
    max_size=6,
)


@relaxed
@given(PARTIES, PARTIES)
def test_confidence_is_between_0_and_1_and_there_is_one_exactly_with_a_flow(
    inputs: list[tuple[str, float]], outputs: list[tuple[str, float]]
) -> None:
    found = BOOK.involved(moves(inputs, outputs))
    assert (found.confidence is None) == (found.flow_sat is None) == (found.flow is Flow.UNKNOWN)
    assert 0 <= (found.flow_sat or 0) <= sum(round(btc * BTC) for _, btc in outputs)
    if found.confidence is not None:
        assert 0 <= found.confidence <= 1
