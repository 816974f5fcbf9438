"""Operation of the process: logs, journal, systemd, descriptors, memory and the metrics of the process.

In: log records, systemd's environment and sockets, the kernel's memory figures.
Out: log lines and journal entries, notifications to systemd, the result file of a reload.
State: the queue of unwritten log lines, and unsent notifications.
It never decides what the daemon does, and never makes the event loop wait for a reader of its output.
"""
