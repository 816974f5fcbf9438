"""The durable event log: one SQLite database, and everything that reads, writes, checks or replaces it.

Enters: drafts of events, block scans and small notes to store; the paths of a log or of a backup.
Leaves: committed events with their offsets, pages of events for replays, what is known about whales by txid, outpoint,
block or time, and reports about damaged rows.
Owns: the database with its lock and side files; epoch, head and oldest offset; the record of known damage.
Never: publishes an event, contacts a client or the backend, changes a committed event, or assigns an offset twice.
"""
