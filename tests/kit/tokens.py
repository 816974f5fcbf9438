"""Tokens that are good, refused or forged, and an authenticator that knows a few by name."""

import base64
import hashlib
import hmac
import json
from typing import Any

import jwt

from kit.whales import NOW
from whaled.auth.ring import KeyRing, SigningKey
from whaled.auth.signature import STAND_IN_SECRET
from whaled.auth.tokens import issue
from whaled.config.sections import AuthSettings
from whaled.errors import TokenError, TokenRefusal
from whaled.model import Grant, Permission

READ = frozenset({Permission.READ})


class Tokens:
    """Knows three tokens; the real authenticator has tests of its own."""

    def __init__(self, expires_at: float = 1000.0) -> None:
        self.retired: set[str] = set()
        self.lost: list[tuple[Grant, Grant]] = []
        self.known = {
            "good": Grant(client_id="c1", permissions=READ, issued_at=0.0, expires_at=expires_at),
            "other": Grant(client_id="c2", permissions=READ, issued_at=0.0, expires_at=9000.0),
            "longer": Grant(client_id="c1", permissions=READ, issued_at=0.0, expires_at=9000.0),
            "mute": Grant(client_id="c3", permissions=frozenset()),
        }

    def verify(self, credential: str, now: float) -> Grant:
        if credential not in self.known:
            raise TokenError(TokenRefusal.BAD_SIGNATURE, claimant=credential)
        return self.known[credential]

    def refresh(self, grant: Grant, now: float) -> tuple[str, Grant]:
        if grant.client_id != "c1":
            raise TokenError(TokenRefusal.EXPIRED)
        if grant == self.known["longer"]:
            raise TokenError(TokenRefusal.REVOKED)
        return "longer", self.known["longer"]

    def is_in_force(self, grant: Grant, now: float) -> bool:
        return grant.client_id not in self.retired

    def answer_lost(self, parent: Grant, child: Grant) -> None:
        self.lost.append((parent, child))


OLD = SigningKey("old", b"o" * 32)
NEW = SigningKey("new", b"n" * 32)
RING = KeyRing(NEW, (OLD, NEW))
AUTH = AuthSettings()


def issued(
    ring: KeyRing = RING,
    ttl_s: float = 3600.0,
    settings: AuthSettings = AUTH,
    *,
    client_id: str = "c1",
    token_id: str | None = "t1",
) -> str:
    """Return a token issued at NOW; without a `token_id`, as a foreign issuer may make it."""
    if token_id is None:
        times = {"iat": int(NOW), "exp": int(NOW + ttl_s)}
        return signed({"client_id": client_id, "permissions": ["read"], **times})
    return issue(
        ring, client_id=client_id, permissions=[Permission.READ], ttl_s=ttl_s, now=NOW, token_id=token_id,
        settings=settings,
    )[0]  # fmt: skip


def signed(claims: dict[str, Any], key: SigningKey = NEW, **header: Any) -> str:
    return jwt.encode(claims, key.secret, algorithm="HS256", headers={"kid": key.kid, **header})


CLAIMS = {"client_id": "c1", "permissions": ["read"], "iat": NOW, "exp": NOW + 60, "jti": "t1"}


def part(value: object) -> str:
    raw = value if isinstance(value, bytes) else json.dumps(value).encode()
    return base64.urlsafe_b64encode(raw).rstrip(b"=").decode()


def mac(secret: bytes, text: str, digest: Any = hashlib.sha256) -> str:
    return part(hmac.digest(secret, text.encode(), digest))


def token_of(header: object, claims: object = CLAIMS, secret: bytes = NEW.secret) -> str:
    text = f"{part(header)}.{part(claims)}"
    return f"{text}.{mac(secret, text)}"


def head(**more: object) -> dict[str, object]:
    return {"alg": "HS256", "typ": "JWT", "kid": "new", **more}


