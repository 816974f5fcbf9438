"""Reading of the configuration file, which `parse` then merges with the environment and the command line."""

from collections.abc import Mapping
from pathlib import Path

import msgspec

from whaled.config import units
from whaled.config.parse import Loaded, parse
from whaled.errors import ConfigError, Fault, reason_of

SYSTEM_FILE = Path("/etc/whaled/whaled.yaml")
# No configuration is this large. The limit rejects a wrong file (a log, a database) without parsing it.
MAX_FILE_BYTES = 256 * 1024


def load(path: Path | None, *, environ: Mapping[str, str], flags: Mapping[str, object]) -> Loaded:
    """Load the configuration from a file; if `path` is None, from the system's file if it exists, else the defaults.

    `flags` are values by key path. Raises ConfigError with every fault.
    """
    required = path is not None
    path = path or SYSTEM_FILE
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_FILE_BYTES + 1)
        if len(raw) > MAX_FILE_BYTES:
            problem = f"larger than {units.show_size(MAX_FILE_BYTES)}: not a configuration file"
            raise ConfigError((Fault("", problem, str(path)),))
        text = raw.decode("utf-8")
    except FileNotFoundError as error:
        if required:
            raise ConfigError((Fault("", "cannot read it: there is no such file", str(path)),)) from error
        return parse("", source="", environ=environ, flags=flags)
    except OSError as error:
        raise ConfigError((Fault("", f"cannot read it: {reason_of(error)}", str(path)),)) from error
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise ConfigError((Fault("", "not UTF-8", f"{path}:{line}"),)) from error
    loaded = parse(text, source=str(path), environ=environ, flags=flags)
    return msgspec.structs.replace(loaded, path=str(path))
