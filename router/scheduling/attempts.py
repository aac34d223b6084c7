"""How often a choice may be tried again, and how much the fleet may be.

Attempts are charged per choice and forgiven by progress; what is nobody's fault (a refusal, a lost
message) is free until it repeats too often. Workers that refuse it one after the other cost it
nothing but its time to wait. Retries of all choices together are a share of what was
admitted, plus a floor: a struggling fleet is not killed by its own second chances. Not counted are
those after the loss of a worker or of a message, and after a pull that failed: there are never more
than it had or lent, and a full batch must not wait for a window to pass.
"""

from collections.abc import Sequence
from typing import Final

from router.scheduling.limits import Limits

REFUSALS: Final = 4
"""So many workers in a row may refuse a choice before it pauses between them."""
FREE_SHARE: Final = 4
"""Free moves per charged attempt that a choice has before they are charged too."""
LOOKS: Final = 3
"""So often a choice that finds room only where it has failed stands aside before it goes there."""
DEATHS_ALONE: Final = 2
"""After so many process deaths under it a choice runs alone, and one more convicts it."""
DEATHS_IN_COMPANY: Final = 3
"""Who was harmless alone may have been unlucky in company once more, not twice."""
_BUCKETS: Final = 10


class Tries:
    """One choice's account."""

    __slots__ = (
        "acquitted", "away", "begun_at", "charged", "deaths", "excluded", "free", "killer", "local",
        "looks", "lost_pulls", "mark", "refusals", "tokens_under_deaths", "wait_until",
    )  # fmt: skip

    def __init__(self) -> None:
        self.charged = 0
        self.free = 0
        self.acquitted = False
        """It was let off a death once without having run alone."""
        self.deaths: list[str] = []
        """Incarnations that died while they computed it."""
        self.killer = False
        """It did that to them."""
        self.begun_at = 0
        """Tokens the stream had when its last attempt began."""
        self.tokens_under_deaths = 0
        """Tokens it got out of those that died."""
        self.mark = 0
        """Tokens the stream had at the last reset."""
        self.excluded: set[str] = set()
        """Incarnations that failed this choice: others are asked, as long as they have room."""
        self.away: set[str] = set()
        """Those of them that did no more than fall silent."""
        self.looks = 0
        """How often it stood aside since the last of them did."""
        self.refusals = 0
        """Workers that refused it since one took it."""
        self.wait_until: float | None = None
        """The deadline of the wait that its last start ended; a refusal goes on with it."""
        self.lost_pulls = 0
        self.local = False
        """Its KV comes over no wire any more: it is prefilled where it decodes."""

    def progressed(self, num_output: int, limits: Limits) -> None:
        """Enough new tokens make the account new; deaths stay."""
        if num_output - self.mark >= limits.progress_tokens:
            self.mark = num_output
            self.charged = self.free = 0
            self.lost_pulls = 0
            self.local = False
            self.forgive()

    def exclude(self, incarnation: str, *, away: bool = False) -> None:
        if away and incarnation not in self.excluded:
            self.away.add(incarnation)
        elif not away:
            self.away.discard(incarnation)
        self.excluded.add(incarnation)
        self.looks = 0

    def came_back(self, incarnation: str) -> None:
        """It was only away."""
        if incarnation in self.away:
            self.away.discard(incarnation)
            self.excluded.discard(incarnation)

    def taken(self) -> None:
        """A worker took the job: its wait is over."""
        self.refusals = 0
        self.wait_until = None

    def forgive(self) -> None:
        """It may go to everybody again."""
        self.excluded.clear()
        self.away.clear()
        self.looks = 0

    def charge(self, limits: Limits, *, free: bool) -> None:
        if free and self.free < FREE_SHARE * limits.max_attempts:
            self.free += 1
        else:
            self.charged += 1

    def exhausted(self, limits: Limits) -> bool:
        return self.charged >= limits.max_attempts

    def died(self, incarnation: str, num_output: int, *, alone: bool) -> None:
        """A process is gone that computed this choice, as the only suspect if `alone`. Nobody dies
        twice: one that is known was only away, frozen or at odds with its twin."""
        if incarnation in self.deaths:
            return
        self.deaths.append(incarnation)
        allowed = DEATHS_ALONE if alone else DEATHS_IN_COMPANY
        self.killer = len(self.deaths) > allowed
        self.tokens_under_deaths += num_output - self.begun_at

    def absolve(self, deaths: Sequence[str]) -> bool:
        """Another choice has caused these. True if any of them was held against this one."""
        left = [incarnation for incarnation in self.deaths if incarnation not in deaths]
        changed = len(left) != len(self.deaths)
        self.deaths = left
        return changed

    def acquit(self) -> None:
        """Others were harmless in its place: it may go on in company, once."""
        if not self.acquitted:
            self.acquitted = True
            del self.deaths[0]

    @property
    def alone(self) -> bool:
        return len(self.deaths) >= DEATHS_ALONE


class RetryBudget:
    """Admissions and retries of the last window, in ten buckets of it."""

    def __init__(self, limits: Limits) -> None:
        self._share = limits.retry_share
        self._floor = limits.retry_floor
        self._window_s = limits.retry_window_s
        self._width = limits.retry_window_s / _BUCKETS
        self._admitted = [0] * _BUCKETS
        self._retried = [0] * _BUCKETS
        self._bucket = 0
        self._num_admitted = 0
        self._num_retried = 0

    def _turn(self, now: float) -> int:
        bucket = int(now / self._width)
        behind = bucket - self._bucket
        if behind > 0:
            for number in range(max(self._bucket + 1, bucket - _BUCKETS + 1), bucket + 1):
                place = number % _BUCKETS
                self._num_admitted -= self._admitted[place]
                self._num_retried -= self._retried[place]
                self._admitted[place] = self._retried[place] = 0
            self._bucket = bucket
        return self._bucket % _BUCKETS

    def admitted(self, now: float) -> None:
        self._admitted[self._turn(now)] += 1
        self._num_admitted += 1

    def retried(self, now: float) -> None:
        self._retried[self._turn(now)] += 1
        self._num_retried += 1

    def excused(self, now: float) -> None:
        """The next retry is no storm's: it was made needful by a worker, a message or a wire that
        is lost, and everybody who lost it at once has it at once."""
        self._retried[self._turn(now)] -= 1
        self._num_retried -= 1

    def allows(self, now: float) -> bool:
        self._turn(now)
        return self._num_retried < self._floor + self._share * self._num_admitted

    def next_change(self) -> float:
        """When the present bucket is over: then the oldest one may be forgotten."""
        return (self._bucket + 1) * self._width

    def wait_s(self, num_queued: int, now: float) -> int:
        """Seconds until a queue of this length is served at the present pace, 1 to 30."""
        self._turn(now)
        pace = max(1.0, self._num_admitted / self._window_s)
        return min(30, 1 + int(num_queued / pace))
