"""Small transactions, real addresses, and what detection makes of them."""

from collections.abc import Sequence

from hypothesis import settings

from kit.whales import NOW, txid
from whaled.model import Input, Market, Output, Source, Transaction, Whale
from whaled.whales.detect import Rules, assess
from whaled.whales.labels import AddressBook

# Without a deadline, since a busy machine must not fail a test of values.
relaxed = settings(deadline=None)


# One of each sort: p2pkh, p2sh, p2wpkh, p2wsh, p2tr of mainnet (the examples of BIP 13, 173, 350 and block 0).
ADDRESSES = (
    "1A1zP1eP5QGefi2DMPTfTL5SLmv7DivfNa",
    "3P14159f73E4gFr7JterCCQh9QjiTjiZrG",
    "bc1qw508d6qejxtdg4y5r3zarvary0c5xw7kv8f3t4",
    "bc1qrp33g0q5c5txsp9arysrx4k6zdkfs4nce4xj0gdcccefvpysxf3qccfmv3",
    "bc1p0xlxvlhemja6c4dqv22uapctqupfhlxm9h8z3k2e72q4k9hcz7vqzk5jj0",
)


def output(value: int, script: str = "0014aa", address: str | None = None) -> Output:
    """Return an output. Scripts are only compared, so a short one is enough."""
    return Output(value, script, address)


def spent(
    value: int | None = None, script: str = "0014bb", address: str | None = None, *, sequence: int = 0xFFFFFFFF
) -> Input:
    """Return an input; without a value, the output it spends is unknown."""
    return Input(txid(7), 0, sequence, Output(value, script, address) if value is not None else None)


def transaction(
    outputs: Sequence[Output],
    inputs: Sequence[Input] = (),
    *,
    number: int = 1,
    fee_sat: int | None = 1470,
    fee_rate: float | None = 10.5,
    confirmed: bool = False,
) -> Transaction:
    """Return a transaction; without `inputs` it has one unknown input."""
    return Transaction(
        txid=txid(number),
        inputs=tuple(inputs) or (spent(),),
        outputs=tuple(outputs),
        fee_sat=fee_sat,
        vsize=141.0,
        fee_rate=fee_rate,
        is_confirmed=confirmed,
    )


def detected(found: Transaction, *, tip_height: int | None = None) -> Whale:
    """Return the whale that detection makes of a transaction at NOW, predicted for the block after `tip_height`."""
    whale = assess(
        found,
        rules=Rules(0),
        book=AddressBook(),
        market=Market(projected=(), tip_height=tip_height),
        now=NOW,
        source=Source.LIVE,
    )
    assert whale is not None
    return whale
