"""Whales, their txids and what is logged of them, one for each number."""

import hashlib

from whaled.model import Alert, Draft, Flow, Kind, Shape, Source, Status, Update, Whale

SAT = 100_000_000


def txid(number: int) -> str:
    """Return a realistic txid, a different one for each number."""
    return hashlib.sha256(str(number).encode()).hexdigest()


def whale(number: int, btc: float = 150.0, *, addresses: tuple[str, ...] = ()) -> Whale:
    """Return a whale of `btc` BTC."""
    return Whale(
        Alert(
            transaction_id=txid(number),
            btc_value=btc,
            value_sat=round(btc * SAT),
            moved_sat=None,
            fee_sat=1470,
            usd_value=None,
            btc_usd=None,
            fee_rate=10.5,
            vsize=141,
            urgency_score=None,
            flow_type=Flow.UNKNOWN,
            exchange_addresses=(),
            confidence_score=None,
            from_labels=(),
            to_labels=(),
            shape=Shape.TRANSFER,
            reasons=(),
            input_count=1,
            output_count=2,
            rbf_enabled=False,
            predicted_confirmation_block=None,
            detection_timestamp="2026-01-01T00:00:00+00:00",
            status=Status.PENDING,
            source=Source.LIVE,
        ),
        addresses,
    )


def alert_draft(
    number: int, btc: float = 150.0, at: float = 1_800_000_000.0, *, addresses: tuple[str, ...] = ()
) -> Draft:
    """Return an alert that is not in the log yet."""
    return Draft(kind=Kind.ALERT, at=at, whale=whale(number, btc, addresses=addresses))


def confirmed_draft(number: int, btc: float = 150.0, at: float = 1_800_000_600.0) -> Draft:
    """Return the confirmation of a whale."""
    update = Update(transaction_id=txid(number), status=Status.CONFIRMED, btc_value=btc, block_height=800_000)
    return Draft(kind=Kind.CONFIRMED, at=at, whale=whale(number, btc), ref="b" * 64, update=update)
