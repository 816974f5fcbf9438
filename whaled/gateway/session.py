"""The protocol state machine of one connection: commands and deadlines in, actions out.

`Session._TABLE` maps state and command to a step. The module does no I/O: the server performs the actions, reads the
clock and owns the socket.

Pure.
"""

from collections.abc import Callable
from enum import Enum, auto
from typing import ClassVar, Protocol

from msgspec import Struct

from whaled.config.sections import AuthSettings, GatewaySettings
from whaled.errors import ClientError, ClientErrorCode, Close, TokenError, TokenRefusal
from whaled.gateway import wire
from whaled.gateway.clients import Client, Clients
from whaled.gateway.limits import (
    BYTES_PER_TOKEN,
    EVENTS_PER_TOKEN,
    REPLAY_COST,
    TERMS_PER_TOKEN,
    FailureLimit,
    Limit,
    TokenBucket,
)
from whaled.model import Grant, Permission, Position
from whaled.whales.filters import EVERYTHING, Filter, parse_filter

# The cost of a malformed message, in messages, so that guessing at the protocol is not cheaper than using it.
MALFORMED_COST = 5.0
# The retry_after sent to a client with too many connections: about the time until a connection that broke without a
# close is noticed.
CROWDED_RETRY_S = 30.0
WARN_BEFORE_EXPIRY_S = 300.0
WARN_BEFORE_EXPIRY_PART = 0.1
# A connection that breaks within this time after a refresh may have lost the new token. TCP would take much longer to
# report a dead connection, but pings (gateway.ping_interval, ping_timeout) end it within about this time.
ANSWER_LOST_S = 60.0


class Authenticator(Protocol):
    """The verifier of credentials."""

    def verify(self, credential: str, now: float) -> Grant:
        """Return the client and its permissions. Raises TokenError."""
        ...

    def refresh(self, grant: Grant, now: float) -> tuple[str, Grant]:
        """Return a new token, and its grant, for the same client with the same permissions. Raises TokenError."""
        ...

    def is_in_force(self, grant: Grant, now: float) -> bool:
        """Return whether an earlier grant is still accepted, apart from its expiry."""
        ...

    def answer_lost(self, parent: Grant, child: Grant) -> None:
        """Record that the refreshed token `child` may not have reached its client."""
        ...


class Surroundings(Protocol):
    """The state of the gateway that sessions read."""

    def position(self) -> Position:
        """Return the position of the newest published event."""
        ...

    def counters(self) -> wire.Counters:
        """Return the data of the `stats` answer."""
        ...


# --- actions ----------------------------------------------------------------------------------------------------------


class Send(Struct, frozen=True):
    """Send this frame."""

    frame: bytes


class Admit(Struct, frozen=True):
    """Count the client as authenticated, and deliver alerts to it if it may read."""

    grant: Grant | None
    may_read: bool


class Attach(Struct, frozen=True):
    """Send `subscribed`, then deliver the events that pass `filter`, from `since` on (None: from now on)."""

    filter: Filter
    since: wire.Since | None


class Detach(Struct, frozen=True):
    """Stop delivery."""


class Refused(Struct, frozen=True):
    """Count a failed authentication.

    `reason` is None if there was no credential to verify. `client_id` is known if the credential was once valid.
    """

    message: wire.AuthMessage
    reason: TokenRefusal | None = None
    client_id: str = ""


class FamilyEnded(Struct, frozen=True):
    """End this client's sessions that use a token of this family, because one token was refreshed twice."""

    grant: Grant


class Limited(Struct, frozen=True):
    """Count a message over the rate limit."""

    limit: Limit


class Crowded(Struct, frozen=True):
    """Count the refusal of a client that already has its maximum number of connections."""


class Rejected(Struct, frozen=True):
    """Count a message that was answered with an error."""

    code: ClientErrorCode


class Stop(Struct, frozen=True):
    """Close the connection."""

    close: Close


Action = Send | Admit | Attach | Detach | Refused | FamilyEnded | Limited | Crowded | Rejected | Stop


class State(Enum):
    """The state of a session. The state of delivery (live, replaying, paused) belongs to the hub and the server."""

    AUTHENTICATING = auto()
    READY = auto()
    CLOSED = auto()


