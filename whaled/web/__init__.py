"""The plain HTTP server: `/metrics` for Prometheus and `/healthz` for load balancers.

In: HTTP requests on its own sockets, the rendered registry and the daemon's health through callbacks, reloads.
Out: HTTP responses, and calls of the meter.
State: its open connections with their time limits, the rate limit of requests, and the latest rendering per format.
It never serves alerts or events, never changes the daemon, and never computes a metric itself. A flood of requests
costs the event loop a limited part of its time.
"""
