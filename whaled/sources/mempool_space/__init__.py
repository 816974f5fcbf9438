"""The mempool backend: its WebSocket stream and its REST API.

What enters: the backend's frames and REST responses, over TCP, a Unix socket or a proxy. What leaves, as values of
`whaled/source.py`: messages of the stream (`feed`), transactions and blocks fetched by REST (`backend`, `rest`), and
whether the backend provides every call that whaled needs (`survey`). State: one link, the sequence number of its last
delta, the routes of its REST calls, and the note in the event log that names the network. This package never decides
which transaction is a whale, never appends events to the event log, and never trusts the backend: a malformed or
hostile response costs only itself.
"""
