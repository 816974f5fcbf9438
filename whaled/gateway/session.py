"""The protocol state machine of one connection: commands and deadlines in, actions out.

`Session._perform` has the commands of each state. The module does no I/O: the server performs the actions, reads the
clock and owns the socket.

Pure.
"""

from enum import Enum, auto
from typing import Protocol

from whaled.errors import ClientError, ClientErrorCode, Close, TokenError, TokenRefusal
from whaled.gateway import commands, messages
from whaled.gateway.actions import (
    Action,
    Admit,
    Attach,
    Crowded,
    Detach,
    FamilyEnded,
    Limited,
    Refused,
    Rejected,
    Send,
    Stop,
)
from whaled.gateway.budget import Budget
from whaled.gateway.clients import Client, Clients
from whaled.gateway.credential import Authenticator, Credential
from whaled.gateway.entitlement import judge, narrowed
from whaled.gateway.limits import (
    BYTES_PER_TOKEN,
    EVENTS_PER_TOKEN,
    REPLAY_COST,
    TERMS_PER_TOKEN,
    FailureLimit,
    Limit,
    SessionLimits,
    terms,
)
from whaled.model import Grant, Permission, Position
from whaled.whales.filters import EVERYTHING, Filter, parse_filter

# The cost of a malformed message, in messages, so that guessing at the protocol is not cheaper than using it.
MALFORMED_COST = 5.0
# The retry_after sent to a client with too many connections: about the time until a connection that broke without a
# close is noticed.
CROWDED_RETRY_S = 30.0


class Surroundings(Protocol):
    """The state of the gateway that sessions read."""

    def position(self) -> Position:
        """Return the position of the newest published event."""
        ...

    def counters(self) -> messages.Counters:
        """Return the data of the `stats` answer."""
        ...


class State(Enum):
    """The state of a session. The state of delivery (live, replaying, paused) belongs to the hub and the server."""

    AUTHENTICATING = auto()
    READY = auto()
    CLOSED = auto()


