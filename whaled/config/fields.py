"""The types of the values that keys hold, and the other parts of a key's declaration.

The types define what the parser accepts: `Seconds` are written "30s", "5m", "90d"; `Bytes` "16KiB", "1MiB".

Pure.
"""

from typing import Annotated, Final

from msgspec import Meta, Struct

from whaled.model import MAX_BTC

# The upper bounds are far above any sensible value; they only prevent overflows in later calculations.
Seconds = Annotated[float, Meta(ge=0.001, le=36_525 * 86400.0, extra={"unit": "duration"})]
ShortSeconds = Annotated[float, Meta(ge=0.001, le=3600.0, extra={"unit": "duration"})]
# How far the clocks of the token issuer and of this machine may differ. More would extend the life of expired tokens.
MAX_LEEWAY_S = 30.0
Leeway = Annotated[float, Meta(ge=0, le=MAX_LEEWAY_S, extra={"unit": "duration"})]
# Keys of issuers: an alert relies on a fetch at least once an hour; no issuer is to be asked more than once a second.
RefreshSeconds = Annotated[float, Meta(ge=10, le=3600, extra={"unit": "duration"})]
ThrottleSeconds = Annotated[float, Meta(ge=1, le=3600, extra={"unit": "duration"})]
FetchSeconds = Annotated[float, Meta(ge=0.1, le=60, extra={"unit": "duration"})]
Bytes = Annotated[int, Meta(ge=1, le=1024**4, extra={"unit": "size"})]
MemorySize = Annotated[int, Meta(ge=128 * 1024**2, le=1024**4, extra={"unit": "size"})]
Count = Annotated[int, Meta(ge=1, le=1_000_000_000)]
BookSize = Annotated[int, Meta(ge=1, le=10_000_000)]
Rate = Annotated[float, Meta(ge=0.001, le=1_000_000)]
Share = Annotated[float, Meta(ge=0, le=1)]
ShedShare = Annotated[float, Meta(ge=0.1, le=1)]
Port = Annotated[int, Meta(ge=0, le=65535)]
AmountBtc = Annotated[float, Meta(ge=0, le=MAX_BTC)]
ThresholdBtc = Annotated[float, Meta(ge=0.000_000_01, le=MAX_BTC)]
ThresholdUsd = Annotated[float, Meta(ge=0.01, le=1e15)]
Text = Annotated[str, Meta(min_length=1)]
Name = Annotated[str, Meta(min_length=1, max_length=64)]
# Names of rules appear in log lines and filters; with these characters they need no quotes there.
RULE_NAME = r"^[A-Za-z0-9._-]+\Z"
RuleName = Annotated[str, Meta(min_length=1, max_length=64, pattern=RULE_NAME)]
MAX_WATCH_RULES = 100
Path = Annotated[str, Meta(min_length=1, extra={"unit": "path"})]
MAX_BOOKS = 16
Paths = Annotated[tuple[Path, ...], Meta(max_length=MAX_BOOKS)]
Url = Annotated[str, Meta(min_length=1, extra={"unit": "url"})]
# A machine usually serves one or two networks; each address needs a listening socket.
MAX_HOSTS = 16
Host = Annotated[str, Meta(extra={"unit": "host"})]
Hosts = Annotated[tuple[Host, ...], Meta(min_length=1, max_length=MAX_HOSTS, extra={"unit": "hosts"})]
Origin = Annotated[str, Meta(extra={"unit": "origin"})]

# A proxy of a content network comes from a few dozen networks.
MAX_PROXIES = 128
Proxy = Annotated[str, Meta(extra={"unit": "proxy"})]
Proxies = Annotated[tuple[Proxy, ...], Meta(max_length=MAX_PROXIES)]


class Reload(Struct, frozen=True):
    """A mark on the declaration of each key that a reload changes in a running daemon.

    Keys without it set up listeners and paths, or are used only at the start.
    """


RELOAD: Final = Reload()


class Option(Struct, frozen=True):
    """The option of `whaled run` that sets a key.

    `metavar` names its argument in the help. An option without one is a switch, which sets the key to `sets`.
    """

    name: str
    help: str
    metavar: str | None = None
    sets: object = None

    @property
    def attribute(self) -> str:
        """Return the name of the attribute in which argparse stores the value."""
        return self.name.removeprefix("--").replace("-", "_")
