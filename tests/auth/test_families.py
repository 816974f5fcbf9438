"""Refreshed tokens: a copy of one is found out, and a client that only lost an answer is not taken for a thief."""

import pytest

from kit.tokens import RING, issued
from kit.whales import NOW
from whaled.auth.families import Families
from whaled.auth.tokens import TokenAuthenticator
from whaled.config.sections import AuthSettings
from whaled.errors import TokenError, TokenRefusal
from whaled.model import Grant

AUTH = AuthSettings()


class Judge(TokenAuthenticator):
    """Numbers the tokens it refreshes."""

    def __init__(self) -> None:
        self.made = 0
        super().__init__(RING, AUTH, new_token_id=self._number)

    def _number(self) -> str:
        self.made += 1
        return f"r{self.made}"


def reason(judge: Judge, token: str, now: float) -> TokenRefusal:
    with pytest.raises(TokenError) as caught:
        judge.verify(token, now)
    return caught.value.reason


def revoked(judge: Judge, grant: Grant, now: float) -> None:
    with pytest.raises(TokenError) as caught:
        judge.refresh(grant, now)
    assert caught.value.reason is TokenRefusal.REVOKED


def test_two_refreshes_of_one_token_end_its_whole_family() -> None:
    judge = Judge()
    first = issued()
    grant = judge.verify(first, NOW)
    second, child = judge.refresh(grant, NOW + 1)
    third, grandchild = judge.refresh(judge.verify(second, NOW + 2), NOW + 2)
    assert judge.is_in_force(grant, NOW + 3)
    revoked(judge, judge.verify(first, NOW + 3), NOW + 3)
    for token in (first, second, third):
        assert reason(judge, token, NOW + 4) is TokenRefusal.REVOKED
    for kept in (grant, child, grandchild):
        assert not judge.is_in_force(kept, NOW + 4)


def test_a_copy_of_a_refreshed_token_is_found_out_later_in_the_chain_too() -> None:
    judge = Judge()
    grant = judge.verify(issued(), NOW)
    _, child = judge.refresh(grant, NOW + 1)
    judge.refresh(child, NOW + 2)
    revoked(judge, child, NOW + 3)


def test_a_chain_of_single_use_refreshes_goes_on() -> None:
    judge = Judge()
    grant = judge.verify(issued(), NOW)
    for turn in range(200):
        token, grant = judge.refresh(grant, NOW + turn)
        assert judge.verify(token, NOW + turn) == grant


def test_other_tokens_of_the_same_client_and_other_clients_go_on() -> None:
    judge = Judge()
    grant = judge.verify(issued(), NOW)
    judge.refresh(grant, NOW)
    revoked(judge, grant, NOW)
    other = issued(token_id="t9")
    assert judge.refresh(judge.verify(other, NOW), NOW)
    namesake = issued(client_id="c2")  # the same `jti`, by an issuer that numbers them for each client
    assert judge.refresh(judge.verify(namesake, NOW), NOW)


def test_a_token_without_an_id_is_known_by_its_times() -> None:
    judge = Judge()
    grant = judge.verify(issued(token_id=None), NOW)
    child = judge.refresh(grant, NOW)[1]
    assert judge.refresh(child, NOW)
    revoked(judge, grant, NOW)


def test_an_ended_family_is_remembered_until_its_last_token_has_expired() -> None:
    families = Families()
    families.refreshed("f", "b", until=100.0)
    families.end("f", until=50.0)
    assert families.is_ended("f", 99.0)
    assert not families.is_ended("f", 100.0)
    assert families.size == 0


def test_an_answer_that_may_be_lost_allows_one_more_refresh_of_the_parent_and_no_third() -> None:
    judge = Judge()
    grant = judge.verify(issued(), NOW)
    _, lost = judge.refresh(grant, NOW)
    judge.answer_lost(grant, lost)
    _, child = judge.refresh(grant, NOW + 1)
    assert judge.refresh(child, NOW + 2)
    revoked(judge, lost, NOW + 3)


def test_an_answer_that_came_through_after_all_goes_on_too() -> None:
    judge = Judge()
    grant = judge.verify(issued(), NOW)
    _, child = judge.refresh(grant, NOW)
    judge.answer_lost(grant, child)
    assert judge.refresh(child, NOW + 1)
    revoked(judge, grant, NOW + 2)


def test_an_answer_lost_long_ago_changes_nothing() -> None:
    judge = Judge()
    grant = judge.verify(issued(), NOW)
    _, child = judge.refresh(grant, NOW)
    judge.refresh(child, NOW + 1)
    judge.answer_lost(grant, child)
    revoked(judge, grant, NOW + 2)


def test_families_are_remembered_up_to_a_limit_and_those_at_work_longest() -> None:
    families = Families(limit=10)
    families.refreshed("busy", "0", until=9e9)
    for number in range(100):
        families.refreshed(str(number), "x", until=9e9)
        families.refreshed("busy", str(number), until=9e9)
    assert not families.may_refresh("busy", "0")
    assert families.size == 10
    for number in range(100):
        families.end(f"e{number}", until=9e9)
    assert families.size == 20
    assert families.is_ended("e99", 0.0)
