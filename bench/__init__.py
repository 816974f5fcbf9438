"""Measures whaled against the limit of the machine it runs on: `make bench`. docs/performance.md has the results."""
