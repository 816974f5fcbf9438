"""Finds what the backend's stream does not report, by requests to the backend over REST.

`worker` runs the steps in turn: mempool comparison and snapshot whales (`mempool`), the block scan (`blocks`), outcomes
of whales that left the mempool (`outcomes`), whales replaced during an outage (`replacements`). Every step may be
repeated, because the event log stores each event once. Nothing here publishes: drafts go through `tools.commit_valid`.
"""
