"""The parts of a page."""

import re
from pathlib import Path


def section(page: Path, heading: str) -> str:
    """Return the text below a heading, up to the next one of its level or above."""
    level = heading.partition(" ")[0]
    rest = page.read_text().partition(f"\n{heading}\n")[2]
    assert rest
    return re.split(rf"^#{{1,{len(level)}}} ", rest, maxsplit=1, flags=re.MULTILINE)[0]
