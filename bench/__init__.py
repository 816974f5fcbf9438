"""Benchmarks of whaled, compared with the limits of the machine: `make bench`. docs/performance.md has the results."""
