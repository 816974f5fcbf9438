"""Whales, their txids and their events that are not in the log yet, one for each number."""

import hashlib
from collections.abc import Iterable

from whaled.model import Alert, Draft, Flow, Kind, Shape, Source, Status, Update, Whale

# A bitcoin in satoshis.
BTC = 100_000_000
# The time of the tests that have a clock of their own, in Unix seconds, and of events for which they give none.
NOW = 1_800_000_000.0


def txid(number: int) -> str:
    """Return a realistic txid, a different one for each number."""
    return hashlib.sha256(str(number).encode()).hexdigest()


def whale(number: int, btc: float | None = None, *, addresses: Iterable[str] | int = 2) -> Whale:
    """Return a whale with nulls, fractions and non-ASCII text, as real whales have.

    Without `btc` it moves a little more than 150 BTC, a different amount for each number. `addresses` are the addresses
    it pays, or how many of its own.
    """
    value_sat = 150 * BTC + number if btc is None else round(btc * BTC)
    if isinstance(addresses, int):
        addresses = (f"bc1q{number}x{index:034}" for index in range(addresses))
    return Whale(
        Alert(
            transaction_id=txid(number),
            btc_value=value_sat / BTC,
            value_sat=value_sat,
            moved_sat=None if number % 2 else value_sat,
            fee_sat=1_410,
            usd_value=None,
            btc_usd=None,
            fee_rate=5.1 + number / 7,
            vsize=140.25,
            urgency_score=None,
            flow_type=Flow.INFLOW,
            exchange_addresses=(f"bc1q{number}",),
            confidence_score=0.1 + number / 1e6,
            from_labels=(),
            to_labels=("Börse",),
            shape=Shape.TRANSFER,
            reasons=("one recipient",),
            input_count=1,
            output_count=2,
            rbf_enabled=True,
            predicted_confirmation_block=None,
            detection_timestamp="2026-01-01T00:00:00+00:00",
            status=Status.PENDING,
            source=Source.LIVE,
        ),
        tuple(addresses),
    )


def alert_draft(number: int, btc: float | None = None, at: float = NOW, *, addresses: Iterable[str] | int = 2) -> Draft:
    """Return the alert of a whale."""
    return Draft(kind=Kind.ALERT, at=at, whale=whale(number, btc, addresses=addresses))


def update_draft(
    number: int, kind: Kind = Kind.CONFIRMED, *, btc: float | None = None, ref: str = "00block", at: float = NOW
) -> Draft:
    """Return an update about a whale, with `ref` as the hash of its block."""
    about = whale(number, btc)
    update = Update(
        transaction_id=txid(number),
        status=Status(kind.value),
        btc_value=about.alert.btc_value,
        block_height=800_000 if kind is Kind.CONFIRMED else None,
        block_hash=ref,
    )
    return Draft(kind=kind, at=at, whale=about, ref=ref, update=update)


def confirmed_draft(number: int, btc: float | None = None, at: float = NOW + 600) -> Draft:
    """Return the confirmation of a whale, ten minutes after its alert."""
    return update_draft(number, btc=btc, ref="b" * 64, at=at)
