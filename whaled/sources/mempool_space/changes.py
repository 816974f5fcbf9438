"""Translation of the backend's frames into the changes that they mean. Pure."""

from whaled.source import Continuity, Decoded, MempoolChange, Quote
from whaled.sources.mempool_space.canary_frame import canary_frame
from whaled.sources.mempool_space.dialect import Frame, decode

NOTHING = Decoded()


def change_of(
    frame: Frame, *, received_at: float, received_monotonic: float, continuity: Continuity | None = None
) -> MempoolChange:
    """Return the change that a frame means. `continuity` is that of its delta, None without one."""
    delta = frame.delta
    return MempoolChange(
        received_at=received_at,
        received_monotonic=received_monotonic,
        continuity=continuity,
        entered=NOTHING if delta is None else delta,
        removed=() if delta is None else delta.removed,
        mined=() if delta is None else delta.mined,
        replaced=() if delta is None else delta.replaced,
        snapshot=frame.snapshot,
        block=frame.block,
        blocks=frame.blocks,
        is_ready=frame.is_ready,
        fees=frame.fees,
        projected=frame.projected,
        price=Quote(frame.btc_usd, frame.price_at) if frame.price_known else None,
    )


def canary_change(txid: str, value_sat: int) -> MempoolChange:
    """Return a change with the canary's transaction, decoded from the frame that a backend would send.

    It has no time of receipt: the link never sees it.
    """
    return change_of(decode(canary_frame(txid, value_sat)), received_at=0.0, received_monotonic=0.0)
