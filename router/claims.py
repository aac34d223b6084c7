"""What workers claim, held against what can be true. Pure.

A worker may be broken or lie. What it says of its own attempts may harm these alone: a number that
cannot be is taken for the nearest that can, text is cut, and what would break the books of others
is not believed at all. Knows messages, not the scheduler.
"""

import math
from array import array
from typing import Final

from protocol.handoff import KvHandle
from protocol.ids import is_name
from protocol.out import Delta

MAX_SECONDS: Final = 86_400.0
MAX_COUNT: Final = 1 << 50
"""Above what a worker can count of anything: sums of such stay exact as floats."""
MAX_TEXT: Final = 500
"""Characters of a worker's words that are passed on to clients and logs."""
MAX_LABELS: Final = 16
MAX_HANDLE_ID: Final = 128
REFUSALS: Final = frozenset({"draining", "leaving", "unhealthy", "wrong_role", "full"})
"""Why workers refuse; any other word is counted as `other`."""
MAX_STEPS_BACK: Final = 64
"""Progress may begin anew this often: a sequence was preempted, a pull goes another way."""

MAX_WAITS: Final = 240
"""Said twice a second: two minutes inside of a full worker."""


def seconds(claimed: float) -> float:
    """Neither negative nor endless nor no number."""
    return min(max(claimed, 0.0), MAX_SECONDS) if math.isfinite(claimed) else 0.0


def count(claimed: int, most: int = MAX_COUNT) -> int:
    return min(max(claimed, 0), most)


def text(claimed: str) -> str:
    return claimed[:MAX_TEXT]


def name(claimed: str) -> str:
    """Empty if it cannot be a worker's."""
    return claimed if is_name(claimed) else ""


def refusal(claimed: str) -> str:
    return claimed if claimed in REFUSALS else "other"


class Labels:
    """A metric's label that workers choose: the first few words they use, then `other`."""

    def __init__(self, most: int = MAX_LABELS) -> None:
        self._most = most
        self._known: set[str] = set()

    def of(self, claimed: str) -> str:
        if claimed not in self._known:
            if len(self._known) >= self._most or not is_name(claimed.replace("+", "-")):
                return "other"
            self._known.add(claimed)
        return claimed


def new_ids(delta: Delta, have: int, most: int) -> "array[int] | None":
    """The ids of a delta that follows `have` of at most `most` tokens; None if it cannot be: more
    than was asked for, no token ids, or nothing that moves the stream on (a repeat of it could not
    be told from the first)."""
    if len(delta.ids) > most - have or not (delta.ids or delta.finish):
        return None
    try:
        return array("I", delta.ids)
    except OverflowError:
        return None


def is_own_handle(handle: KvHandle, worker: str, incarnation: str) -> bool:
    """Whether the worker lends something of its own, under a lease that can be."""
    return (
        handle.worker == worker
        and handle.incarnation == incarnation
        and 0 < len(handle.handle_id) <= MAX_HANDLE_ID
        and math.isfinite(handle.lease_s)
        and 0.0 < handle.lease_s <= MAX_SECONDS
    )


class Advance:
    """How far one leg of one attempt says it is. What does not move on is no sign of life, but for
    one that says it waits for its turn (nothing of nothing): that is believed for some minutes."""

    __slots__ = ("done", "num_waits", "steps_back")

    def __init__(self) -> None:
        self.done = -1
        self.num_waits = 0
        self.steps_back = 0

    def moved(self, done: int, total: int) -> bool:
        if done == total == 0:
            self.num_waits += 1
            return self.num_waits <= MAX_WAITS
        if not 0 <= done <= total <= MAX_COUNT or done == self.done:
            return False
        if done < self.done:
            self.steps_back += 1
        self.done = done
        return self.steps_back <= MAX_STEPS_BACK
