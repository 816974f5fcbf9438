"""The WebSocket server for clients.

In: accepted sockets and the messages of clients, committed events, states of the link to the backend, reloads.
Out: WebSocket frames (events, positions, statuses, answers) and close codes, log lines, calls of the meter.
State: the open connections and their sessions, filters and unsent bytes; the counts and rate limits of addresses,
networks and clients; the newest published offset; a cache of pages of the event log during replays.
It never writes to the event log, requests nothing from the backend, and issues tokens only for `refresh`. It publishes
only committed events, and the event loop's time for clients is limited (`share`), so that they cannot delay alerts.
"""
