"""Tokens as people keep them: read whatever surrounds them, or refused with the reason and without a quote."""

import base64
import contextlib
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kit.scripted_server import jwt
from whaled.auth import tokenfile, tokentext
from whaled.auth.tokentext import token_in

TOKEN = jwt("c1")
API_KEY = "whk_dGVzdA=="


@pytest.mark.parametrize("token", [TOKEN, API_KEY])
@pytest.mark.parametrize(
    "form",
    [
        "{}",
        "{}\n",
        "\r\n {}\r\n\r\n",
        "\ufeff{}",
        "\u200b{}\u00a0",
        '"{}"',
        "'{}'\n",
        "\u201c{}\u201d",
        "<{}>",
        "`{}`",
        "Bearer {}",
        "bearer  {}",
        "Authorization: Bearer {}",
        '"Bearer {}"',
        "WHALED_TOKEN={}",
        "TOKEN = {}",
        'export WHALED_TOKEN="{}"',
        "export TOKEN='{}';",
        "set WHALED_TOKEN={}",
        '$env:WHALED_TOKEN = "{}"',
        "# issued for desk 1\n\n{}\n# until spring\n",
        "WHALED_URL=wss://x\nWHALED_TOKEN={}\nOTHER=1\n",
        '{{"token": "{}"}}',
        '{{"type": "auth", "api_key": "{}"}}',
        '{{\n "access_token": "{}",\n "token_type": "Bearer", "expires_in": 300}}',
        '{{"Token": "Bearer {}"}}',
    ],
)
def test_a_token_is_stripped_of_its_surroundings(form: str, token: str) -> None:
    assert token_in(form.format(token)) == token


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le-with-mark"])
def test_a_file_may_have_any_encoding_that_editors_write(tmp_path: Path, encoding: str) -> None:
    path = tmp_path / "t"
    if encoding == "utf-16-le-with-mark":
        path.write_bytes(b"\xff\xfe" + f"{TOKEN}\r\n".encode("utf-16-le"))
    else:
        path.write_bytes(f"{TOKEN}\r\n".encode(encoding))
    assert tokenfile.read(path).token == TOKEN


def part(value: object) -> str:
    return base64.urlsafe_b64encode(json.dumps(value).encode()).decode().rstrip("=")


HEADER, PAYLOAD, SIGNATURE = TOKEN.split(".")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "holds no token: expected a JWT"),
        ("# nothing\n", "holds no token: expected a JWT"),
        ('""', "holds no token: expected a JWT"),
        ("TOKEN=", "holds no token: expected a JWT"),
        ("hunter2hunter2", "three parts with dots between) or an API key (whk_...). A signing key is not one"),
        ("two words", "holds no token: a space is in it"),
        ("token: " + TOKEN, "holds no token: a space is in it"),
        (TOKEN[:20] + "\u2026", "the character U+2026 is in it: it was shortened when it was copied"),
        (TOKEN.replace("A", "\u0410"), "the character U+0410 is in it"),
        (TOKEN + "\n" + TOKEN, "holds 2 lines: expected one with the token, or one that begins with WHALED_TOKEN="),
        (TOKEN[:50] + "\n" + TOKEN[50:], "holds a token that is broken over 2 lines: put it into one"),
        ("A=1\nB=2", "holds 2 lines"),
        (HEADER + "." + PAYLOAD, "a JWT has three parts with dots between, this has 2"),
        (TOKEN + "..", "holds an encrypted token (JWE, five parts)"),
        (f"{HEADER}.{PAYLOAD}.", "holds a token that is not signed: its third part is missing"),
        (f"x.{PAYLOAD}.{SIGNATURE}", "holds a damaged token: its first part is not JSON in base64url"),
        (f"{HEADER}.{part([1])}.{SIGNATURE}", "holds a damaged token: its second part is not JSON in base64url"),
        (f"{HEADER}.{PAYLOAD}.A+/=", "holds a damaged token: its third part is not base64url"),
        (TOKEN[:-1], "its signature has 42 characters, not 43; was it copied whole?"),
        ("whk_" + "x" * 9000, "it has 9004 characters, a token at most 8192"),
        ("-----BEGIN CERTIFICATE-----\nMII\n", "holds a certificate or a key in PEM form"),
        ('{"version": 1, "keys": [{"secret": "hunter2"}]}', "is a key ring, which signs tokens"),
        ('{"header": {}, "claims": {"client_id": "hunter2"}}', "is what `whaled token inspect` prints"),
        ('{"hunter2": 1}', "is JSON without a field `token`"),
        ('{"token": 7}', "is JSON without a field `token`"),
        ("{hunter2}", "begins like JSON but is not valid JSON"),
        ('{"a":' + "[" * 5000, "begins like JSON but is not valid JSON"),
    ],
)  # fmt: skip
def test_invalid_text_is_refused_with_the_reason_and_not_quoted(text: str, reason: str) -> None:
    with pytest.raises(ValueError, match=r"^(holds|is|begins) ") as caught:
        token_in(text)
    assert reason in str(caught.value)
    assert "hunter2" not in str(caught.value)
    assert PAYLOAD not in str(caught.value)


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (b"\xc3\x28", "is not text"),
        (b"\xff\xfe\x00", "is not text"),
        (TOKEN.encode("utf-16-le"), "holds NUL bytes"),
        (b"x" * 70_000, "it has more than 65536 bytes"),
    ],
)
def test_bytes_that_are_no_text_are_refused(tmp_path: Path, raw: bytes, reason: str) -> None:
    path = tmp_path / "t"
    path.write_bytes(raw)
    with pytest.raises(ValueError, match=f"^{path} ") as caught:
        tokenfile.read(path)
    assert reason in str(caught.value)


@given(st.text(max_size=60) | st.text(alphabet="{}[]\":.='`<> \nabcWHALED_TOKEN", max_size=60), st.binary(max_size=60))
def test_any_file_is_a_token_or_refused(text: str, raw: bytes) -> None:
    for content in (text.encode(), raw, (text + TOKEN).encode()):
        with contextlib.suppress(ValueError):
            token = token_in(tokentext.text_of(content))
            assert token.isascii()
            assert token.isprintable()
            assert " " not in token


def test_a_token_that_may_be_valid_has_no_problem_with_its_time() -> None:
    now = 1_800_000_000.0
    for claims in ({}, {"exp": now + 1}, {"exp": "x"}, {"exp": True}, {"exp": 1e300}, {"nbf": now}, {"exp": -5}):
        assert tokentext.time_problem(jwt("c", **claims), now) is None
    assert tokentext.time_problem(API_KEY, now) is None
    assert tokentext.time_problem(jwt("c", exp=now - 10), now, 11.0) is None


@pytest.mark.parametrize(
    ("seconds", "span"), [(1, "1 s"), (119, "119 s"), (150, "2 min"), (9000, "2 h"), (1e6, "12 d")]
)
def test_how_long_ago_a_token_ended_is_readable(seconds: float, span: str) -> None:
    now = 1_800_000_000.0
    problem = tokentext.time_problem(jwt("c", exp=now - seconds), now)
    assert problem is not None
    assert f", {span} ago by the clock of this machine" in problem
