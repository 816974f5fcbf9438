"""The commands of `whaled`: one module per command, and the entry point in `main`.

In: the command line, the environment and the configuration file; for some commands the event log, the key ring, address
books, or a running daemon's WebSocket. Out: text or JSON on standard output, messages on standard error, and the exit
status. It owns no state of its own: it reads and writes only the files that its options or the configuration name, and
`run` hands over to whaled.service. It never decides what a whale is, and no other package imports it.
"""
