"""The admin API: HTTP and JSON on a Unix socket, for operators on this machine.

`server` admits, reads and answers requests, `peers` decides who may send them, `sockets` makes the socket, `desk` has
the acts on a running daemon and the table of them, `views` what they return, and `door` is the other side: the client
of the commands.
"""