class Session:
    """The protocol rules of one connection."""

    __slots__ = (
        "_address", "_authenticator", "_base", "_budget", "_clients", "_credential", "_failures", "_house", "_limits",
        "last_message", "state",
    )  # fmt: skip

    def __init__(
        self,
        *,
        limits: SessionLimits,
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
        self._budget = Budget(limits, clients, now)
        self._credential: Credential | None = None
        self._base: Filter = EVERYTHING  # what this client receives without a filter of its own
        self.last_message = commands.MessageType.INVALID
        self.state = State.AUTHENTICATING

    @property
    def client(self) -> Client | None:
        """The client that this connection is one of; None before authentication and without it."""
        return self._budget.client

    @property
    def grant(self) -> Grant | None:
        """The identity that the client's credential proves; None before authentication and without it."""
        return self._credential.grant if self._credential is not None else None

    @property
    def may_read(self) -> bool:
        """True if this client may receive alerts. Without authentication every client may."""
        grant = self.grant
        return self._authenticator is None or (grant is not None and Permission.READ in grant.permissions)

    @property
    def source(self) -> str:
        """The name that work is attributed to: the client id, or the address before authentication."""
        return self._address if self.client is None else self.client.client_id

    def budget(self, now: float) -> float:
        """Return the messages that the connection may still send at once; negative while it has to wait."""
        return self._budget.left(now)

    def charge_replay(self, events: int) -> None:
        """Charge the client for events that were read from the event log for it."""
        self._budget.charge(events / EVENTS_PER_TOKEN)

    # --- events of the connection ---

    def opened(self, credential: str | None, now: float) -> list[Action]:
        """Handle the end of the handshake. `credential` is the one sent with it, if any."""
        if self._authenticator is None:
            self.state = State.READY
            return [Send(messages.welcome(None, self._house.position(), now)), Admit(None, True)]
        if credential is not None:
            return self._authenticate(credential, now)
        return []

    def would_parse(self, now: float) -> bool:
        """Return whether `received` would parse a text message now. If not, its content does not matter."""
        if self.state is not State.READY:
            return self.state is State.AUTHENTICATING
        return self._budget.may_pass(now)

    def received(self, raw: bytes | bytearray, now: float, arrived_bytes: int = 0) -> list[Action]:
        """Handle a text message.

        A message over the rate limit is not parsed, except before authentication, where the answer depends on it.
        `arrived_bytes` is its compressed size: the larger of the two sizes determines the cost.
        """
        if self.state is State.CLOSED:
            return []
        self.last_message = commands.MessageType.INVALID
        limited = self._take(now, 1.0 + max(len(raw), arrived_bytes) // BYTES_PER_TOKEN)
        if limited and self.state is State.READY:
            return limited
        try:
            command = commands.parse(raw)
        except ClientError as error:
            if self.state is State.AUTHENTICATING:
                return self._refuse(messages.AuthMessage.FIRST)
            return self.rejected(error, now)
        self.last_message = commands.MessageType.of(command)
        if limited:
            return limited
        try:
            return self._perform(command, now)
        except ClientError as error:
            return self.rejected(error, now)

    def _perform(self, command: commands.Command, now: float) -> list[Action]:
        """Return the actions of a command. Raises ClientError."""
        match self.state, command:
            case State.AUTHENTICATING, commands.Auth(credential=credential):
                return self._authenticate(credential, now)
            case State.AUTHENTICATING, _:
                return self._refuse(messages.AuthMessage.FIRST)
            case _, commands.Auth(credential=credential):
                return self._authenticate_again(credential, now)
            case _, commands.Ping():
                return [Send(messages.pong(command, now))]
            case _, commands.Stats():
                return [Send(messages.stats(self._house.counters()))]
            case _, commands.Subscribe(filters=filters, since=since):
                return self._subscribe(filters, since)
            case _, commands.Unsubscribe():
                return [Detach(), Send(messages.unsubscribed())]
            case _, commands.Refresh():
                return self._refresh(now)

    def received_binary(self, now: float) -> list[Action]:
        """Refuse a binary message. The protocol has none."""
        if self.state is State.CLOSED:
            return []
        self.last_message = commands.MessageType.INVALID
        if self.state is State.AUTHENTICATING:
            return self._refuse(messages.AuthMessage.FIRST)
        if limited := self._take(now, 1.0):
            return limited
        return self.rejected(ClientError(ClientErrorCode.INVALID_MESSAGE, "binary frames are not accepted"), now)

    def received_control(self, now: float) -> list[Action]:
        """Charge for a ping or pong frame, or a fragment of a message. Each costs as much as a message."""
        if self._budget.take_control(now) or self.state is State.CLOSED:
            return []
        if self.state is State.READY:
            return self._limited(Limit.CONNECTION)
        return self._refuse(messages.AuthMessage.RATE_LIMITED) if self._budget.is_exhausted else []

    def auth_deadline(self) -> list[Action]:
        """Handle the end of the time to authenticate."""
        return self._refuse(messages.AuthMessage.TIMEOUT) if self.state is State.AUTHENTICATING else []

    def next_deadline(self) -> float | None:
        """Return when to call `tick` (Unix seconds); None if never."""
        if self._credential is None:
            return None
        limits = self._limits
        return self._credential.next_deadline(leeway_s=limits.leeway_s, expiry_grace_s=limits.expiry_grace_s)

    def tick(self, now: float) -> list[Action]:
        """Send the warning before the credential expires, or close the connection if it has expired."""
        deadline = self.next_deadline()
        credential = self._credential
        if self.state is not State.READY or deadline is None or credential is None or now < deadline:
            return []
        if not credential.was_warned:
            credential.was_warned = True
            return [Send(messages.token_expiring(credential.grant))]
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
        parent = self._credential.lost_parent(now) if self._credential is not None else None
        if parent is not None and self._credential is not None and self._authenticator is not None:
            self._authenticator.answer_lost(parent, self._credential.grant)

    def rejected(self, error: ClientError, now: float) -> list[Action]:
        """Answer an invalid message with an error. The connection closes only if the client persists."""
        self._budget.fine(now, MALFORMED_COST - 1.0)
        if self._budget.is_exhausted:
            return [Rejected(error.code), *self._limited(Limit.CONNECTION)]
        return [Rejected(error.code), Send(messages.error(error.code, str(error), path=error.path))]

    # --- commands ---

    def _authenticate(self, credential: str | None, now: float) -> list[Action]:
        if credential is None or self._authenticator is None:
            return self._refuse(messages.AuthMessage.TOKEN_REQUIRED)
        try:
            # Verify even beyond the failure limit: failures of others must not keep out a valid token, and it is cheap.
            grant = self._authenticator.verify(credential, now)
            self._base = judge(grant, self._address)
        except TokenError as error:
            wait_s = self._failures.failed(self._address, error.claimant, now)
            if wait_s > 0:
                return self._refuse_for_now(wait_s, error)
            return self._refuse(messages.AuthMessage.INVALID, error)
        self._budget.client = self._clients.enter(grant.client_id, now, self._budget.factor(grant.rate))
        if self._budget.client is None:
            return self._refuse_connection()
        self._budget.scale(grant.rate)
        self._credential = Credential(grant, now)
        self.state = State.READY
        return [
            Send(messages.auth_success(grant)),
            Send(messages.welcome(grant, self._house.position(), now)),
            Admit(grant, self.may_read, self._base),
        ]

    def _authenticate_again(self, credential: str | None, now: float) -> list[Action]:
        if self._authenticator is None:
            return [Send(messages.auth_success(None))]
        if credential is None:
            raise ClientError(ClientErrorCode.UNAUTHENTICATED, messages.AuthMessage.TOKEN_REQUIRED)
        try:
            grant = self._authenticator.verify(credential, now)
            if self.grant is None or grant.client_id != self.grant.client_id:
                raise TokenError(TokenRefusal.BAD_CLAIMS, "another client's token on an open connection")
            base = judge(grant, self._address)
        except TokenError as error:
            return self._refuse_again(error, now)
        if base != self._base:  # events may already be on their way by the filter in force
            raise ClientError(ClientErrorCode.FORBIDDEN, "this credential has another fixed filter: connect with it")
        could_read = self.may_read
        self._budget.scale(grant.rate)
        self._credential = Credential(grant, now)
        actions: list[Action] = [Send(messages.auth_success(grant))]
        if could_read and not self.may_read:
            actions.append(Detach())
        return actions

    def _refuse_again(self, error: TokenError, now: float) -> list[Action]:
        """Refuse a credential on an open connection. It closes only if the client persists, on any connection."""
        if self.grant is None:
            raise error
        wait_s, is_exhausted = self._failures.failed_as(self.grant.client_id, now)
        if wait_s <= 0:
            refusal = ClientError(ClientErrorCode.UNAUTHENTICATED, messages.AuthMessage.INVALID)
            return [Refused(messages.AuthMessage.INVALID, error.reason, error.client_id), *self.rejected(refusal, now)]
        actions: list[Action] = [
            Refused(messages.AuthMessage.RATE_LIMITED, error.reason, error.client_id),
            Send(messages.error(ClientErrorCode.RATE_LIMITED, messages.AuthMessage.RATE_LIMITED, retry_after_s=wait_s)),
        ]
        return [*actions, *self._stop(Close.RATE_LIMITED)] if is_exhausted else actions

    def _subscribe(self, wanted: object, since: commands.Since | None) -> list[Action]:
        if not self.may_read:
            raise ClientError(ClientErrorCode.FORBIDDEN, "this token has no `read` permission")
        self._budget.charge(terms(wanted) // TERMS_PER_TOKEN + (REPLAY_COST if since is not None else 0.0))
        chosen = EVERYTHING if wanted in ({}, None) else parse_filter(wanted, max_addresses=self._limits.max_addresses)
        return [Attach(narrowed(chosen, self._base), since)]

    def _refresh(self, now: float) -> list[Action]:
        credential = self._credential
        if self._authenticator is None or credential is None:
            raise ClientError(ClientErrorCode.INVALID_MESSAGE, "this server has no authentication: nothing to refresh")
        if credential.is_key:
            raise ClientError(ClientErrorCode.FORBIDDEN, "an API key is not refreshed: it is valid until it expires")
        if credential.is_late:
            raise ClientError(ClientErrorCode.FORBIDDEN, "this token has ended: ask for a new one")
        try:
            token, grant = self._authenticator.refresh(credential.grant, now)
        except TokenError as error:
            if error.reason is TokenRefusal.REVOKED:
                return [FamilyEnded(credential.grant), *self._stop(Close.TOKEN_REVOKED)]
            raise ClientError(ClientErrorCode.FORBIDDEN, "this token cannot be refreshed; ask for a new one") from None
        self._credential = Credential(grant, now, replaced=credential.grant)
        return [Send(messages.token(token, grant))]

    # --- endings ---

    def _refuse(self, message: messages.AuthMessage, error: TokenError | None = None) -> list[Action]:
        return [
            Refused(message) if error is None else Refused(message, error.reason, error.client_id),
            Send(messages.error(ClientErrorCode.UNAUTHENTICATED, message)),
            *self._stop(Close.AUTH_REQUIRED),
        ]

    def _refuse_for_now(self, wait_s: float, error: TokenError) -> list[Action]:
        """Refuse a claimant with too many failed credentials, and state when it may try again."""
        return [
            Refused(messages.AuthMessage.RATE_LIMITED, error.reason, error.client_id),
            Send(messages.error(ClientErrorCode.RATE_LIMITED, messages.AuthMessage.RATE_LIMITED, retry_after_s=wait_s)),
            *self._stop(Close.AUTH_LIMITED),
        ]

    def _refuse_connection(self) -> list[Action]:
        most = self._clients.max_connections
        message = f"this client has as many connections as it may have ({most})"
        return [
            Crowded(),
            Send(messages.error(ClientErrorCode.TOO_MANY_CONNECTIONS, message, retry_after_s=CROWDED_RETRY_S)),
            *self._stop(Close.FULL),
        ]

    def _take(self, now: float, cost: float) -> list[Action]:
        """Take tokens for a message. Return the refusal if it exceeds a limit."""
        limit = self._budget.take(now, cost)
        return [] if limit is None else self._limited(limit)

    def _limited(self, limit: Limit) -> list[Action]:
        retry_after_s = self._budget.retry_after_s(limit)
        refusal = messages.error(ClientErrorCode.RATE_LIMITED, "Rate limit exceeded", retry_after_s=retry_after_s)
        if limit is Limit.CONNECTION and self._budget.is_exhausted:
            return [Limited(limit), Send(refusal), *self._stop(Close.RATE_LIMITED)]
        return [Limited(limit), Send(refusal)]

    def _stop(self, close: Close) -> list[Action]:
        self.state = State.CLOSED
        return [Stop(close)]
