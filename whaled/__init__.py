"""whaled: whale alerts from your own mempool.space backend, durable and replayable, over WebSocket."""

__version__ = "0.1.0"