class Resume(Struct, frozen=True):
    """The start of delivery: the offset before the first event, and whether everything after `since` is available."""

    cursor: int
    recovered: bool | None


def resume(since: Position | wire.Last | None, *, epoch: str, head: int, oldest: int) -> Resume:
    """Return where delivery starts. Recovery is all or nothing: without it, delivery starts at the head."""
    match since:
        case None:
            return Resume(head, None)
        case wire.Last(last=count):
            return Resume(max(head - count, oldest - 1, 0), True)
        case Position(epoch=theirs, offset=offset):
            if theirs == epoch and oldest - 1 <= offset <= head:
                return Resume(offset, True)
            return Resume(head, False)


def terms(filters: object) -> int:
    """Return the number of values in a filter that has not been validated yet."""
    if not isinstance(filters, dict):
        return 0
    return len(filters) + sum(len(value) for value in filters.values() if isinstance(value, list | dict))


class Session:
    """The protocol rules of one connection."""

    __slots__ = (
        "_address", "_authenticator", "_bucket", "_clients", "_failures", "_house", "_is_late", "_limits", "_refreshed",
        "_warned", "client", "grant", "last_message", "state",
    )  # fmt: skip

    def __init__(
        self,
        *,
        limits: "SessionLimits",
        authenticator: Authenticator | None,
        house: Surroundings,
        failures: FailureLimit,
        clients: Clients,
        address: str,
        now: float,
    ) -> None:
        self._limits = limits
        self._authenticator = authenticator
        self._house = house
        self._failures = failures
        self._clients = clients
        self._address = address
        self._bucket = TokenBucket(limits.messages_per_second, limits.message_burst, now, clients.lost)
        self._warned = False
        self._is_late = False  # the token had already expired when it arrived
        self._refreshed: tuple[Grant, float] | None = None  # the last token that was refreshed, and when
        self.grant: Grant | None = None
        self.client: Client | None = None
        self.last_message = wire.MessageType.INVALID
        self.state = State.AUTHENTICATING

    @property
    def may_read(self) -> bool:
        """True if this client may receive alerts. Without authentication every client may."""
        return self._authenticator is None or (self.grant is not None and Permission.READ in self.grant.permissions)

    @property
    def source(self) -> str:
        """The name that work is attributed to: the client id, or the address before authentication."""
        return self._address if self.client is None else self.client.client_id

    def charge_replay(self, events: int) -> None:
        """Charge the client for events that were read from the event log for it."""
        self._charge(events / EVENTS_PER_TOKEN)

    # --- events of the connection ---

    def opened(self, credential: str | None, now: float) -> list[Action]:
        """Handle the end of the handshake. `credential` is the one sent with it, if any."""
        if self._authenticator is None:
            self.state = State.READY
            return [Send(wire.welcome_frame(None, self._house.position(), now)), Admit(None, True)]
        if credential is not None:
            return self._authenticate(wire.Auth(credential), now)
        return []

    def would_parse(self, now: float) -> bool:
        """Return whether `received` would parse a text message now. If not, its content does not matter."""
        if self.state is not State.READY:
            return self.state is State.AUTHENTICATING
        return self._bucket.may_pass(now) and (self.client is None or self.client.bucket.may_pass(now))

    def received(self, raw: bytes | bytearray, now: float, arrived_bytes: int = 0) -> list[Action]:
        """Handle a text message.

        A message over the rate limit is not parsed, except before authentication, where the answer depends on it.
        `arrived_bytes` is its compressed size: the larger of the two sizes determines the cost.
        """
        if self.state is State.CLOSED:
            return []
        self.last_message = wire.MessageType.INVALID
        limited = self._take(now, 1.0 + max(len(raw), arrived_bytes) // BYTES_PER_TOKEN)
        if limited and self.state is State.READY:
            return limited
        try:
            command = wire.parse(raw)
        except ClientError as error:
            if self.state is State.AUTHENTICATING:
                return self._refuse(wire.AuthMessage.FIRST)
            return self.rejected(error, now)
        self.last_message = wire.MessageType.of(command)
        if limited:
            return limited
        step = self._TABLE.get((self.state, type(command)))
        if step is None:
            return self._refuse(wire.AuthMessage.FIRST)
        try:
            return step(self, command, now)
        except ClientError as error:
            return self.rejected(error, now)

    def received_binary(self, now: float) -> list[Action]:
        """Refuse a binary message. The protocol has none."""
        if self.state is State.CLOSED:
            return []
        self.last_message = wire.MessageType.INVALID
        if self.state is State.AUTHENTICATING:
            return self._refuse(wire.AuthMessage.FIRST)
        if limited := self._take(now, 1.0):
            return limited
        return self.rejected(ClientError(ClientErrorCode.INVALID_MESSAGE, "binary frames are not accepted"), now)

    def received_control(self, now: float) -> list[Action]:
        """Charge for a ping or pong frame, or a fragment of a message. Each costs as much as a message."""
        over_s = self._bucket.take(now)
        if over_s <= 0 or self.state is State.CLOSED:
            return []
        if self.state is State.READY:
            return self._limited(Limit.CONNECTION)
        return self._refuse(wire.AuthMessage.RATE_LIMITED) if self._bucket.is_exhausted else []

    def auth_deadline(self) -> list[Action]:
        """Handle the end of the time to authenticate."""
        return self._refuse(wire.AuthMessage.TIMEOUT) if self.state is State.AUTHENTICATING else []

    def next_deadline(self) -> float | None:
        """Return when to call `tick` (Unix seconds); None if never."""
        grant = self.grant
        if grant is None or grant.expires_at is None:
            return None
        if not self._warned:
            life_s = grant.expires_at - grant.issued_at if grant.issued_at is not None else WARN_BEFORE_EXPIRY_S
            return grant.expires_at - min(WARN_BEFORE_EXPIRY_S, max(0.0, life_s) * WARN_BEFORE_EXPIRY_PART)
        return grant.expires_at + (self._limits.leeway_s if self._is_late else self._limits.expiry_grace_s)

    def tick(self, now: float) -> list[Action]:
        """Send the warning before the credential expires, or close the connection if it has expired."""
        deadline = self.next_deadline()
        if self.state is not State.READY or deadline is None or self.grant is None or now < deadline:
            return []
        if not self._warned:
            self._warned = True
            return [Send(wire.token_expiring_frame(self.grant))]
        return self._stop(Close.TOKEN_EXPIRED)

    def recheck(self, now: float) -> list[Action]:
        """Close the connection if its credential is no longer valid, after a change of keys, family or clock."""
        grant = self.grant
        if self.state is not State.READY or grant is None or self._authenticator is None:
            return []
        if not self._authenticator.is_in_force(grant, now):
            return self._stop(Close.TOKEN_REVOKED)
        return self.tick(now)

    def link_lost(self, now: float) -> None:
        """Handle a connection that broke without a close. A token sent just before may not have arrived."""
        if self._refreshed is None or self._authenticator is None or self.grant is None:
            return
        parent, at = self._refreshed
        if abs(now - at) < ANSWER_LOST_S:
            self._authenticator.answer_lost(parent, self.grant)

    def rejected(self, error: ClientError, now: float) -> list[Action]:
        """Answer an invalid message with an error. The connection closes only if the client persists."""
        self._bucket.fine(now, MALFORMED_COST - 1.0)
        if self.client is not None:
            self.client.bucket.charge(MALFORMED_COST - 1.0)
        if self._bucket.is_exhausted:
            return [Rejected(error.code), *self._limited(Limit.CONNECTION)]
        return [Rejected(error.code), Send(wire.error_frame(error.code, str(error), path=error.path))]

    # --- steps of the table ---

    def _authenticate(self, command: wire.Command, now: float) -> list[Action]:
        assert isinstance(command, wire.Auth)
        if command.credential is None:
            return self._refuse(wire.AuthMessage.TOKEN_REQUIRED)
        assert self._authenticator is not None
        try:
            # Verify even beyond the failure limit: failures of others must not keep out a valid token, and it is cheap.
            grant = self._authenticator.verify(command.credential, now)
        except TokenError as error:
            wait_s = self._failures.failed(self._address, error.claimant, now)
            if wait_s > 0:
                return self._refuse_for_now(wait_s, error)
            return self._refuse(wire.AuthMessage.INVALID, error)
        self.client = self._clients.enter(grant.client_id, now)
        if self.client is None:
            return self._refuse_connection()
        self._use_grant(grant, now)
        self.state = State.READY
        return [
            Send(wire.auth_success_frame(grant)),
            Send(wire.welcome_frame(grant, self._house.position(), now)),
            Admit(grant, self.may_read),
        ]

    def _authenticate_again(self, command: wire.Command, now: float) -> list[Action]:
        assert isinstance(command, wire.Auth)
        if self._authenticator is None:
            return [Send(wire.auth_success_frame(None))]
        if command.credential is None:
            raise ClientError(ClientErrorCode.UNAUTHENTICATED, wire.AuthMessage.TOKEN_REQUIRED)
        try:
            grant = self._authenticator.verify(command.credential, now)
            if self.grant is None or grant.client_id != self.grant.client_id:
                raise TokenError(TokenRefusal.BAD_CLAIMS, "another client's token on an open connection")
        except TokenError as error:
            return self._refuse_again(error, now)
        could_read = self.may_read
        self._use_grant(grant, now)
        actions: list[Action] = [Send(wire.auth_success_frame(grant))]
        if could_read and not self.may_read:
            actions.append(Detach())
        return actions

    def _use_grant(self, grant: Grant, now: float) -> None:
        """Use this token as the connection's credential from now on.

        A token that had expired on arrival was accepted within the leeway for clock differences. Such a connection
        closes when the leeway ends, and its token cannot be refreshed: the grace period does not apply in addition.
        """
        self.grant = grant
        self._warned = False
        self._is_late = grant.expires_at is not None and now >= grant.expires_at

    def _refuse_again(self, error: TokenError, now: float) -> list[Action]:
        """Refuse a credential on an open connection. It closes only if the client persists, on any connection."""
        if self.grant is None:
            raise error
        wait_s, is_exhausted = self._failures.failed_as(self.grant.client_id, now)
        if wait_s <= 0:
            refusal = ClientError(ClientErrorCode.UNAUTHENTICATED, wire.AuthMessage.INVALID)
            return [Refused(wire.AuthMessage.INVALID, error.reason, error.client_id), *self.rejected(refusal, now)]
        actions: list[Action] = [
            Refused(wire.AuthMessage.RATE_LIMITED, error.reason, error.client_id),
            Send(wire.error_frame(ClientErrorCode.RATE_LIMITED, wire.AuthMessage.RATE_LIMITED, retry_after_s=wait_s)),
        ]
        return [*actions, *self._stop(Close.RATE_LIMITED)] if is_exhausted else actions

    def _pong(self, command: wire.Command, now: float) -> list[Action]:
        assert isinstance(command, wire.Ping)
        return [Send(wire.pong_frame(command, now))]

    def _stats(self, _command: wire.Command, _now: float) -> list[Action]:
        return [Send(wire.stats_frame(self._house.counters()))]

    def _subscribe(self, command: wire.Command, _now: float) -> list[Action]:
        assert isinstance(command, wire.Subscribe)
        if not self.may_read:
            raise ClientError(ClientErrorCode.FORBIDDEN, "this token has no `read` permission")
        wanted = command.filters
        self._charge(terms(wanted) // TERMS_PER_TOKEN + (REPLAY_COST if command.since is not None else 0.0))
        chosen = EVERYTHING if wanted in ({}, None) else parse_filter(wanted, max_addresses=self._limits.max_addresses)
        return [Attach(chosen, command.since)]

    def _unsubscribe(self, _command: wire.Command, _now: float) -> list[Action]:
        return [Detach(), Send(wire.unsubscribed_frame())]

    def _refresh(self, _command: wire.Command, now: float) -> list[Action]:
        if self._authenticator is None or self.grant is None:
            raise ClientError(ClientErrorCode.INVALID_MESSAGE, "this server has no authentication: nothing to refresh")
        if self._is_late:
            raise ClientError(ClientErrorCode.FORBIDDEN, "this token has ended: ask for a new one")
        try:
            token, grant = self._authenticator.refresh(self.grant, now)
        except TokenError as error:
            if error.reason is TokenRefusal.REVOKED:
                return [FamilyEnded(self.grant), *self._stop(Close.TOKEN_REVOKED)]
            raise ClientError(ClientErrorCode.FORBIDDEN, "this token cannot be refreshed; ask for a new one") from None
        self._refreshed = (self.grant, now)
        self._use_grant(grant, now)
        return [Send(wire.token_frame(token, grant))]

    _TABLE: ClassVar[
        dict[tuple[State, type[wire.Command]], Callable[["Session", wire.Command, float], list[Action]]]
    ] = {
        (State.AUTHENTICATING, wire.Auth): _authenticate,
        (State.READY, wire.Auth): _authenticate_again,
        (State.READY, wire.Ping): _pong,
        (State.READY, wire.Stats): _stats,
        (State.READY, wire.Subscribe): _subscribe,
        (State.READY, wire.Unsubscribe): _unsubscribe,
        (State.READY, wire.Refresh): _refresh,
    }

    # --- endings ---

    def _refuse(self, message: wire.AuthMessage, error: TokenError | None = None) -> list[Action]:
        return [
            Refused(message) if error is None else Refused(message, error.reason, error.client_id),
            Send(wire.error_frame(ClientErrorCode.UNAUTHENTICATED, message)),
            *self._stop(Close.AUTH_REQUIRED),
        ]

    def _refuse_for_now(self, wait_s: float, error: TokenError) -> list[Action]:
        """Refuse a claimant with too many failed credentials, and state when it may try again."""
        return [
            Refused(wire.AuthMessage.RATE_LIMITED, error.reason, error.client_id),
            Send(wire.error_frame(ClientErrorCode.RATE_LIMITED, wire.AuthMessage.RATE_LIMITED, retry_after_s=wait_s)),
            *self._stop(Close.AUTH_LIMITED),
        ]

    def _refuse_connection(self) -> list[Action]:
        most = self._clients.max_connections
        message = f"this client has as many connections as it may have ({most})"
        return [
            Crowded(),
            Send(wire.error_frame(ClientErrorCode.TOO_MANY_CONNECTIONS, message, retry_after_s=CROWDED_RETRY_S)),
            *self._stop(Close.FULL),
        ]

    def _take(self, now: float, cost: float) -> list[Action]:
        """Take tokens from the budgets of the connection and its client. Return the refusal if one is used up."""
        if self._bucket.take(now, cost) > 0:
            return self._limited(Limit.CONNECTION)
        if self.client is not None and self.client.bucket.take(now, cost) > 0:
            return self._limited(Limit.CLIENT)
        return []

    def _charge(self, cost: float) -> None:
        self._bucket.charge(cost)
        if self.client is not None:
            self.client.bucket.charge(cost)

    def _limited(self, limit: Limit) -> list[Action]:
        bucket = self._bucket
        if limit is Limit.CLIENT and self.client is not None:
            bucket = self.client.bucket
        refusal = wire.error_frame(
            ClientErrorCode.RATE_LIMITED, "Rate limit exceeded", retry_after_s=bucket.retry_after_s
        )
        if bucket is self._bucket and bucket.is_exhausted:
            return [Limited(limit), Send(refusal), *self._stop(Close.RATE_LIMITED)]
        return [Limited(limit), Send(refusal)]

    def _stop(self, close: Close) -> list[Action]:
        self.state = State.CLOSED
        return [Stop(close)]


class SessionLimits(Struct, frozen=True, kw_only=True):
    """The configuration of sessions, shared by all of them."""

    messages_per_second: float
    message_burst: float
    max_addresses: int
    expiry_grace_s: float
    leeway_s: float = 0.0

    @classmethod
    def of(cls, gateway: GatewaySettings, auth: AuthSettings) -> "SessionLimits":
        """Take the session limits from the configuration."""
        return cls(
            messages_per_second=gateway.messages_per_second,
            message_burst=float(gateway.message_burst),
            max_addresses=gateway.max_addresses,
            expiry_grace_s=auth.expiry_grace,
            leeway_s=auth.leeway,
        )
