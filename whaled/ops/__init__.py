"""Operation of the process: metrics, logs, journal, systemd, certificates, descriptors and memory.

In: the numbers that other packages report through their meter protocols, log records, systemd's environment and
sockets, the kernel's memory figures.
Out: the rendered registry, log lines and journal entries, notifications to systemd, the result file of a reload, and
calls that make the gateway shed load while memory is short.
State: the registry of metrics, the queue of unwritten log lines, and unsent notifications.
It never decides anything about whales, and never makes the event loop wait for a reader of its output.
"""
