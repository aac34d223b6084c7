"""The dispatches in flight, as the driver must remember them. Decides nothing."""

from collections import OrderedDict
from typing import Final

from msgspec import Struct, field

from protocol.out import OutEnvelope
from router.choices import Choice
from router.claims import Advance

MAX_DONE: Final = 2048
"""Groups of neighbours that are remembered to have ended well: sixty thousand short requests, or
some seconds where each decode leg was opened long ago."""
MAX_STRAYS: Final = 4096
STRAY_S: Final = 1.0
"""An attempt that is not ours is answered this often at most."""


class Attempt(Struct, eq=False):
    """One dispatch, as the driver must remember it."""

    choice: Choice
    worker: str
    incarnation: str
    leg: str
    started_at: float
    heard_at: float
    prefilled: bool = False
    decoding: bool = False
    asked_at: float = float("-inf")
    """When a replay was last asked for, and from which output index."""
    asked_from: int = -1
    advance: Advance = field(default_factory=Advance)

    def is_of(self, envelope: OutEnvelope) -> bool:
        """Whether it is this process's to speak of: incarnations are no secret."""
        return self.incarnation == envelope.incarnation and self.worker == envelope.worker


class Attempts:
    """The attempts in flight, and the last few that ended well.

    A late repeat of the latter (the answer to a replay that crossed the outcome) must not be
    answered with a cancel or a release: its handle may be on its way to a decode worker.
    """

    def __init__(self) -> None:
        self.live: dict[int, Attempt] = {}
        self._done: OrderedDict[int, int] = OrderedDict()
        """Number // 64 -> a bit for each: numbers are given in turn, and nearly all end well."""

    def add(self, number: int, attempt: Attempt) -> None:
        self.live[number] = attempt
        attempt.choice.attempts.add(number)

    def drop(self, number: int, *, done: bool = False) -> None:
        entry = self.live.pop(number, None)
        if entry is not None:
            entry.choice.attempts.discard(number)
        if done:
            group = number >> 6
            self._done[group] = self._done.get(group, 0) | 1 << (number & 63)
            if len(self._done) > MAX_DONE:
                self._done.popitem(last=False)

    def is_done(self, number: int) -> bool:
        return self._done.get(number >> 6, 0) >> (number & 63) & 1 == 1


class Strays:
    """Attempts that workers speak of and that are not ours: when each was last answered."""

    def __init__(self) -> None:
        self._answered: dict[tuple[str, int], float] = {}

    def is_due(self, incarnation: str, attempt: int, now: float) -> bool:
        """Whether to answer now; then it is taken as done."""
        key = (incarnation, attempt)
        if now - self._answered.get(key, float("-inf")) < STRAY_S:
            return False
        if len(self._answered) >= MAX_STRAYS:
            self._answered.clear()
        self._answered[key] = now
        return True
