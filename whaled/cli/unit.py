"""The settings by which whaled.service and whaled.socket override the configuration, for `check-config`.

They are read from systemd, with a timeout. Without systemd or these units there are none.
"""

import os
import re
import shlex
import subprocess
from collections.abc import Mapping
from pathlib import Path

from dotenv import dotenv_values
from msgspec import Struct, structs

from whaled.config.keys import keys
from whaled.config.loading import load
from whaled.config.parse import diff
from whaled.config.sections import Config, TlsSettings
from whaled.errors import ConfigError, Fault
from whaled.listening import host_port
from whaled.ops.certificates import tls_context

SERVICE, SOCKET = "whaled.service", "whaled.socket"
LIMIT_S = 5.0
PREFIX = "WHALED_"
CREDENTIALS = f"/run/credentials/{SERVICE}/"
STREAM = " (Stream)"


class Unit(Struct, frozen=True):
    """The units as loaded by systemd: environment variables for whaled, and source files of credentials by name."""

    config: str
    variables: dict[str, str]
    credentials: dict[str, str]
    listens: tuple[str, ...]


class Served(Struct, frozen=True):
    """The use of a configuration file by the service: the URLs for clients, and the keys that the unit sets."""

    urls: tuple[str, ...]
    keys: tuple[str, ...]
    faults: tuple[Fault, ...] = ()


def installed() -> Unit | None:
    """Return the units of this machine, None if there are none or systemd does not respond."""
    shown = _systemctl("show", SERVICE, "--property=LoadState,Environment,EnvironmentFiles,ExecStart")
    text = _systemctl("cat", SERVICE)
    sockets = _systemctl("show", SOCKET, "--property=LoadState,Listen")
    if shown is None or text is None or "LoadState=loaded" not in shown.splitlines():
        return None
    try:
        return _parsed(shown, text, sockets or "")
    except ValueError:  # unbalanced quotes
        return None


def served(unit: Unit, path: Path, own: Config) -> Served | None:
    """Return how the service uses the configuration file at `path`, None if it uses another file.

    `own` is the configuration of this process from the same file.
    """
    if not _is_same(path, Path(unit.config)):
        return None
    try:
        config = load(path, environ=unit.variables, flags={}).config
        tls_context(_outside(config.gateway.tls, unit.credentials))
    except ConfigError as error:
        return Served((), (), tuple(Fault(each.where, each.problem, each.source or SERVICE) for each in error.faults))
    urls = tuple(f"{_scheme(config)}{listen}" for listen in unit.listens) or clients(config)
    return Served(urls, tuple(_keys(unit.variables, own, config)))


def clients(config: Config) -> tuple[str, ...]:
    """Return the URLs for clients by the configuration alone."""
    return tuple(f"{_scheme(config)}{host_port(host, config.gateway.port)}" for host in config.gateway.host)


def _scheme(config: Config) -> str:
    return "ws://" if config.gateway.tls.certificate is None else "wss://"


def sentence(found: Served, own: tuple[str, ...]) -> str:
    """Describe how the service deviates from the configuration, empty if it does not.

    `own` are the URLs for clients by the configuration alone.
    """
    if found.urls == own and not found.keys:
        return ""
    because = [f"set by the unit: {', '.join(found.keys)}"] if found.keys else []
    if [url.partition("://")[2] for url in found.urls] != [url.partition("://")[2] for url in own]:
        because.append(f"{SOCKET} listens")
    return f"as {SERVICE} clients at {', '.join(found.urls)} ({'; '.join(because)})"


def _keys(variables: Mapping[str, str], own: Config, config: Config) -> list[str]:
    """Return the configuration keys that the unit's variables change."""
    variable_of = {path: key.variable for path, key in keys().items()}
    return [path for path in diff(own, config) if {variable_of[path], f"{variable_of[path]}_FILE"} & variables.keys()]


def _parsed(shown: str, text: str, sockets: str) -> Unit:
    lines = [line.partition("=")[::2] for line in shown.splitlines()]
    properties = dict(lines)
    argv = re.search(r"argv\[\]=(.*?) ; ", properties.get("ExecStart", ""))
    words = shlex.split(argv[1]) if argv is not None else []
    config = words[words.index("--config") + 1] if "--config" in words[:-1] else ""
    variables = dict(word.partition("=")[::2] for word in shlex.split(properties.get("Environment", "")))
    for name, value in lines:
        if name == "EnvironmentFiles":
            variables |= _variables_in(Path(value.rpartition(" (")[0]))
    credentials: dict[str, str] = {}
    for line in text.splitlines():
        name, has_value, value = line.strip().partition("LoadCredential=")
        if not name and has_value:
            credential, _, source = value.strip().partition(":")
            credentials = {**credentials, credential: source} if value.strip() else {}
    listens = tuple(
        line.removeprefix("Listen=").removesuffix(STREAM)
        for line in sockets.splitlines()
        if line.startswith("Listen=") and line.endswith(STREAM)
    )
    return Unit(
        config=config,
        variables={name: value for name, value in variables.items() if name.startswith(PREFIX)},
        credentials=credentials,
        listens=listens,
    )


def _variables_in(path: Path) -> dict[str, str]:
    try:
        with path.open(encoding="utf-8") as stream:
            return {name: value for name, value in dotenv_values(stream=stream).items() if value is not None}
    except (OSError, UnicodeDecodeError):
        return {}


def _outside(tls: TlsSettings, credentials: Mapping[str, str]) -> TlsSettings:
    """Replace credentials by their source files: the credentials exist only while the unit runs."""

    def source(path: str | None) -> str | None:
        if path is None or not path.startswith(CREDENTIALS):
            return path
        return credentials.get(path.removeprefix(CREDENTIALS), path)

    return structs.replace(tls, certificate=source(tls.certificate), private_key=source(tls.private_key))


def _is_same(one: Path, other: Path) -> bool:
    try:
        return one.samefile(other)
    except OSError:
        return False


def _systemctl(*words: str) -> str | None:
    # With NOTIFY_SOCKET, systemctl would report its failure as the status of this process's unit.
    environment = {name: value for name, value in os.environ.items() if name != "NOTIFY_SOCKET"}
    try:
        done = subprocess.run(  # noqa: S603 - constants
            ["systemctl", "--no-pager", *words],  # noqa: S607 - its path differs between systems
            stdin=subprocess.DEVNULL, capture_output=True, timeout=LIMIT_S, check=False, env=environment,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):  # no systemd, or this runs inside the unit's sandbox
        return None
    return done.stdout.decode("utf-8", "replace") if done.returncode == 0 else None