GOOD = token_of(head())
FIRST, SECOND, LAST = GOOD.split(".")
ADMIN = part({**CLAIMS, "permissions": ["read", "write", "admin"]})
WIDE = 4_000
FORGED: dict[str, str] = {
    "no algorithm": token_of({"kid": "new"}),
    "none, unsigned": f"{part(head(alg='none'))}.{SECOND}.",
    "none, signed": token_of(head(alg="none")),
    "None in other letters": token_of(head(alg="nOnE")),
    "lower case algorithm": token_of(head(alg="hs256")),
    "algorithm null": token_of(head(alg=None)),
    "algorithms in a list": token_of(head(alg=["HS256"])),
    "HS384 by its own digest": f"{part(head(alg='HS384'))}.{SECOND}."
    + mac(NEW.secret, f"{part(head(alg='HS384'))}.{SECOND}", hashlib.sha384),
    "HS512 with the right key": jwt.encode(CLAIMS, NEW.secret * 2, algorithm="HS512", headers={"kid": "new"}),
    "RS256 with the secret as key": token_of(head(alg="RS256")),
    "a key in the header": token_of(head(jwk={"kty": "oct", "k": part(b"j" * 32)}), secret=b"j" * 32),
    "a key to fetch": token_of(head(jku="https://example.org/k", x5u="https://example.org/k"), secret=b"j" * 32),
    "an empty key": token_of(head(), secret=b""),
    "the stand-in's key under an unknown name": token_of(head(kid="gone"), secret=STAND_IN_SECRET),
    "the stand-in's key and name": token_of(head(kid="stand-in-0000"), secret=STAND_IN_SECRET),
    "the stand-in's key under a known name": token_of(head(), secret=STAND_IN_SECRET),
    "a key of the ring under another's name": token_of(head(kid="old")),
    "a name that is a path": token_of(head(kid="../../etc/hostname")),
    "a name that is a number": token_of(head(kid=0)),
    "a name that is a list": token_of(head(kid=["new"])),
    "a name in other letters": token_of(head(kid="NEW")),
    "a name with a zero byte": token_of(head(kid="new\0")),
    "no name": token_of({"alg": "HS256"}),
    "a null name": token_of(head(kid=None)),
    "other claims": f"{FIRST}.{ADMIN}.{LAST}",
    "another header": f"{part(head(typ='at+jwt'))}.{SECOND}.{LAST}",
    "no signature": f"{FIRST}.{SECOND}.",
    "half a signature": f"{FIRST}.{SECOND}.{LAST[:21]}",
    "more signature": f"{GOOD}A",
    "a padded signature": f"{GOOD}=",
    "a padded payload": f"{FIRST}.{SECOND}==.{LAST}",
    "a signature of zeros": f"{FIRST}.{SECOND}.{'A' * 43}",
    "the other last letter of the same bytes": GOOD[:-1] + chr(ord(GOOD[-1]) + 1),
    "white space before": f" {GOOD}",
    "white space behind": f"{GOOD}\n",
    "a dot too many": f"{GOOD}.",
    "a dot before": f".{GOOD}",
    "two parts": f"{FIRST}.{SECOND}",
    "empty parts": "..",
    "an encrypted token's five parts": f"{FIRST}.{SECOND}.{LAST}.{SECOND}.{LAST}",
    "a critical extension": token_of(head(crit=["exp"])),
    "an empty list of extensions": token_of(head(crit=[])),
    "a payload that is not base64": token_of(head(b64=False, crit=["b64"])),
    "b64 alone": token_of(head(b64=True)),
    "a token within a token": token_of(head(cty="JWT"), GOOD.encode()),
    "claims in a list": token_of(head(), [CLAIMS]),
    "no claims": token_of(head(), b""),
    "claims that are nothing": token_of(head(), b"null"),
    "an end of NaN": token_of(head(), b'{"client_id":"c1","exp":NaN}'),
    "an end of Infinity": token_of(head(), b'{"client_id":"c1","exp":Infinity}'),
    "an end of 1e999": token_of(head(), b'{"client_id":"c1","exp":1e999}'),
    "an end in text": token_of(head(), {**CLAIMS, "exp": str(NOW + 60)}),
    "an end that is true": token_of(head(), {**CLAIMS, "exp": True}),
    "a second end that has passed": token_of(head(), b'{"client_id":"c1","exp":1800000060,"exp":1}'),
    "no end": token_of(head(), {"client_id": "c1"}),
    "an end in a hundred years": token_of(head(), {**CLAIMS, "exp": NOW + 100 * 365 * 86400}),
    "issued in the future, to live longer": token_of(head(), {**CLAIMS, "iat": NOW + 1e9, "exp": NOW + 1e9 + 60}),
    "claims nested without end": token_of(head(), b'{"client_id":"c1","exp":1800000060,"a":' + b"[" * WIDE),
    "a header nested without end": f"{part(b'[' * WIDE)}.{SECOND}.{LAST}",
    "claims with bytes that are no text": token_of(head(), b'{"client_id":"\xff","exp":1800000060}'),
    "claims with half a surrogate pair": token_of(head(), b'{"client_id":"c\\ud800","exp":1800000060}'),
    "claims with a byte order mark": token_of(head(), b"\xef\xbb\xbf" + json.dumps(CLAIMS).encode()),
    "claims in UTF-16": token_of(head(), json.dumps(CLAIMS).encode("utf-16")),
    "something behind the claims": token_of(head(), json.dumps(CLAIMS).encode() + b"{}"),
    "letters that only look alike": GOOD.replace("e", "\u0435", 1),
    "the scheme with it": f"Bearer {GOOD}",
}
