"""Configurations as texts: parsed, or refused."""

from collections.abc import Mapping

import pytest

from whaled.config.parse import parse
from whaled.config.sections import Config
from whaled.errors import ConfigError


def read(text: str, environ: Mapping[str, str] | None = None, flags: Mapping[str, object] | None = None) -> Config:
    """Return the configuration of a text, an environment and options."""
    return parse(text, source="w.yaml", environ=environ or {}, flags=flags or {}).config


def faults(text: str, environ: Mapping[str, str] | None = None, flags: Mapping[str, object] | None = None) -> list[str]:
    """Return the faults for which a configuration is refused."""
    with pytest.raises(ConfigError) as caught:
        read(text, environ, flags)
    return [str(fault) for fault in caught.value.faults]


WATCH_LIST = """
detection:
  address_book: book.csv
  watch:
    - name: governments
      types: [government, own]
    - {name: kraken, labels: [Kraken, 'Example, Inc.'], threshold_btc: 0.00000001}
"""
