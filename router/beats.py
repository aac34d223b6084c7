"""What a router says of itself to all workers: that it has come, lives, and leaves."""

import asyncio
from typing import Final

from protocol.bus import Bus
from protocol.codec import encode
from protocol.errors import BusError
from protocol.events import Beat
from protocol.subjects import Subjects

BEAT_S: Final = 1.0


class Beats:
    """One per router process. A beat that the bus does not take is not said: the next is near."""

    def __init__(self, bus: Bus, subjects: Subjects, router_id: str) -> None:
        self._bus = bus
        self._subject = subjects.routers
        self._router_id = router_id

    async def run(self) -> None:
        """Beat for ever."""
        while True:
            self._say(Beat(self._router_id))
            await asyncio.sleep(BEAT_S)

    def announce(self) -> bool:
        """Ask all workers for a report now: the router is ready when it has heard them. Whether
        that could be said."""
        return self._say(Beat(self._router_id, joining=True))

    def leave(self) -> None:
        """The workers stop this router's jobs at once."""
        self._say(Beat(self._router_id, leaving=True))

    def _say(self, beat: Beat) -> bool:
        try:
            self._bus.publish(self._subject, encode(beat))
        except BusError:
            return False
        return True
