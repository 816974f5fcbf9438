"""The parts that verify credentials in the daemon, wired together."""

import secrets
from contextlib import AbstractAsyncContextManager
from pathlib import Path

from whaled.auth import store
from whaled.auth.access import AccessKeeper
from whaled.auth.apikeykeeper import ApiKeyKeeper
from whaled.auth.gate import Gate
from whaled.auth.ledger import NoteQueue
from whaled.auth.meters import AccessMeter, ApiKeyMeter
from whaled.auth.oidc.issuers import Issuers
from whaled.auth.oidc.meters import IssuerMeter
from whaled.auth.revocations import Revocations
from whaled.auth.tokens import KeyRing, TokenAuthenticator
from whaled.config.sections import AuthSettings


class Credentials:
    """The key ring, the API keys, the issuers and the revocations of one daemon.

    `gate` verifies all kinds of credentials; it is None without authentication, where `ring` is None.
    """

    def __init__(
        self,
        ring: KeyRing | None,
        settings: AuthSettings,
        *,
        access: AccessMeter,
        api_keys: ApiKeyMeter,
        issuers: IssuerMeter,
    ) -> None:
        self._settings = settings
        self._meter = access
        self._revocations = Revocations()
        self._notes = NoteQueue(access)
        self._api_keys = ApiKeyKeeper(api_keys)
        self.issuers = Issuers(settings, issuers)
        self._ring: TokenAuthenticator | None = None
        self.gate: Gate | None = None
        if ring is not None:
            self._ring = TokenAuthenticator(ring, settings, new_token_id=_new_token_id)
            self.gate = Gate(
                ring=self._ring,
                revocations=self._revocations,
                api_keys=self._api_keys.keys,
                issuers=self.issuers,
                ledger=self._notes,
            )

    def stored(self, event_log: Path) -> AbstractAsyncContextManager[AccessKeeper]:
        """Open the access database beside an event log, and load it. Raises AccessError."""
        return AccessKeeper.opened(
            store.beside(event_log),
            self._revocations,
            self._notes,
            self._meter,
            settings=lambda: self._settings,  # those of the last reload
            api_keys=self._api_keys,
        )

    def reconfigure(self, ring: KeyRing | None, settings: AuthSettings) -> None:
        """Apply the keys and the settings of a reload. `gate.is_in_force` then decides which sessions end."""
        self._settings = settings
        if self._ring is not None and ring is not None:
            self._ring.replace_ring(ring, settings)
        self.issuers.reconfigure(settings)


def _new_token_id() -> str:
    return secrets.token_urlsafe(16)
