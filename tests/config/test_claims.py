import pytest

from whaled.config.claims import ClaimRule, claim_path, claim_rule


@pytest.mark.parametrize(
    ("text", "path", "value"),
    [
        ("scope=whales:read", ["scope"], "whales:read"),
        ("realm_access.roles=reader", ["realm_access", "roles"], "reader"),
        ("resource_access.my-app.roles=a=b", ["resource_access", "my-app", "roles"], "a=b"),
        ('"https://example.org/roles"=Whale Readers', ["https://example.org/roles"], "Whale Readers"),
        ('a."b.c".d=e', ["a", "b.c", "d"], "e"),
        ("cognito:groups=x", ["cognito:groups"], "x"),
    ],
)
def test_a_rule_names_a_claim_and_its_value(text: str, path: list[str], value: str) -> None:
    assert claim_rule(text) == ClaimRule(tuple(path), value)
    assert claim_path(text.removesuffix(f"={value}")) == tuple(path)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "expected names of claims"),
        ("scope", "expected claim=value"),
        ("scope=", "expected a value"),
        ("scope= x", "without spaces around it"),
        ("=x", "not '='"),
        ("a..b=x", "not '.'"),
        (".a=x", "not '.'"),
        ("a.=x", "not '='"),
        ("https://example.org/roles=x", "not '/'; a name with other characters needs double quotes"),
        ("a b=x", "not ' '"),
        ('""=x', "expected names"),
        ('"a=x', "expected names"),
        ("a.b.c.d.e.f.g.h.i=x", "at most 8 names"),
    ],
)
def test_what_names_no_claim_is_refused_with_what_is_allowed(text: str, problem: str) -> None:
    with pytest.raises(ValueError, match=r".") as caught:
        claim_rule(text)
    assert problem in str(caught.value)


@pytest.mark.parametrize("text", ["", "a=b", "a.", "a b"])
def test_a_path_has_no_value(text: str) -> None:
    with pytest.raises(ValueError, match="expected names of claims"):
        claim_path(text)
