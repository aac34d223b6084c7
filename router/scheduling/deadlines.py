"""What is due when: a heap with lazy deletion and lazy re-arming.

Pushing a deadline further out, which is what progress does, touches no heap: the timer remembers
its new time and the old entry, when it surfaces, goes back in. It knows nothing of what it times.
"""

from heapq import heapify, heappop, heappush, heapreplace
from typing import Any, Final

SLACK_S: Final = 1e-6
"""A deadline this close counts as reached: clocks are shifted by sums of floats."""
_KEEP: Final = 64


class Timer:
    """One deadline of one owner."""

    __slots__ = ("due", "entry", "kind", "owner")

    def __init__(self, kind: str, owner: Any) -> None:
        self.kind = kind
        self.owner = owner
        self.due: float | None = None
        """When it fires; None while it is not armed."""
        self.entry: float | None = None
        """The earliest entry of it in the heap."""


class Deadlines:
    """Armed timers in order of time."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, Timer]] = []
        self._pushed = 0
        self._armed = 0

    def __len__(self) -> int:
        return self._armed

    def arm(self, timer: Timer, due: float) -> None:
        """Fire at `due`; replaces an earlier setting."""
        if timer.due is None:
            self._armed += 1
        timer.due = due
        entry = timer.entry
        if entry is None or due < entry:
            timer.entry = due
            self._pushed += 1
            heappush(self._heap, (due, self._pushed, timer))

    def disarm(self, timer: Timer) -> None:
        if timer.due is None:
            return
        timer.due = None
        self._armed -= 1
        if len(self._heap) > _KEEP + 4 * self._armed:
            self._compact()

    def next(self) -> float | None:
        """The earliest deadline."""
        heap = self._heap
        while heap:
            when, number, timer = heap[0]
            if timer.entry != when:
                heappop(heap)
            elif timer.due is None:
                heappop(heap)
                timer.entry = None
            elif timer.due > when:
                timer.entry = timer.due
                heapreplace(heap, (timer.due, number, timer))
            else:
                return when
        return None

    def pop_due(self, now: float) -> Timer | None:
        """Disarm and return one timer that is due, the earliest first."""
        when = self.next()
        if when is None or when > now + SLACK_S:
            return None
        timer = heappop(self._heap)[2]
        timer.entry = None
        timer.due = None
        self._armed -= 1
        return timer

    def _compact(self) -> None:
        kept: dict[int, tuple[float, int, Timer]] = {}
        for _, number, timer in self._heap:
            timer.entry = None
            if timer.due is not None:
                kept[id(timer)] = (timer.due, number, timer)
        self._heap = list(kept.values())
        for due, _, timer in self._heap:
            timer.entry = due
        heapify(self._heap)
