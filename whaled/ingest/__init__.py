"""The path from a message of the stream to a published event.

Enters: messages of the stream (`intake`), and drafts of the backfill (`committer`).
Leaves: events, committed and then published.
Owns: the market and the detector in force (`ingest`, which is pure); the lock that orders commits (`committer`); what
the backend cannot give (`intake`).
Never: talks to a backend by itself, or to a client.
"""
