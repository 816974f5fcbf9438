"""API keys in memory: what is accepted, and that every refusal takes the same steps."""

from collections import Counter

import pytest
from msgspec.structs import replace

from kit.calls import work
from kit.whales import NOW
from whaled.auth.apikeys import ApiKey, ApiKeys
from whaled.auth.apikeytext import digest_of, key_of
from whaled.errors import TokenError, TokenRefusal
from whaled.model import Permission


def stored(text: str, name: str = "whkid_1") -> ApiKey:
    return ApiKey(
        id=name,
        digest=digest_of(text),
        client_id="c1",
        permissions=frozenset({Permission.READ}),
        created_at=NOW - 100,
        created_by="uid 0",
        networks=("10.0.0.0/8",),
        fixed_filter='{"min_btc":500}',
        rate=5.0,
        expires_at=NOW + 10,
    )


GOOD = key_of(b"g" * 32)
EXPIRED = key_of(b"e" * 32)
REVOKED = key_of(b"r" * 32)
KEYS = (
    stored(GOOD),
    replace(stored(EXPIRED, "whkid_2"), expires_at=NOW),
    replace(stored(REVOKED, "whkid_3"), revoked_at=NOW - 1),
)
REFUSALS = {
    "unknown": (key_of(b"u" * 32), TokenRefusal.UNKNOWN_API_KEY),
    "the stand-in": (key_of(bytes(32)), TokenRefusal.UNKNOWN_API_KEY),
    "expired": (EXPIRED, TokenRefusal.EXPIRED),
    "revoked": (REVOKED, TokenRefusal.REVOKED),
    "wrong checksum": (GOOD[:-1] + ("0" if GOOD[-1] != "0" else "1"), TokenRefusal.MALFORMED),
    "too short": (GOOD[:-1], TokenRefusal.MALFORMED),
    "too long": (GOOD + "0", TokenRefusal.MALFORMED),
    "large": ("whk_" + "x" * 9000, TokenRefusal.MALFORMED),
    "white space behind": (GOOD + "\n", TokenRefusal.MALFORMED),
    "letters that look alike": (GOOD[:10] + "\u0430" + GOOD[11:], TokenRefusal.MALFORMED),
    "half a surrogate pair": ("whk_\ud800", TokenRefusal.MALFORMED),
    "nothing": ("", TokenRefusal.MALFORMED),
}


def refused(text: str, keys: ApiKeys) -> TokenError:
    with pytest.raises(TokenError) as caught:
        keys.verify(text, NOW)
    return caught.value


def test_a_key_grants_what_is_stored_with_it() -> None:
    grant = ApiKeys(KEYS).verify(GOOD, NOW)
    assert (grant.client_id, grant.permissions, grant.kind) == ("c1", frozenset({Permission.READ}), "api_key")
    assert (grant.networks, grant.fixed_filter, grant.rate) == (("10.0.0.0/8",), '{"min_btc":500}', 5.0)
    assert (grant.token_id, grant.expires_at, grant.family) == ("whkid_1", NOW + 10, None)


@pytest.mark.parametrize("name", REFUSALS)
def test_a_refusal_has_its_reason_and_counts_as_no_use(name: str) -> None:
    text, reason = REFUSALS[name]
    keys = ApiKeys(KEYS)
    assert refused(text, keys).reason is reason
    assert keys.take_uses() == {}


def test_failures_count_for_the_key_that_was_presented() -> None:
    keys = ApiKeys(KEYS)
    claimants = [refused(REFUSALS[name][0], keys).claimant for name in ("unknown", "expired", "too short")]
    assert len(set(claimants)) == 3
    assert claimants[2] == ""
    assert refused(EXPIRED, keys).client_id == "c1"
    assert refused(REFUSALS["unknown"][0], keys).client_id == ""


@pytest.mark.parametrize("name", REFUSALS)
def test_every_refusal_takes_the_steps_of_an_expired_key(name: str) -> None:
    keys = ApiKeys(KEYS)

    def checked(text: str) -> Counter[str]:
        def call() -> None:
            try:
                keys.verify(text, NOW)
            except TokenError:
                return
            raise AssertionError

        return Counter(work(call))

    usual, found = checked(EXPIRED), checked(REFUSALS[name][0])
    for step in ("openssl_sha256", "compare_digest", "ApiKey.state", "ApiKey.grant", "is_key", "_checksum", "dict.get"):
        assert found[step] == usual[step] == 1, (step, found)


def test_a_session_ends_with_its_key() -> None:
    keys = ApiKeys(KEYS)
    grant = keys.verify(GOOD, NOW)
    assert keys.is_in_force(grant, NOW)
    keys.replace([replace(KEYS[0], last_used_at=NOW)])
    assert keys.is_in_force(grant, NOW)
    keys.replace([replace(KEYS[0], revoked_at=NOW)])
    assert not keys.is_in_force(grant, NOW)
    keys.replace([replace(KEYS[0], networks=("10.0.0.0/9",))])
    assert not keys.is_in_force(grant, NOW)
    keys.replace([])
    assert not keys.is_in_force(grant, NOW)


def test_uses_are_handed_over_once_and_taken_back_if_they_cannot_be_stored() -> None:
    keys = ApiKeys(KEYS)
    keys.verify(GOOD, NOW)
    uses = keys.take_uses()
    assert uses == {"whkid_1": NOW}
    assert keys.take_uses() == {}
    keys.verify(GOOD, NOW + 1)
    keys.give_back(uses)
    assert keys.take_uses() == {"whkid_1": NOW + 1}


def test_only_keys_that_are_accepted_are_counted() -> None:
    assert ApiKeys(KEYS).count(NOW) == 1
    assert ApiKeys(KEYS).count(NOW + 10) == 0


def test_no_text_of_a_key_has_its_digest() -> None:
    assert KEYS[0].digest.hex() not in repr(KEYS[0])
    assert repr(KEYS[0].digest) not in repr(KEYS[0])
