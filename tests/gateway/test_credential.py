"""A credential in use."""

import pytest

from whaled.gateway.credential import Credential
from whaled.model import Grant


def grant(issued_at: float | None, expires_at: float | None) -> Grant:
    return Grant(client_id="c", permissions=frozenset(), issued_at=issued_at, expires_at=expires_at)


@pytest.mark.parametrize(
    ("issued_at", "expires_at", "warned_at", "ends_at"),
    [
        (0.0, 1000.0, 900.0, 1025.0),  # a tenth of its life before
        (0.0, 100_000.0, 99_700.0, 100_025.0),  # five minutes before
        (None, 1000.0, 970.0, 1025.0),
        (0.0, None, None, None),
    ],
)
def test_a_client_is_warned_before_its_credential_ends(
    issued_at: float | None, expires_at: float | None, warned_at: float | None, ends_at: float | None
) -> None:
    credential = Credential(grant(issued_at, expires_at), 1.0)
    assert credential.next_deadline(leeway_s=10.0, expiry_grace_s=25.0) == warned_at
    credential.was_warned = True
    assert credential.next_deadline(leeway_s=10.0, expiry_grace_s=25.0) == ends_at


def test_a_credential_accepted_within_the_leeway_ends_with_it() -> None:
    credential = Credential(grant(0.0, 1000.0), 1005.0)
    credential.was_warned = True
    assert credential.is_late
    assert credential.next_deadline(leeway_s=10.0, expiry_grace_s=25.0) == 1010.0


@pytest.mark.parametrize(("at", "is_lost"), [(159.0, True), (161.0, False)])
def test_only_the_answer_of_a_recent_refresh_may_be_lost(at: float, is_lost: bool) -> None:
    parent = grant(0.0, 1000.0)
    assert Credential(grant(50.0, 2000.0), 100.0).lost_parent(at) is None
    assert Credential(grant(50.0, 2000.0), 100.0, replaced=parent).lost_parent(at) is (parent if is_lost else None)
