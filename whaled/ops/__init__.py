"""Operation of the process: logs, journal, systemd, certificates, descriptors, memory and the process's metrics.

In: log records, systemd's environment and sockets, the kernel's memory figures.
Out: log lines and journal entries, notifications to systemd, the result file of a reload, and calls that make the
gateway shed load while memory is short.
State: the queue of unwritten log lines, and unsent notifications.
It never decides anything about whales, and never makes the event loop wait for a reader of its output.
"""
