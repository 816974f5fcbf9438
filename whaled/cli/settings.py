"""The parts shared by the commands: loading the configuration, and the options that override it."""

import argparse
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from whaled.config.keys import Key, keys, options, value_at
from whaled.config.loading import load
from whaled.config.parse import Loaded
from whaled.errors import ConfigError, Fault


def add_config_option(parser: argparse.ArgumentParser) -> None:
    """Add `--config`."""
    parser.add_argument(
        "--config", type=Path, metavar="FILE", help="configuration file (default: /etc/whaled/whaled.yaml if it exists)"
    )


def add_run_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that override the configuration file and the environment."""
    for path, option in options().items():
        if option.metavar is None:
            parser.add_argument(option.name, action="store_true", help=option.help)
        else:
            parser.add_argument(option.name, metavar=option.metavar, help=f"{option.help} ({path})")


def load_for(arguments: argparse.Namespace, environ: Mapping[str, str] = os.environ) -> Loaded:
    """Load the configuration for a command's options. Raises ConfigError."""
    flags: dict[str, object] = {}
    for path, option in options().items():
        value = getattr(arguments, option.attribute, None)
        if option.metavar is not None and value is not None:
            flags[path] = value
        elif option.metavar is None and value:
            flags[path] = option.sets
    loaded = load(arguments.config, environ=environ, flags=flags)
    _check_paths(loaded)
    return loaded


def working_directory() -> Path:
    """Return the working directory, `.` if it no longer exists."""
    try:
        return Path.cwd()
    except OSError:
        return Path()


def _check_paths(loaded: Loaded) -> None:
    """Raise ConfigError for relative paths if the working directory no longer exists."""
    if working_directory().is_absolute():
        return
    problem = "the working directory is gone, and this path is relative to it: use an absolute path"
    faults = [
        Fault(path, f"found {value!r}: {problem}", loaded.origins.get(path, ""))
        for path, key in keys().items()
        for value in _paths(key, value_at(loaded.config, path))
        if not Path(value).is_absolute()
    ]
    if faults:
        raise ConfigError(tuple(faults))


def _paths(key: Key, value: object) -> Iterable[str]:
    if "path" not in {key.unit, key.element.unit if key.element is not None else None}:
        return ()
    return map(str, value) if isinstance(value, tuple) else (value,) if isinstance(value, str) else ()
