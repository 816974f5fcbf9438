"""The backend's silence on a link, and what is due because of it. Pure."""

from whaled.config.sections import UpstreamSettings


class Silence:
    """The time since the last message was received, and the action due because of it: a ping, or giving up the link.

    Only time spent waiting in a receive counts, so a slow consumer does not make the backend look dead.
    """

    def __init__(self, settings: UpstreamSettings) -> None:
        # At least one ping is sent, and has time to be answered, before the link is given up.
        self._ping_after_s = min(settings.ping_interval, settings.stale_after / 2)
        self._stale_after_s = settings.stale_after
        self._lasted_s = 0.0
        self.pings = 0

    def reset(self) -> None:
        """Record that a message was received."""
        self._lasted_s = 0.0
        self.pings = 0

    def add(self, seconds: float) -> None:
        """Add `seconds` of silence that did not last until the next action."""
        self._lasted_s += seconds

    def _due_s(self) -> float:
        return min((self.pings + 1) * self._ping_after_s, self._stale_after_s)

    def remaining_s(self) -> float:
        """Return the time until the next ping is due or the link is stale, in seconds."""
        return self._due_s() - self._lasted_s

    def elapsed(self) -> bool:
        """Record that `remaining_s` passed in silence. Return True if the link is now stale, False if a ping is due."""
        self._lasted_s = self._due_s()
        return self.pings > 0 and self._lasted_s >= self._stale_after_s
