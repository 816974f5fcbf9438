"""The table in docs/reliability.md, from the last run's counts.

PYTHONPATH=tests .venv/bin/python -m faults.table
"""

import sys
from collections.abc import Callable

import msgspec

from faults.rig import COUNTS, Counts

# All scenarios whose name begins with one of these words, such as "REST 503", share a row.
ONE_ROW = ("REST", "restart", "bitcoind")

COLUMNS: dict[str, Callable[[Counts], float]] = {
    "whales": lambda each: each.verdict.whales,
    "alerted": lambda each: each.verdict.alerted,
    "by snapshot": lambda each: each.verdict.sources.get("snapshot", 0),
    "by block": lambda each: each.verdict.sources.get("block", 0),
    "updates": lambda each: each.verdict.events - each.verdict.alerted,
    "unknowable": lambda each: each.verdict.unknowable,
    "missing": lambda each: each.verdict.missing,
    "double": lambda each: each.verdict.double,
    "wrong": lambda each: each.verdict.unknown_whales + each.verdict.wrong_amounts + each.verdict.wrong_outcomes,
    "holes": lambda each: each.verdict.holes,
    "to clients": lambda each: each.verdict.received,
    "clients' faults": lambda each: each.verdict.client_faults,
    "links": lambda each: each.links,
    "kills": lambda each: each.kills,
}


def row_of(scenario: str) -> str:
    """Return the row that a scenario belongs to: names such as "reorg 3, database" are cut at the comma."""
    first = scenario.partition(" ")[0].rstrip(",")
    return first if first in ONE_ROW else scenario.partition(", ")[0]


def table(counts: list[Counts]) -> str:
    """Return a Markdown table with a row for each scenario, and the sums."""
    rows: dict[str, list[Counts]] = {}
    for each in counts:
        rows.setdefault(row_of(each.scenario), []).append(each)
    lines = [
        f"| scenario | runs | {' | '.join(COLUMNS)} | most memory |",
        "|---|" + "---:|" * (len(COLUMNS) + 2),
    ]
    for name, group in [*sorted(rows.items()), ("**all**", counts)]:
        sums = " | ".join(f"{sum(column(each) for each in group):,}" for column in COLUMNS.values())
        lines.append(f"| {name} | {len(group)} | {sums} | {max(each.peak_mb for each in group):.0f} MB |")
    return "\n".join(lines)


def main() -> None:
    """Print the table."""
    files = sorted(COUNTS.glob("*.json"))
    if not files:
        sys.exit(f"no counts in {COUNTS}: `make test-faults` writes them")
    print(table([msgspec.json.decode(path.read_bytes(), type=Counts) for path in files]))


if __name__ == "__main__":
    main()
