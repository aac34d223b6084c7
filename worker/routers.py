"""Which routers this worker has to do with: how long each has been silent, how much it was sent.

Silence is measured in time in which we listened: while our own bus is away or our process stands
still, nobody falls silent. A router that comes back is numbered on from where it was, so that it
sees what it missed. Knows no bus and no jobs; time is an argument.
"""

from collections import OrderedDict
from collections.abc import Mapping
from typing import Final

MAX_ROUTERS: Final = 256
MAX_TICK_S: Final = 2.0
"""A tick that comes later than this after the one before proves that we were not listening."""


class Routers:
    """Bounded: the longest silent one makes room for a new one."""

    def __init__(self, *, timeout_s: float, max_routers: int = MAX_ROUTERS) -> None:
        self._timeout_s = timeout_s
        self._max_routers = max_routers
        self._listened_s = 0.0
        self._ticked_at: float | None = None
        self._heard: OrderedDict[str, float] = OrderedDict()
        self._seqs: dict[str, int] = {}
        self._past: OrderedDict[str, int] = OrderedDict()

    def __contains__(self, router: str) -> bool:
        return router in self._heard

    def __len__(self) -> int:
        return len(self._heard)

    @property
    def num_remembered(self) -> int:
        """Names kept in all, for whatever reason."""
        return len(self._heard.keys() | self._seqs.keys() | self._past.keys())

    @property
    def last_seqs(self) -> Mapping[str, int]:
        """The last envelope's number for each router that was heard of lately."""
        return self._seqs

    def hear(self, router: str) -> str:
        """A sign of life. Returns the router that had to make room, to be forgotten; or empty."""
        self._heard[router] = self._listened_s
        self._heard.move_to_end(router)
        return next(iter(self._heard)) if len(self._heard) > self._max_routers else ""

    def excuse_all(self) -> None:
        """Silence up to now was ours, not theirs."""
        for router in self._heard:
            self._heard[router] = self._listened_s

    def tick(self, now: float, *, listening: bool) -> list[str]:
        """Call about once a second. Returns who has been silent for too long."""
        before, self._ticked_at = self._ticked_at, now
        for router in self._seqs.keys() - self._heard.keys():
            self._retire(router)
        if not listening:
            return []
        if before is not None:
            self._listened_s += min(now - before, MAX_TICK_S)
        overdue = self._listened_s - self._timeout_s
        return [router for router, heard in self._heard.items() if heard < overdue]

    def next_seq(self, router: str) -> int:
        """The number of the next envelope to `router`; used up by asking."""
        seq = self._seqs.get(router)
        if seq is None:
            seq = self._past.pop(router, 0)
        self._seqs[router] = seq + 1
        return seq + 1

    def forget(self, router: str) -> None:
        """It left or is silent; only its number is kept, for a while."""
        self._heard.pop(router, None)
        self._retire(router)

    def _retire(self, router: str) -> None:
        seq = self._seqs.pop(router, None)
        if seq is not None:
            self._past[router] = seq
            if len(self._past) > self._max_routers:
                self._past.popitem(last=False)
