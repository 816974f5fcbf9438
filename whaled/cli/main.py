"""The command line: `whaled COMMAND`."""


def entry() -> None:
    """Console script."""
    raise SystemExit(2)
