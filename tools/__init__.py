"""Development programs that are not part of the package."""
