"""Programs of the project that are not shipped."""
