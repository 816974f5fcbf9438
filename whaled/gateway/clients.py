"""What all connections of one client may take together. A client is a `client_id` of tokens. Pure: `now` is seconds."""

from collections import OrderedDict

from whaled.gateway.limits import LostTime, TokenBucket

# Clients without a connection whose budget is remembered until it is full, so that coming back does not fill it. Beyond
# it the longest absent is forgotten: client ids are not for the client to choose.
ABSENT_REMEMBERED = 10_000


class Client:
    """One client: how many connections it has, and their common budget."""

    __slots__ = ("bucket", "client_id", "connections")

    def __init__(self, client_id: str, bucket: TokenBucket) -> None:
        self.client_id = client_id
        self.bucket = bucket
        self.connections = 0


class Clients:
    """The clients that are connected, and those that were lately. The limits may be replaced at any time (reload)."""

    def __init__(self, *, max_connections: int, rate: float, burst: float) -> None:
        self.max_connections = max_connections
        self.lost = LostTime()
        self._rate = rate
        self._burst = burst
        self._present: dict[str, Client] = {}
        self._absent: OrderedDict[str, Client] = OrderedDict()

    def reconfigure(self, *, max_connections: int, rate: float, burst: float) -> None:
        """Take other limits from now on. Connections that are open stay."""
        self.max_connections = max_connections
        self._rate = rate
        self._burst = burst
        for client in (*self._present.values(), *self._absent.values()):
            client.bucket.reconfigure(rate, burst)

    def enter(self, client_id: str, now: float) -> Client | None:
        """Count a connection of a client; None if it has as many as it may. One that is counted must leave once."""
        client = self._present.get(client_id)
        if client is None:
            client = self._absent.pop(client_id, None) or self._newcomer(client_id, now)
            self._present[client_id] = client
        elif client.connections >= self.max_connections:
            return None
        client.connections += 1
        return client

    def _newcomer(self, client_id: str, now: float) -> Client:
        return Client(client_id, TokenBucket(self._rate, self._burst, now, self.lost))

    def leave(self, client: Client) -> None:
        """A connection of a client is gone."""
        client.connections -= 1
        if client.connections:
            return
        del self._present[client.client_id]
        self._absent[client.client_id] = client
        while len(self._absent) > ABSENT_REMEMBERED:
            self._absent.popitem(last=False)

    def forget_absent(self, now: float) -> None:
        """Forget the longest absent as far as their budget is full again. Each lies in the way of memory that others
        left: Python gives back none of which a part is used.
        """
        while self._absent:
            client_id, client = next(iter(self._absent.items()))
            if not client.bucket.is_full(now):
                return
            del self._absent[client_id]

    @property
    def present(self) -> int:
        """Clients with a connection."""
        return len(self._present)

    @property
    def absent(self) -> int:
        """Clients without one whose budget is remembered."""
        return len(self._absent)
