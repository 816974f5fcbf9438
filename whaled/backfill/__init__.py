"""Finds what the stream does not report, by requests to the backend (`whaled/source.py`).

`worker` runs the steps in turn: mempool comparison and snapshot whales (`mempool`), the block scan (`blocks`), outcomes
of whales that left the mempool (`outcomes`), whales replaced during an outage (`replacements`). Every step may be
repeated, because the event log stores each event once. Nothing here publishes: drafts go through
`context.Context.commit_valid`.
"""
