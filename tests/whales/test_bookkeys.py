"""Public keys and scripts in the address book, for outputs that have no address."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from whaled.model import Input, Output, OwnerType, Transaction
from whaled.whales import bookkeys
from whaled.whales.bookkeys import FIELD, Network, canonical, elsewhere, fault_in, of_script
from whaled.whales.labels import AddressBook

# The generator of secp256k1 (SEC 2), and the public key of the first block's reward.
COMPRESSED = "0279be667ef9dcbbac55a06295ce870b07029bfcdb2dce28d959f2815b16f81798"
UNCOMPRESSED = (
    "0479be667ef9dcbbac55a06295ce870b07029bfcdb2dce28d959f2815b16f81798"
    "483ada7726a3c4655da4fbfc0e1108a8fd17b448a68554199c47d08ffb10d4b8"
)
GENESIS = (
    "04678afdb0fe5548271967f1a67130b7105cd6a828e03909a67962e0ea1f61deb6"
    "49f6bc3f4cef38c4f35504e51ec112de5c384df7ba0b8d578a4c702b6bf11d5f"
)
GENESIS_SCRIPT = f"41{GENESIS}ac"
MULTISIG = f"5121{COMPRESSED}41{GENESIS}52ae"
ADDRESS = "bc1qw508d6qejxtdg4y5r3zarvary0c5xw7kv8f3t4"
ADDRESS_SCRIPT = "0014751e76e8199196d454941c45d1b3a323f1433bd6"


def owner(book: str, output: Output) -> str | None:
    found = AddressBook.parse(f"A,{book},own", "book.csv").owner(output)
    return found.label if found is not None else None


@pytest.mark.parametrize("book", [COMPRESSED, UNCOMPRESSED, UNCOMPRESSED.upper(), f"21{COMPRESSED}ac"])
def test_a_public_key_means_both_forms_of_its_output(book: str) -> None:
    assert fault_in(book) is None
    for script in (f"21{COMPRESSED}ac", f"41{UNCOMPRESSED}ac"):
        assert owner(book, Output(1, script)) == "A"
    assert owner(book, Output(1, GENESIS_SCRIPT)) is None
    assert owner(book, Output(1, f"2103{COMPRESSED[2:]}ac")) is None


@pytest.mark.parametrize(
    ("book", "script"), [(GENESIS, GENESIS_SCRIPT), (GENESIS_SCRIPT, GENESIS_SCRIPT), (MULTISIG, MULTISIG)]
)
def test_scripts_without_an_address_have_their_owner(book: str, script: str) -> None:
    assert owner(book, Output(1, script)) == "A"
    assert owner(ADDRESS, Output(1, script)) is None


def test_the_script_of_an_address_means_it_too() -> None:
    assert owner(ADDRESS_SCRIPT, Output(1, ADDRESS_SCRIPT, ADDRESS)) == "A"
    assert owner(ADDRESS_SCRIPT, Output(1, "00" + ADDRESS_SCRIPT[2:-2] + "00", "bc1qother")) is None


def test_outputs_of_a_public_key_are_labelled_without_an_address() -> None:
    book = AddressBook.parse(f"Genesis,{GENESIS},other\nMine,{ADDRESS},own", "book.csv")
    spent = Input("1" * 64, 0, 0, Output(50, GENESIS_SCRIPT))
    paid = Transaction(
        txid="2" * 64, inputs=(spent,), outputs=(Output(49, ADDRESS_SCRIPT, ADDRESS),), fee_sat=1, vsize=1
    )
    involved = book.involved(paid)
    assert (involved.from_labels, involved.to_labels, involved.addresses) == (("Genesis",), ("Mine",), (ADDRESS,))


@pytest.mark.parametrize(
    ("key", "problem"),
    [
        (
            COMPRESSED[:-1] + "1",
            f"public key '{COMPRESSED[:-1]}1' is not a point of the curve: a character is mistyped",
        ),
        (GENESIS[:-1] + "e", "is not a point of the curve: a character is mistyped"),
        ("02" + f"{FIELD + 1:064x}", "is not a point of the curve"),
        (f"21{COMPRESSED[:-1]}1ac", "has a public key that is not a point of the curve: a character is mistyped"),
        (
            COMPRESSED[2:],
            "is 32 bytes: a transaction id, a hash or an x-only key; expected an address, a public key of",
        ),
        (COMPRESSED[:-4], "is not a complete scriptPubKey, and no public key of 33 bytes (02, 03) or 65 bytes (04)"),
        (COMPRESSED[:-1], "has an odd number of hex digits"),
        (ADDRESS_SCRIPT[4:], "is a hash of 20 bytes; expected the address that it makes"),
        (ADDRESS_SCRIPT[:-2], "is not a complete scriptPubKey"),
        ("51" * 401, "has more than 400 bytes"),
        ("0xde0B295669a9FD93d5F28D9Ec85E40f4cb697BAe", "is an address of Ethereum"),
        ("51024e73", None),
        ("4c0161", None),
        ("4d0100", "is not a complete scriptPubKey"),
    ],
)
def test_the_fault_in_a_key_is_named(key: str, problem: str | None) -> None:
    found = fault_in(key)
    assert found is None if problem is None else problem in (found or "")


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        (ADDRESS, Network.MAINNET),
        ("1A1zP1eP5QGefi2DMPTfTL5SLmv7DivfNa", Network.MAINNET),
        ("tb1qw508d6qejxtdg4y5r3zarvary0c5xw7kxpjzsx", Network.TESTNET),
        ("mipcBbFg9gMiCh81Kj8tqqdgoZub1ZJRfn", Network.ANY_TEST),
        ("bcrt1q3ajw4qqsxerj9mckk8gmsthpxfl76660a52t2g", Network.REGTEST),
        (GENESIS, Network.SCRIPT),
        ("51024e73", Network.SCRIPT),
        (MULTISIG, Network.SCRIPT),
        ("5151", Network.SCRIPT),
        ("11111111111111111112D4EA3F7", Network.MAINNET),
        ("510c0102030405060708090a0b0c", Network.SCRIPT),
    ],
)
def test_every_key_is_counted_with_its_network(key: str, expected: Network) -> None:
    assert canonical(key)[1] is expected
    assert AddressBook.parse(f"A,{key},own", "book.csv").owners.networks[expected] == 1


@pytest.mark.parametrize(
    ("backend", "expected"),
    [
        ("mainnet", {"testnet or signet": 2, "a test network": 4}),
        ("testnet4", {"mainnet": 1}),
        ("signet", {"mainnet": 1}),
        ("a signet with block 1 00aa", {"mainnet": 1}),
        ("regtest", {"mainnet": 1, "testnet or signet": 2}),
        ("simulated mainnet", {"testnet or signet": 2, "a test network": 4}),
        ("simulated regtest", {"mainnet": 1, "testnet or signet": 2}),
        ("a network with genesis block 00aa", {}),
        ("", {}),
    ],
)
def test_addresses_that_a_backend_never_shows_are_counted(backend: str, expected: dict[str, int]) -> None:
    counts = {Network.MAINNET: 1, Network.TESTNET: 2, Network.REGTEST: 0, Network.ANY_TEST: 4, Network.SCRIPT: 5}
    assert elsewhere(counts, backend) == expected


@given(st.binary(min_size=2, max_size=80))
def test_any_script_is_refused_or_found_again(raw: bytes) -> None:
    text = raw.hex()
    if fault_in(text) is None and not bookkeys._looks_like_key(text):
        book = AddressBook.parse(f"A,{text},{OwnerType.OWN}", "book.csv")
        assert book.owner(Output(1, text)) is not None
        assert of_script(of_script(text)) == of_script(text)
