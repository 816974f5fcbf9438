"""What systemd is told (sd_notify(3)). Without systemd every call does nothing."""

import time

import sdnotify


class Notifier:
    """Speaks to the service manager that started this process, if one did."""

    def __init__(self) -> None:
        self._notifier = sdnotify.SystemdNotifier()
        self._status = ""

    def ready(self) -> None:
        """Start-up, or a reload, is finished."""
        self._notifier.notify("READY=1")

    def reloading(self) -> None:
        """A reload begins. systemd waits for `ready`."""
        self._notifier.notify(f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}")

    def stopping(self) -> None:
        """The process is on its way out."""
        self._notifier.notify("STOPPING=1")

    def status(self, text: str) -> None:
        """One line for `systemctl status`; said again only when it changed."""
        if text != self._status:
            self._status = text
            self._notifier.notify(f"STATUS={text}")
