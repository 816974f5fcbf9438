"""The gate: one verifier for all kinds of credentials, behind which the revocations are checked."""

from typing import Protocol

from whaled.auth.revocations import Kind, Revocation, Revocations
from whaled.auth.signature import claimant, claimed_issuer
from whaled.auth.tokens import TokenAuthenticator, family_of
from whaled.auth.tokentext import API_KEY_PREFIX
from whaled.errors import TokenError, TokenRefusal
from whaled.model import CredentialKind, Grant

REVOKED = "it, its family, its client or its key was revoked"
FOREIGN = "its client id begins with the name of an issuer and a colon"


class Verifier(Protocol):
    """The verifier of one kind of credential."""

    def verify(self, credential: str, now: float) -> Grant:
        """Return the client and its permissions. Raises TokenError."""
        ...

    def is_in_force(self, grant: Grant, now: float) -> bool:
        """Return whether an earlier grant is still accepted, apart from its expiry."""
        ...


class Issuers(Verifier, Protocol):
    """The verifier of tokens that other issuers signed."""

    def knows(self, issuer: str) -> bool:
        """Return whether the tokens of an issuer are accepted."""
        ...

    def owns(self, client_id: str) -> bool:
        """Return whether a client id belongs to an issuer: no other credential may have it."""
        ...


class Ledger(Protocol):
    """The queue of notes for the database about refreshes, which nobody waits for."""

    def refreshed(self, grant: Grant) -> None:
        """Note a token that a refresh has issued."""
        ...

    def ended(self, revocation: Revocation) -> None:
        """Note a family that has ended."""
        ...


class Gate:
    """Verifies, refreshes and revokes what the gateway admits.

    An API key is recognised by its prefix and a token of another issuer by its unverified `iss`; the ring verifies
    everything else. Revocations apply to the tokens of the ring and of other issuers. API keys are revoked where they
    are kept.
    """

    def __init__(
        self,
        *,
        ring: TokenAuthenticator,
        revocations: Revocations,
        api_keys: Verifier | None = None,
        issuers: Issuers | None = None,
        ledger: Ledger | None = None,
    ) -> None:
        self._ring = ring
        self._revocations = revocations
        self._api_keys = api_keys
        self._issuers = issuers
        self._ledger = ledger

    def verify(self, credential: str, now: float) -> Grant:
        """Verify a credential. Raises TokenError."""
        grant = self._verifier_for(credential).verify(credential, now)
        if self._is_an_issuers(grant):
            raise TokenError(TokenRefusal.BAD_CLAIMS, FOREIGN, claimant=claimant(credential), client_id=grant.client_id)
        if self._is_revoked(grant, now):
            raise TokenError(TokenRefusal.REVOKED, REVOKED, claimant=claimant(credential), client_id=grant.client_id)
        return grant

    def is_in_force(self, grant: Grant, now: float) -> bool:
        """Return whether an earlier grant is still accepted, apart from its expiry."""
        verifier: Verifier | None = self._ring
        if grant.kind != CredentialKind.TOKEN:
            verifier = {CredentialKind.API_KEY: self._api_keys, CredentialKind.OIDC: self._issuers}.get(grant.kind)
        if verifier is None or self._is_an_issuers(grant):
            return False
        return verifier.is_in_force(grant, now) and not self._is_revoked(grant, now)

    def refresh(self, grant: Grant, now: float) -> tuple[str, Grant]:
        """Return a new token for the same client with the same permissions, and its grant. Raises TokenError.

        Only a token of the ring can be refreshed.
        """
        # REVOKED would mean that a family ends now. The recheck that is due closes a session with a revoked token.
        if grant.kind != CredentialKind.TOKEN or self._is_revoked(grant, now):
            raise TokenError(TokenRefusal.UNKNOWN_KEY, "not a token that can be refreshed", client_id=grant.client_id)
        try:
            token, refreshed = self._ring.refresh(grant, now)
        except TokenError as error:
            if error.reason is TokenRefusal.REVOKED:
                self._end(Revocation(Kind.ENDED, family_of(grant), now, self._ring.ended_until(grant)))
            raise
        if self._is_revoked(refreshed, now):
            raise TokenError(TokenRefusal.UNKNOWN_KEY, "the signing key is revoked", client_id=grant.client_id)
        if self._ledger is not None:
            self._ledger.refreshed(refreshed)
        return token, refreshed

    def answer_lost(self, parent: Grant, child: Grant) -> None:
        """Record that the refreshed token `child` may not have reached its client."""
        if child.kind == CredentialKind.TOKEN:
            self._ring.answer_lost(parent, child)

    def _end(self, revocation: Revocation) -> None:
        self._revocations.add(revocation)
        if self._ledger is not None:
            self._ledger.ended(revocation)

    def _is_an_issuers(self, grant: Grant) -> bool:
        """Return whether a credential that is not an issuer's names a client of one."""
        return grant.kind != CredentialKind.OIDC and self._issuers is not None and self._issuers.owns(grant.client_id)

    def _is_revoked(self, grant: Grant, now: float) -> bool:
        return grant.kind != CredentialKind.API_KEY and self._revocations.cover(grant, now)

    def _verifier_for(self, credential: str) -> Verifier:
        if self._api_keys is not None and credential.startswith(API_KEY_PREFIX):
            return self._api_keys
        if self._issuers is not None and self._issuers.knows(claimed_issuer(credential)):
            return self._issuers
        return self._ring
