"""A bot that acts on every whale exactly once, across restarts of itself and of whaled, and network failures.

    python bot.py ws://127.0.0.1:8765 bot.db          (the token in WHALED_TOKEN, if the server requires one)

The bot commits its action on a whale (here: a row in `ledger`) and its position in one transaction. If it dies before
the commit, neither took effect, and the server replays the event. If it dies after the commit, both did.

The server renews a token before it expires, and each token only once. The bot keeps the new token in its database,
which is therefore as secret as the token. The next run uses it if WHALED_TOKEN is still the token that it was renewed
from. For a wss:// server with a certificate from your own authority, set SSL_CERT_FILE to the authority's certificate.
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
    """Return the position of the last run, None on the first run, which starts now."""
    row = db.execute('SELECT epoch, "offset" FROM progress').fetchone()
    return Position(*row) if row else None


def save_position(db: sqlite3.Connection, position: Position) -> None:
    """Save the position, in the same transaction as the action on the event."""
    db.execute("INSERT OR REPLACE INTO progress VALUES (1, ?, ?)", (position.epoch, position.offset))


def newest_token(db: sqlite3.Connection, given: str | None) -> str | None:
    """Return the newest token that was renewed from the given one, since the given one must not be renewed again."""
    if given is None:
        return None
    row = db.execute("SELECT token FROM renewed WHERE given_sha256 = ?", (sha256(given),)).fetchone()
    return str(row[0]) if row else given


def save_token(db: sqlite3.Connection, given: str | None, token: str) -> None:
    """Save a renewed token, with the hash of the given one."""
    if given is not None and token != given:
        db.execute("INSERT OR REPLACE INTO renewed VALUES (1, ?, ?)", (sha256(given), token))


def sha256(token: str) -> str:
    """Return a name for a token that does not reveal it."""
    return hashlib.sha256(token.encode()).hexdigest()


def open_stream(url: str, db: sqlite3.Connection, given: str | None) -> WhaleStream:
    """Return a stream that resumes at the position of the last run. Raises ValueError for an invalid URL or token."""
    return WhaleStream(
        url,
        token=newest_token(db, given),
        filters={"min_btc": 100},
        since=saved_position(db),
        link_events=True,  # for TokenRenewed, and for Progress: the position advances when no event matches
    )


async def trade(stream: WhaleStream, db: sqlite3.Connection, given: str | None) -> None:
    """Follow the stream until it is stopped."""
    async with stream:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, stream.stop)
        async for event in stream:
            with db:  # one transaction for the action and the position
                match event:
                    case WhaleAlert(data=whale):
                        db.execute(
                            "INSERT INTO ledger VALUES (?, ?, 'pending')", (whale.transaction_id, whale.btc_value)
                        )
                    case WhaleUpdate(data=update):
                        db.execute(
                            "UPDATE ledger SET status = ? WHERE txid = ?", (update.status, update.transaction_id)
                        )
                    case Missed():
                        # The bot was disconnected for longer than the server keeps events, so `ledger` may be
                        # incomplete. A real bot should stop here until a person has checked; this one reports it.
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
            with db:  # a stop drops buffered events, which may include a TokenRenewed
                save_token(db, given, stream.token)


def main() -> int:
    """Run the bot. Exit status: 0 stopped, 1 the server refused the bot, 2 an invalid argument."""
    if len(sys.argv) != 3:
        print(USAGE, file=sys.stderr)
        return 2
    url, path = sys.argv[1:]
    given = os.environ.get("WHALED_TOKEN", "").strip() or None
    os.umask(0o077)
    try:
        db = sqlite3.connect(path)
        db.executescript(SCHEMA)
        Path(path).chmod(0o600)  # it may contain a token, and an existing file keeps its old mode otherwise
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
