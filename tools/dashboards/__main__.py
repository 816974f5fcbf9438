"""Write the dashboards to the directory given as argument, by default to deploy/grafana/dashboards."""

import sys
from pathlib import Path

from tools.dashboards import delivery, overview, upstream
from tools.dashboards.frame import render

COMMITTED = Path(__file__).parent.parent.parent / "deploy" / "grafana" / "dashboards"
DASHBOARDS = {
    "overview.json": overview.dashboard,
    "delivery.json": delivery.dashboard,
    "upstream.json": upstream.dashboard,
}


def main(directory: Path) -> None:
    """Write all dashboards to a directory."""
    directory.mkdir(parents=True, exist_ok=True)
    for name, build in DASHBOARDS.items():
        (directory / name).write_text(render(build()))


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else COMMITTED)
