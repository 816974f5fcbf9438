"""The schema of the configuration: every key with its type and unit, read from the sections' annotations."""

from collections.abc import Iterator
from enum import StrEnum
from typing import Annotated, Any, get_args, get_origin

import msgspec
from msgspec import Meta, Struct

from whaled.config.sections import Config

# What a running daemon can change. Everything else is a listener, a path, or decided once at the start.
RELOADABLE = frozenset(
    {
        "detection.threshold_btc", "detection.basis", "detection.address_book",
        "gateway.origins", "gateway.max_connections", "gateway.max_connections_per_address",
        "gateway.max_unauthenticated", "gateway.handshake_timeout", "gateway.auth_timeout", "gateway.max_frame",
        "gateway.max_addresses", "gateway.messages_per_second", "gateway.message_burst", "gateway.max_unsent",
        "gateway.slow_timeout", "gateway.replay_page", "gateway.ping_interval", "gateway.ping_timeout",
        "gateway.close_timeout", "gateway.position_interval", "gateway.drain_window",
        "gateway.tls.certificate", "gateway.tls.private_key",
        "auth.token_ttl", "auth.max_token_ttl", "auth.expiry_grace", "auth.failures_per_second",
        "auth.failure_burst", "auth.issuer", "auth.audience",
        "log.level", "log.format",
    }
)  # fmt: skip


class Key(Struct, frozen=True):
    """One key: its path, the type msgspec checks, the unit it is written in (None: as it is), its default."""

    path: str
    type: Any
    unit: str | None
    default: object
    is_text: bool
    choices: tuple[str, ...]

    @property
    def variable(self) -> str:
        """The environment variable that sets it."""
        return "WHALED_" + self.path.replace(".", "_").upper()


def _keys(section: Struct, prefix: str) -> Iterator[Key]:
    for found in msgspec.structs.fields(type(section)):
        default = getattr(section, found.name)
        path = f"{prefix}{found.name}"
        if isinstance(default, Struct):
            yield from _keys(default, path + ".")
        else:
            yield Key(path, found.type, _unit(found.type), default, _is_text(found.type), _choices(found.type))


def _parts(annotation: Any) -> Iterator[Any]:
    """An annotation and what it is made of: `Annotated[str, Meta(..)] | None` has a str and a Meta in it."""
    yield annotation
    if get_origin(annotation) is Annotated or type(None) in get_args(annotation):
        for part in get_args(annotation):
            yield from _parts(part)


def _unit(annotation: Any) -> str | None:
    for part in _parts(annotation):
        if isinstance(part, Meta) and part.extra is not None:
            return str(part.extra["unit"])
    return None


def _is_text(annotation: Any) -> bool:
    return any(part is str or (isinstance(part, type) and issubclass(part, str)) for part in _parts(annotation))


def _choices(annotation: Any) -> tuple[str, ...]:
    return tuple(str(choice) for choice in annotation) if isinstance(annotation, type(StrEnum)) else ()


def keys() -> dict[str, Key]:
    """Every key of the configuration by its path."""
    return {key.path: key for key in _keys(Config(), "")}
