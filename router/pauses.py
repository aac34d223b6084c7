"""Whether the loop stood still: a stopped process, a paused machine, a callback that held it up.

uvloop runs what is due before it reads its sockets, so whoever spoke meanwhile would seem silent.
"""

import logging
import math
from collections.abc import Callable
from typing import Final

from router.loop_lag import LOOK_S
from router.scheduling.events import Paused

_log = logging.getLogger("baton.router")

PAUSE_S: Final = LOOK_S + 0.5
"""More than this between two signs that the loop runs is a pause; less, a busy loop."""


class Pauses:
    """Tells of every pause once. Where nobody says `awake`, none is noticed."""

    def __init__(self, clock: Callable[[], float], tell: Callable[[Paused], None]) -> None:
        self._clock = clock
        self._tell = tell
        self.late_at = math.inf
        """A loop that gives no sign until then stood still."""

    def awake(self) -> None:
        """The loop runs; to be said every `LOOK_S`."""
        now = self._clock()
        if now > self.late_at:
            self.over(now)
        self.late_at = now + PAUSE_S

    def over(self, now: float) -> None:
        """The loop runs again: told before anything else happens `now`."""
        seconds = now - self.late_at + PAUSE_S - LOOK_S
        self.late_at = now + PAUSE_S
        _log.warning("the loop stood still seconds=%.1f", seconds)
        self._tell(Paused(seconds))

    def stop(self) -> None:
        """Nobody will say any more that the loop runs."""
        self.late_at = math.inf
