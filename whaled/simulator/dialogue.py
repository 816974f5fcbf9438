"""The subscriptions of one client, and the messages it gets for them. No I/O."""

from collections import deque
from typing import Any

import msgspec

from whaled.simulator import frames, txframes
from whaled.simulator.backend import Delta, Update
from whaled.simulator.market import Seen
from whaled.simulator.messages import STATS, Messages, Parts

# `websocket-handler.ts:61-65`.
MAX_MESSAGE_BYTES = 50_000
MAX_MESSAGES = 100
WINDOW_S = 10.0
# Parts that the backend sends at once for a newly wanted name.
_IMMEDIATE = {"blocks": ("blocks",), "mempool-blocks": ("mempool-blocks",), "stats": STATS}


class HangUp(Exception):  # noqa: N818 -- not an error: the real backend closes without a code here
    """The backend closes the connection: there were too many messages, or one is not JSON."""


class Dialogue:
    """The subscriptions of one client. `receive` handles its messages, `push` selects its parts of an update."""

    def __init__(self) -> None:
        self._wanted: set[str] = set()
        self._tracks_mempool = False
        self._tracks_txids = False
        self._tracked_block: int | None = None
        self._shown: dict[str, Seen] = {}
        self._rates: dict[str, float] = {}
        self._received_at: deque[float] = deque(maxlen=MAX_MESSAGES)

    @property
    def is_subscribed(self) -> bool:
        """Return whether this client gets deltas."""
        return self._tracks_mempool or self._tracks_txids

    def receive(self, text: bytes, now: float, messages: Messages) -> Parts:
        """Return the response to a message, empty for none. Raises HangUp to close without a code."""
        if len(self._received_at) == MAX_MESSAGES and now - self._received_at[0] < WINDOW_S:
            raise HangUp("too many messages")
        self._received_at.append(now)
        try:
            message = msgspec.json.decode(text)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise HangUp("not JSON") from error
        if message is None:
            raise HangUp("null")
        return self._obey(message, messages) if isinstance(message, dict) else {}

    def _obey(self, message: dict[str, Any], messages: Messages) -> Parts:
        parts: Parts = {}
        match message.get("action"):
            case "init":
                parts |= messages.init()
            case "ping":
                parts["pong"] = b"true"
            case "want" if isinstance(message.get("data"), list):
                wanted = {name for name in message["data"] if isinstance(name, str)}
                for name in sorted(wanted - self._wanted):
                    parts |= messages.parts(_IMMEDIATE.get(name, ()))
                self._wanted = wanted
        # Only the JSON booleans count: "yes" is ignored.
        if isinstance(message.get("track-mempool"), bool):
            self._tracks_mempool = message["track-mempool"]
        if isinstance(message.get("track-mempool-txids"), bool):
            self._tracks_txids = message["track-mempool-txids"]
        if message.get("refresh-blocks") is True:
            parts |= messages.parts(("blocks",))
        if "track-mempool-block" in message:
            parts |= self._track_block(message["track-mempool-block"], messages)
        return parts

    def _track_block(self, index: object, messages: Messages) -> Parts:
        # For an index beyond the last block there is no response, and the previous tracking ends.
        if not isinstance(index, int) or isinstance(index, bool) or not 0 <= index < messages.projected_blocks:
            self._tracked_block = None
            self._remember([])
            return {}
        self._tracked_block = index
        return self._whole_block(index, messages)

    def _whole_block(self, index: int, messages: Messages) -> Parts:
        txs = messages.projected(index)
        self._remember(txs)
        frame = txframes.projected_block(index, messages.sequence, txs, prevouts=messages.has_prevouts)
        return {"projected-block-transactions": frames.ENCODER.encode(frame)}

    def _remember(self, txs: list[Seen]) -> None:
        self._shown = {seen.tx.txid: seen for seen in txs}
        self._rates = {seen.tx.txid: seen.rate for seen in txs}

    def push(self, update: Update, own: Parts, messages: Messages) -> Parts:
        """Return the parts of an update (`own`) that this client gets, and the further parts sent with them."""
        if not isinstance(update, Delta):
            return own
        parts: Parts = {}
        if update.block is not None and "blocks" in self._wanted:
            parts["block"] = own["block"]
        if "stats" in self._wanted:
            parts |= messages.parts(STATS if update.block else (*STATS, "transactions"))
        if "mempool-blocks" in self._wanted:
            parts |= messages.parts(("mempool-blocks",))
        if self._tracks_mempool:
            parts["mempool-transactions"] = own["mempool-transactions"]
        if self._tracks_txids:
            parts["mempool-txids"] = own["mempool-txids"]
        if self._tracked_block is not None:
            parts |= self._changed_block(self._tracked_block, messages, after_block=update.block is not None)
        return parts

    def _changed_block(self, index: int, messages: Messages, *, after_block: bool) -> Parts:
        """Return the change of a projected block. After a block: nothing if it is empty, all of it if most is new."""
        before, rates, prevouts = self._shown, self._rates, messages.has_prevouts
        txs = messages.projected(index)
        new = [seen for seen in txs if seen.tx.txid not in before]
        if after_block and (not txs or len(new) > len(txs) / 2):
            return self._whole_block(index, messages) if txs else {}
        self._remember(txs)
        delta = {
            "added": [txframes.compressed(seen, prevouts=prevouts) for seen in new],
            "removed": [txid for txid in before if txid not in self._shown],
            "changed": [
                [
                    seen.tx.txid,
                    txframes.cents(txframes.effective(seen)),
                    txframes.projected_flags(seen, prevouts=prevouts),
                    0,
                ]
                for seen in txs
                if rates.get(seen.tx.txid, seen.rate) != seen.rate
            ],
        }
        frame = {"index": index, "sequence": messages.sequence, "delta": delta}
        return {"projected-block-transactions": frames.ENCODER.encode(frame)}
