"""The trusted issuers: which of them a token is from, its verification, and what ends its grant."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

from whaled.auth.oidc.access_token import Policy, UnknownKeyError, stated_issuer, verified
from whaled.auth.oidc.fetch import Fetcher
from whaled.auth.oidc.keeper import Keeper
from whaled.auth.oidc.meters import IssuerMeter
from whaled.config.sections import AuthSettings, IssuerSettings
from whaled.errors import TokenError, TokenRefusal
from whaled.model import Grant

# A start waits this long for the first key sets, because until then every token of an issuer is refused. An issuer that
# is away must not delay clients with other credentials for longer.
FIRST_KEYS_S = 5.0


class Issuers:
    """Verifies access tokens of the configured issuers. Key sets are fetched while `running`."""

    def __init__(self, settings: AuthSettings, meter: IssuerMeter) -> None:
        self._meter = meter
        self._policies: dict[str, Policy] = {}
        self._keepers: dict[str, Keeper] = {}
        self._is_changed = asyncio.Event()
        self.reconfigure(settings)

    def reconfigure(self, settings: AuthSettings) -> None:
        """Use other issuers from now on. `is_in_force` then decides which sessions end.

        An issuer whose address stays the same keeps its keys until they are fetched again.
        """
        old = self._keepers
        trusted = settings.issuers if settings.enabled else ()
        self._policies = {each.issuer: Policy.of(each, settings.max_token_ttl) for each in trusted}
        self._keepers = {each.issuer: self._keeper(each, old.get(each.issuer)) for each in trusted}
        names = {each.name for each in trusted}
        for gone in {keeper.settings.name for keeper in old.values()} - names:
            self._meter.ends(gone)
        for name in names:
            self._meter.begins(name)
        self._is_changed.set()

    def _keeper(self, settings: IssuerSettings, old: Keeper | None) -> Keeper:
        if old is None:
            return Keeper(settings, self._meter)
        if old.settings == settings:
            return old
        # Other algorithms select other keys of a set, and another address may have another set.
        is_same = (old.settings.jwks_uri, old.settings.algorithms) == (settings.jwks_uri, settings.algorithms)
        return Keeper(settings, self._meter, keys=old.keys if is_same else None)

    # --- tokens ---

    def knows(self, issuer: str) -> bool:
        """Return whether the tokens of an issuer are accepted."""
        return issuer in self._policies

    def owns(self, client_id: str) -> bool:
        """Return whether a client id belongs to an issuer: no other credential may have it."""
        name, colon, _ = client_id.partition(":")
        return bool(colon) and any(policy.settings.name == name for policy in self._policies.values())

    def verify(self, credential: str, now: float) -> Grant:
        """Verify an access token and return its grant, without any wait. Raises TokenError."""
        issuer = stated_issuer(credential)
        policy = self._policies.get(issuer) if issuer is not None else None
        if policy is None:
            raise TokenError(TokenRefusal.BAD_CLAIMS, "`iss` is not a trusted issuer")
        keeper = self._keepers[policy.settings.issuer]
        try:
            return verified(credential, policy, keeper.keys, now)
        except UnknownKeyError:
            keeper.want()
            raise

    def is_in_force(self, grant: Grant, now: float) -> bool:  # noqa: ARG002 - the signature that all verifiers share
        """Return whether a grant is still accepted: its issuer is configured, and with the same rules for its tokens.

        A key that the issuer no longer publishes ends no session: issuers rotate keys without revoking tokens.
        """
        policy = self._policies.get(grant.issuer or "")
        return policy is not None and policy.mark == grant.key_mark

    # --- keys ---

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Fetch the key sets in the background of the `async with` block, which begins after the first attempts."""
        async with Fetcher.open() as fetcher, asyncio.TaskGroup() as tasks:
            keeping = tasks.create_task(self._keep(fetcher), name="issuers")
            with suppress(TimeoutError):
                async with asyncio.timeout(FIRST_KEYS_S):
                    for keeper in tuple(self._keepers.values()):
                        await keeper.was_asked.wait()
            try:
                yield
            finally:
                keeping.cancel()

    async def _keep(self, fetcher: Fetcher) -> None:
        """Have one task for each issuer, also after `reconfigure`, until cancelled."""
        tasks: dict[Keeper, asyncio.Task[None]] = {}
        async with asyncio.TaskGroup() as group:
            while True:
                self._is_changed.clear()
                keepers = set(self._keepers.values())
                for gone in tasks.keys() - keepers:
                    tasks.pop(gone).cancel()
                for new in keepers - tasks.keys():
                    tasks[new] = group.create_task(new.run(fetcher.key_set), name="issuer keys")
                await self._is_changed.wait()
