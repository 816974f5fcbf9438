"""A bot that acts on every whale exactly once, whatever restarts in between: itself, whaled, the network.

    python bot.py ws://127.0.0.1:8765 bot.db          (the token in WHALED_TOKEN, if the server wants one)

What it does about a whale (here: a row in `ledger`) and the position it has reached are committed in one transaction.
If it dies before the commit, neither happened, and the server tells the event again; if it dies after, both did.

The server renews a token before it ends, and does so once: the new one is kept in the database, which is therefore as
secret as the token. It is used by the next run as long as WHALED_TOKEN is the one that it was made from. For a wss://
server with a certificate of one's own authority, SSL_CERT_FILE names the authority's certificate.
"""

import asyncio
import hashlib
import os
import signal
import sqlite3
import sys
from pathlib import Path

from whaled.client import (
    Disconnected,
    Missed,
    Position,
    Progress,
    StreamError,
    TokenRenewed,
    WhaleAlert,
    WhaleStream,
    WhaleUpdate,
)

USAGE = "usage: python bot.py URL DATABASE    (such as ws://127.0.0.1:8765 bot.db; the token in WHALED_TOKEN)"

SCHEMA = """
CREATE TABLE IF NOT EXISTS ledger (txid TEXT PRIMARY KEY, btc REAL NOT NULL, status TEXT NOT NULL) STRICT;
CREATE TABLE IF NOT EXISTS progress (
    id INTEGER PRIMARY KEY CHECK (id = 1), epoch TEXT NOT NULL, "offset" INTEGER NOT NULL
) STRICT;
CREATE TABLE IF NOT EXISTS renewed (
    id INTEGER PRIMARY KEY CHECK (id = 1), given_sha256 TEXT NOT NULL, token TEXT NOT NULL
) STRICT;
"""


def saved_position(db: sqlite3.Connection) -> Position | None:
    """Where the last run came to; None on the very first, which then starts now."""
    row = db.execute('SELECT epoch, "offset" FROM progress').fetchone()
    return Position(*row) if row else None


def save_position(db: sqlite3.Connection, position: Position) -> None:
    """Part of the transaction that also holds what was done about the event."""
    db.execute("INSERT OR REPLACE INTO progress VALUES (1, ?, ?)", (position.epoch, position.offset))


def newest_token(db: sqlite3.Connection, given: str | None) -> str | None:
    """What the server made of the token that was given, if it did: the given one must not be renewed again."""
    if given is None:
        return None
    row = db.execute("SELECT token FROM renewed WHERE given_sha256 = ?", (sha256(given),)).fetchone()
    return str(row[0]) if row else given


def save_token(db: sqlite3.Connection, given: str | None, token: str) -> None:
    """Keep a renewed token, with the hash of the one that was given."""
    if given is not None and token != given:
        db.execute("INSERT OR REPLACE INTO renewed VALUES (1, ?, ?)", (sha256(given), token))


def sha256(token: str) -> str:
    """A name for a token that does not tell it."""
    return hashlib.sha256(token.encode()).hexdigest()


def open_stream(url: str, db: sqlite3.Connection, given: str | None) -> WhaleStream:
    """A stream that goes on where the last run came to. Raises ValueError for an impossible URL or token."""
    return WhaleStream(
        url,
        token=newest_token(db, given),
        filters={"min_btc": 100},
        since=saved_position(db),
        link_events=True,  # for Progress (on a quiet day the position moves on without an event) and TokenRenewed
    )


async def trade(stream: WhaleStream, db: sqlite3.Connection, given: str | None) -> None:
    """Follow the stream until it is stopped."""
    async with stream:
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
                    case TokenRenewed():
                        save_token(db, given, event.token)
                        continue
                    case Disconnected():
                        print(f"{event.reason}; trying again in {event.retry_in_s:.1f} s", file=sys.stderr)
                        continue
                    case _:
                        continue
                save_position(db, event.position)
        if stream.token is not None:
            with db:  # a stop drops what was not handed over: it may have been a TokenRenewed
                save_token(db, given, stream.token)


def main() -> int:
    """Exit status: 0 stopped, 1 the server does not let the bot in, 2 an argument that cannot be."""
    if len(sys.argv) != 3:
        print(USAGE, file=sys.stderr)
        return 2
    url, path = sys.argv[1:]
    given = os.environ.get("WHALED_TOKEN", "").strip() or None
    os.umask(0o077)
    try:
        db = sqlite3.connect(path)
        db.executescript(SCHEMA)
        Path(path).chmod(0o600)  # it may hold a token, and be older than this run
        stream = open_stream(url, db, given)
    except (ValueError, OSError, sqlite3.Error) as error:
        print(f"{error}\n{USAGE}", file=sys.stderr)
        return 2
    try:
        asyncio.run(trade(stream, db, given))
    except StreamError as error:
        print(error, file=sys.stderr)
        return 1
    finally:
        db.close()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
