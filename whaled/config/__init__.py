"""The configuration, parsed from one strict YAML file, the environment and the command line into frozen sections.

Enters: YAML text, environment variables (and the files they name), options of the command line.
Leaves: a frozen `Config` with the origin of each value, or every fault at once; the schema of all keys.
Owns: no state; keys, defaults, units and bounds are defined in `sections`.
Never: opens a file that a key names (key ring, address book, certificate), nor changes a running daemon.
"""
