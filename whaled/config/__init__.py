"""Configuration: one strict YAML file, environment and command line, parsed once into frozen sections."""
