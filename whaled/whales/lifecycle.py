"""The lifecycle of a whale: pending -> confirmed | replaced | dropped -> pending again. Pure.

Each step is a Draft; the event log accepts (txid, kind, ref) once, so repeating a step is harmless.
"""

from datetime import datetime

from msgspec.structs import replace

from whaled.model import Alert, Block, Draft, Kind, Status, Update, Whale

# By consensus a miner's clock may be this far ahead. A block older than this was mined while whaled was not watching;
# only then is the block's own time more accurate than the time of its receipt.
BLOCK_CLOCK_S = 7200.0


def alerted(whale: Whale, now: float) -> Draft:
    """Return the event for a newly detected whale."""
    return Draft(kind=Kind.ALERT, at=now, whale=whale)


def replacing(whale: Whale, replaced: str | None) -> Whale:
    """Return the whale with `replaces` set to `replaced`, unchanged if that is None."""
    return whale if replaced is None else replace(whale, alert=replace(whale.alert, replaces=replaced))


def confirmed(whale: Whale, block: Block, now: float) -> Draft:
    """Return the event for a whale in a block. `blocks_off` is positive if it took longer than predicted."""
    alert = whale.alert
    predicted = alert.predicted_confirmation_block
    update = Update(
        transaction_id=alert.transaction_id,
        status=Status.CONFIRMED,
        btc_value=alert.btc_value,
        block_height=block.height,
        block_hash=block.hash,
        seconds_to_confirmation=_waited_s(alert, block, now),
        predicted_confirmation_block=predicted,
        blocks_off=block.height - predicted if predicted is not None else None,
    )
    return Draft(kind=Kind.CONFIRMED, at=now, whale=whale, ref=block.hash, update=update)


def replaced(whale: Whale, by: str, now: float) -> Draft:
    """Return the event for a whale whose inputs another transaction spends. A later replacer makes a further event."""
    update = Update(
        transaction_id=whale.alert.transaction_id,
        status=Status.REPLACED,
        btc_value=whale.alert.btc_value,
        replaced_by=by,
    )
    return Draft(kind=Kind.REPLACED, at=now, whale=whale, ref=by, update=update)


def dropped(whale: Whale, now: float) -> Draft:
    """Return the event for a whale that left the mempool and is in no block.

    The caller must have waited for the grace period and queried the backend.
    """
    update = Update(transaction_id=whale.alert.transaction_id, status=Status.DROPPED, btc_value=whale.alert.btc_value)
    return Draft(kind=Kind.DROPPED, at=now, whale=whale, update=update)


def pending_again(whale: Whale, block_hash: str, now: float) -> Draft:
    """Return the event for a whale that is pending again, because its block `block_hash` is no longer in the chain."""
    update = Update(transaction_id=whale.alert.transaction_id, status=Status.PENDING, btc_value=whale.alert.btc_value)
    return Draft(kind=Kind.PENDING, at=now, whale=whale, ref=block_hash, update=update)


def detected_at(alert: Alert) -> float:
    """Return the time of detection of a whale, in Unix seconds."""
    return datetime.fromisoformat(alert.detection_timestamp).timestamp()


def _waited_s(alert: Alert, block: Block, now: float) -> float | None:
    """Return the seconds from detection to confirmation, None for a whale that was confirmed when first seen."""
    if alert.status is Status.CONFIRMED:
        return None
    detected = detected_at(alert)
    mined = float(block.timestamp) if now - block.timestamp > BLOCK_CLOCK_S else now
    return round(max(0.0, mined - detected), 3)
