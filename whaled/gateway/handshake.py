"""What is decided of a request before it becomes a WebSocket: subprotocol, credential, refusal."""

from collections.abc import Sequence
from urllib.parse import parse_qs

from websockets.datastructures import Headers
from websockets.http11 import Response
from websockets.server import ServerProtocol
from websockets.typing import Subprotocol

from whaled.gateway import wire
from whaled.gateway.limits import Refusal

# Query parameters that carry a credential in other products. URLs end up in logs and histories.
CREDENTIAL_PARAMETERS = {"token", "access_token", "api_key", "apikey", "jwt", "auth", "authorization"}

REFUSAL_STATUS = {
    Refusal.GLOBAL_CAP: (503, "too many connections"),
    Refusal.UNAUTHENTICATED_CAP: (503, "too many connections that have not authenticated"),
    Refusal.ADDRESS_CAP: (429, "too many connections from this address"),
    Refusal.MEMORY: (503, "out of memory"),
    Refusal.DRAINING: (503, "restarting"),
    Refusal.TOKEN_IN_URL: (
        400,
        "a token in the URL ends up in logs: send it as first message, as Authorization header or as subprotocol",
    ),
}


class Server(ServerProtocol):
    """Selects `whaled.v1` if a browser offers it, and goes on without a subprotocol otherwise."""

    def select_subprotocol(self, subprotocols: Sequence[Subprotocol]) -> Subprotocol | None:
        return Subprotocol(wire.SUBPROTOCOL) if wire.SUBPROTOCOL in subprotocols else None


def refuse(ws: ServerProtocol, refusal: Refusal, retry_after_s: int) -> Response:
    """The answer to a client that is turned away."""
    status, text = REFUSAL_STATUS[refusal]
    response = ws.reject(status, text + "\n")
    if status != 400:
        response.headers["Retry-After"] = str(retry_after_s)
    return response


def credential(headers: Headers) -> str | None:
    """The credential of the Authorization header, or of the subprotocol pair that browsers can send."""
    for header in headers.get_all("Authorization"):
        scheme, _, credential = header.partition(" ")
        if scheme.lower() == "bearer" and credential:
            return credential.strip()
    for offered in headers.get_all("Sec-WebSocket-Protocol"):
        for name in offered.split(","):
            if name.strip().startswith(wire.BEARER_SUBPROTOCOL_PREFIX):
                return name.strip().removeprefix(wire.BEARER_SUBPROTOCOL_PREFIX)
    return None


def has_credential(path: str) -> bool:
    """Whether a request's path carries what other products take for a credential."""
    query = path.partition("?")[2]  # urlsplit raises for some paths
    return bool(query) and not CREDENTIAL_PARAMETERS.isdisjoint(key.lower() for key in parse_qs(query))
