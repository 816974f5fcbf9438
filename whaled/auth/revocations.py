"""The revocations in force, in memory: each check takes a few look-ups, however many there are. Pure."""

from collections import OrderedDict
from enum import StrEnum

from msgspec import Struct

from whaled.auth.tokens import family_of
from whaled.model import Grant

# About 350 bytes each. The database holds no more either: who needs more retires the signing key.
MAX_REVOCATIONS = 50_000


class Kind(StrEnum):
    """The kind of name that a revocation has.

    `ended` is a family that ended because a token of it was refreshed twice. Its name includes the client id, so that
    no client can end the family of another.
    """

    TOKEN = "jti"  # noqa: S105 - no password
    FAMILY = "family"
    ENDED = "ended"
    CLIENT = "client"
    KEY = "kid"


class Revocation(Struct, frozen=True):
    """One revocation. Times are Unix seconds.

    Of a client, the tokens are revoked whose chain of refreshes began until `at`. After `until`, the tokens have
    expired in any case.
    """

    kind: Kind
    name: str
    at: float
    until: float

    def joined(self, other: "Revocation") -> "Revocation":
        """Return one revocation that covers what this one and another one of the same name cover."""
        return Revocation(self.kind, self.name, max(self.at, other.at), max(self.until, other.until))


class Revocations:
    """The revocations by what they name. A revocation is never taken back, it only expires."""

    def __init__(self) -> None:
        self._held: OrderedDict[tuple[Kind, str], Revocation] = OrderedDict()

    def add(self, revocation: Revocation) -> None:
        """Have tokens refused from now on."""
        key = (revocation.kind, revocation.name)
        held = self._held.get(key)
        self._held[key] = revocation if held is None else held.joined(revocation)

    def cover(self, grant: Grant, now: float) -> bool:
        """Return whether a token is revoked."""
        return (
            self._in_force(Kind.TOKEN, grant.token_id, now) is not None
            or self._in_force(Kind.FAMILY, grant.family, now) is not None
            or self._in_force(Kind.KEY, grant.key_id, now) is not None
            or self._in_force(Kind.ENDED, family_of(grant), now) is not None
            or self._covers_client(grant, now)
        )

    def prune(self, now: float, most: int) -> None:
        """Look at the next `most` revocations and remove those that have expired."""
        for _ in range(min(most, len(self._held))):
            key = next(iter(self._held))
            if self._held[key].until <= now:
                del self._held[key]
            else:
                self._held.move_to_end(key)

    @property
    def size(self) -> int:
        """The number of revocations held."""
        return len(self._held)

    def _in_force(self, kind: Kind, name: str | None, now: float) -> Revocation | None:
        held = self._held.get((kind, name)) if name is not None else None
        return held if held is not None and now < held.until else None

    def _covers_client(self, grant: Grant, now: float) -> bool:
        held = self._in_force(Kind.CLIENT, grant.client_id, now)
        if held is None:
            return False
        # Without a time of issue, nothing shows that the token is newer. A refresh inherits the time of the first
        # token, or it would escape between the act and the moment at which the daemon notices it.
        times = [at for at in (grant.issued_at, grant.authenticated_at) if at is not None]
        return not times or min(times) <= held.at
