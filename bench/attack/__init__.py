"""The attacks of `make attack`: clients that try to end, starve or delay the daemon, and what they measure."""
