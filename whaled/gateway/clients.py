"""The limits that all connections of one client share. A client is the `client_id` of a token.

Pure: `now` is in seconds.
"""

from collections import OrderedDict

from whaled.gateway.limits import LostTime, TokenBucket

# The most clients without a connection whose budget is kept until it is full, so that a client cannot refill it by
# reconnecting. Beyond this the longest absent one is forgotten. That is safe, since clients do not choose their ids.
ABSENT_REMEMBERED = 10_000


class Client:
    """One client: its number of connections and their common budget, which is `factor` times the configured one."""

    __slots__ = ("bucket", "client_id", "connections", "factor")

    def __init__(self, client_id: str, bucket: TokenBucket) -> None:
        self.client_id = client_id
        self.bucket = bucket
        self.connections = 0
        self.factor = 1.0


class Clients:
    """The clients that are or recently were connected. The limits may be replaced at any time (reload)."""

    def __init__(self, *, max_connections: int, rate: float, burst: float) -> None:
        self.max_connections = max_connections
        self.lost = LostTime()
        self._rate = rate
        self._burst = burst
        self._present: dict[str, Client] = {}
        self._absent: OrderedDict[str, Client] = OrderedDict()

    def reconfigure(self, *, max_connections: int, rate: float, burst: float) -> None:
        """Apply new limits. Open connections remain, even beyond a lower limit."""
        self.max_connections = max_connections
        self._rate = rate
        self._burst = burst
        for client in (*self._present.values(), *self._absent.values()):
            client.bucket.reconfigure(rate * client.factor, burst * max(1.0, client.factor))

    def enter(self, client_id: str, now: float, factor: float = 1.0) -> Client | None:
        """Count a connection of a client, for which `leave` must be called once. Return None if it has too many.

        The budget is `factor` times the configured one. The largest factor of several connections applies.
        """
        client = self._present.get(client_id)
        if client is None:
            client = self._absent.pop(client_id, None) or self._new_client(client_id, now)
            self._present[client_id] = client
        elif client.connections >= self.max_connections:
            return None
        if not client.connections or factor > client.factor:
            self._scale(client, factor)
        client.connections += 1
        return client

    def _scale(self, client: Client, factor: float) -> None:
        if factor != client.factor:
            client.factor = factor
            client.bucket.reconfigure(self._rate * factor, self._burst * max(1.0, factor))

    def _new_client(self, client_id: str, now: float) -> Client:
        return Client(client_id, TokenBucket(self._rate, self._burst, now, self.lost))

    def leave(self, client: Client) -> None:
        """Remove a connection of a client."""
        client.connections -= 1
        if client.connections:
            return
        del self._present[client.client_id]
        self._absent[client.client_id] = client
        while len(self._absent) > ABSENT_REMEMBERED:
            self._absent.popitem(last=False)

    def forget_absent(self, now: float) -> None:
        """Forget the longest absent clients, up to the first one whose budget is not full.

        Each remembered client can keep a whole block of memory from being returned to the system.
        """
        while self._absent:
            client_id, client = next(iter(self._absent.items()))
            if not client.bucket.is_full(now):
                return
            del self._absent[client_id]

    @property
    def present(self) -> int:
        """The number of clients with a connection."""
        return len(self._present)

    @property
    def absent(self) -> int:
        """The number of clients without a connection whose budget is remembered."""
        return len(self._absent)
