"""A bot that acts on every whale exactly once, whatever restarts in between: itself, whaled, the network.

    python bot.py ws://127.0.0.1:8765 bot.db          (the token in WHALED_TOKEN, if the server wants one)

What it does about a whale (here: a row in `ledger`) and the position it has reached are committed in one transaction.
If it dies before the commit, neither happened, and the server tells the event again; if it dies after, both did.
"""

import asyncio
import os
import signal
import sqlite3
import sys

from whaled.client import Disconnected, Missed, Position, Progress, StreamError, WhaleAlert, WhaleStream, WhaleUpdate

SCHEMA = """
CREATE TABLE IF NOT EXISTS ledger (txid TEXT PRIMARY KEY, btc REAL NOT NULL, status TEXT NOT NULL) STRICT;
CREATE TABLE IF NOT EXISTS progress (
    id INTEGER PRIMARY KEY CHECK (id = 1), epoch TEXT NOT NULL, "offset" INTEGER NOT NULL
) STRICT;
"""


def saved_position(db: sqlite3.Connection) -> Position | None:
    """Where the last run came to; None on the very first, which then starts now."""
    row = db.execute('SELECT epoch, "offset" FROM progress').fetchone()
    return Position(*row) if row else None


def save_position(db: sqlite3.Connection, position: Position) -> None:
    """Part of the transaction that also holds what was done about the event."""
    db.execute("INSERT OR REPLACE INTO progress VALUES (1, ?, ?)", (position.epoch, position.offset))


async def trade(url: str, db: sqlite3.Connection) -> None:
    """Follow the stream until it is stopped."""
    async with WhaleStream(
        url,
        token=os.environ.get("WHALED_TOKEN") or None,
        filters={"min_btc": 100},
        since=saved_position(db),
        link_events=True,  # for Progress: on a quiet day the position moves on without an event
    ) as stream:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, stream.stop)
        async for event in stream:
            with db:  # one transaction: all of it, or nothing
                match event:
                    case WhaleAlert(data=whale):
                        db.execute(
                            "INSERT INTO ledger VALUES (?, ?, 'pending')", (whale.transaction_id, whale.btc_value)
                        )
                    case WhaleUpdate(data=news):
                        db.execute("UPDATE ledger SET status = ? WHERE txid = ?", (news.status, news.transaction_id))
                    case Missed():
                        # The bot was away for longer than the server keeps events. It must not carry on as if
                        # nothing had happened: here it says so, and leaves what is open to a person.
                        print(f"missed events between {event.since} and {event.position}", file=sys.stderr)
                    case Progress():
                        pass
                    case Disconnected():
                        print(f"{event.reason}; trying again in {event.retry_in_s:.1f} s", file=sys.stderr)
                        continue
                    case _:
                        continue
                save_position(db, event.position)


def main() -> int:
    """Exit status: 0 stopped, 1 the server does not let the bot in."""
    url, path = sys.argv[1:3]
    db = sqlite3.connect(path)
    db.executescript(SCHEMA)
    try:
        asyncio.run(trade(url, db))
    except StreamError as error:
        print(error, file=sys.stderr)
        return 1
    finally:
        db.close()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
