import pytest

from whaled.auth.revocations import Kind, Revocation, Revocations
from whaled.model import Grant

NOW = 1_800_000_000.0
GRANT = Grant(
    client_id="c1", permissions=frozenset(), issued_at=NOW - 10, authenticated_at=NOW - 20, expires_at=NOW + 100,
    token_id="t2", family="t1", key_id="k1",
)  # fmt: skip


def of(kind: Kind, name: str, *, at: float = NOW, until: float = NOW + 50) -> Revocations:
    revocations = Revocations()
    revocations.add(Revocation(kind, name, at, until))
    return revocations


@pytest.mark.parametrize(
    ("kind", "name"),
    [(Kind.TOKEN, "t2"), (Kind.FAMILY, "t1"), (Kind.ENDED, "c1\nt1"), (Kind.CLIENT, "c1"), (Kind.KEY, "k1")],
)
def test_a_token_is_covered_by_what_names_it_until_the_revocation_expires(kind: Kind, name: str) -> None:
    revocations = of(kind, name)
    assert revocations.cover(GRANT, NOW)
    assert revocations.cover(GRANT, NOW + 49.9)
    assert not revocations.cover(GRANT, NOW + 50)


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        (Kind.TOKEN, "t1"),
        (Kind.TOKEN, "k1"),
        (Kind.FAMILY, "t2"),
        (Kind.ENDED, "t1"),
        (Kind.ENDED, "c2\nt1"),
        (Kind.CLIENT, "c"),
        (Kind.CLIENT, "C1"),
        (Kind.KEY, "t2"),
    ],
)
def test_a_token_is_not_covered_by_the_name_of_something_else(kind: Kind, name: str) -> None:
    assert not of(kind, name).cover(GRANT, NOW)


@pytest.mark.parametrize(
    ("issued_at", "authenticated_at", "is_covered"),
    [
        (NOW, None, True),  # in the same second, as tokens count whole seconds
        (NOW + 1, None, False),
        (NOW + 1, NOW - 5, True),  # refreshed between the act and the moment at which the daemon noticed it
        (NOW - 5, NOW + 1, True),  # a claim of another issuer that makes no sense
        (None, None, True),  # nothing shows that it is newer
    ],
)
def test_of_a_client_the_tokens_issued_so_far_are_covered(
    issued_at: float | None, authenticated_at: float | None, *, is_covered: bool
) -> None:
    grant = Grant(
        client_id="c1", permissions=frozenset(), issued_at=issued_at, authenticated_at=authenticated_at, token_id="t"
    )
    assert of(Kind.CLIENT, "c1", at=NOW + 0.5).cover(grant, NOW + 2) is is_covered


def test_a_token_without_ids_is_covered_by_nothing_but_its_client() -> None:
    bare = Grant(client_id="c1", permissions=frozenset(), issued_at=NOW)
    for kind in (Kind.TOKEN, Kind.FAMILY, Kind.KEY):
        assert not of(kind, "None").cover(bare, NOW)
    assert of(Kind.CLIENT, "c1").cover(bare, NOW)


def test_a_second_revocation_extends_the_first_and_never_shortens_it() -> None:
    revocations = of(Kind.CLIENT, "c1", at=NOW, until=NOW + 50)
    revocations.add(Revocation(Kind.CLIENT, "c1", NOW - 100, NOW + 10))
    assert revocations.cover(GRANT, NOW + 20)
    revocations.add(Revocation(Kind.CLIENT, "c1", NOW - 100, NOW + 90))
    assert revocations.cover(GRANT, NOW + 80)
    assert revocations.size == 1


def test_expired_revocations_are_removed_a_few_at_a_time_and_the_others_stay() -> None:
    revocations = Revocations()
    for number in range(10):
        revocations.add(Revocation(Kind.TOKEN, f"t{number}", NOW, NOW + (5 if number % 2 else 50)))
    revocations.prune(NOW + 5, 4)
    assert revocations.size == 8
    revocations.prune(NOW + 5, 6)
    assert revocations.size == 5
    revocations.prune(NOW + 5, 1_000)
    assert revocations.size == 5
    assert revocations.cover(GRANT, NOW + 5)
    revocations.prune(NOW + 50, 1_000)
    assert revocations.size == 0
