import asyncio

import pytest

from kit.issuers import issuer_settings, key_set
from whaled.auth.oidc.fetch import FetchError, FetchFailure
from whaled.auth.oidc.keeper import JITTER_PART, Keeper
from whaled.auth.oidc.keyset import KeySet
from whaled.auth.oidc.meters import IssuerMeter
from whaled.config.sections import IssuerSettings
from whaled.registry import Registry


class Source:
    """Key sets, or failures while `is_away`. It counts the fetches and ends the keeper after the last one."""

    def __init__(self, most: int, *, is_away: bool = False) -> None:
        self.most = most
        self.is_away = is_away
        self.fetches = 0

    async def fetch(self, settings: IssuerSettings) -> KeySet:
        self.fetches += 1
        if self.fetches > self.most:
            raise asyncio.CancelledError
        if self.is_away:
            raise FetchError(FetchFailure.TIMEOUT, "no answer")
        return key_set()


@pytest.mark.parametrize(
    ("failures", "least_s"), [(0, 600), (1, 5), (2, 10), (3, 20), (7, 320), (8, 600), (10**6, 600)]
)
def test_delays_double_up_to_the_interval_and_vary_by_a_fifth(failures: int, least_s: float) -> None:
    keeper = Keeper(issuer_settings(), IssuerMeter(Registry()))
    keeper._failures = failures
    delays = [keeper._delay_s() for _ in range(200)]
    assert least_s * (1 - JITTER_PART) <= min(delays) < least_s < max(delays) <= least_s * (1 + JITTER_PART)


@pytest.mark.parametrize("is_away", [False, True])
async def test_keys_are_fetched_again_and_again(is_away: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("whaled.auth.oidc.keeper.RETRY_FIRST_S", 0.001)
    keeper = Keeper(issuer_settings(refresh_interval=0.001), IssuerMeter(Registry()))
    source = Source(3, is_away=is_away)
    with pytest.raises(asyncio.CancelledError):
        await keeper.run(source.fetch)
    assert source.fetches == 4
    assert (keeper.keys is None) is is_away


async def test_unknown_keys_do_not_delay_a_fetch_that_is_due_earlier() -> None:
    keeper = Keeper(issuer_settings(refresh_interval=0.001, unknown_key_interval=3600.0), IssuerMeter(Registry()))

    class Wanting(Source):
        async def fetch(self, settings: IssuerSettings) -> KeySet:
            asyncio.get_running_loop().call_soon(keeper.want)
            return await super().fetch(settings)

    source = Wanting(3)
    async with asyncio.timeout(10):
        with pytest.raises(asyncio.CancelledError):
            await keeper.run(source.fetch)
    assert source.fetches == 4
