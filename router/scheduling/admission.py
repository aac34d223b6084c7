"""Who waits for a first or second start, in which order.

A lane holds the choices that the same workers may serve: one model, one digest. Within a lane
retries and resumes go ahead of new work, and each of the two is first come, first served: a long
prompt is never overtaken for ever by short ones. It knows no workers and starts nothing.
"""

from collections import OrderedDict
from collections.abc import Iterator
from typing import Final

from protocol.errors import LocalError
from router.scheduling.lifecycle import Choice

_BUCKET_S: Final = 5.0
_MIN_STARTS: Final = 16
_MIN_S: Final = 2.0


class Lane:
    """Choices of one model and digest, the oldest first. It lives while somebody stands in it, so
    its pace is that of a fleet that is full; its time is the bus's, which an outage stops."""

    __slots__ = ("_before", "_bucket_at", "_now", "_since", "fresh", "retries")

    def __init__(self, now: float) -> None:
        self.retries: OrderedDict[str, Choice] = OrderedDict()
        self.fresh: OrderedDict[str, Choice] = OrderedDict()
        self._since = self._bucket_at = now
        self._before = self._now = 0

    def __len__(self) -> int:
        return len(self.retries) + len(self.fresh)

    def started(self, now: float) -> None:
        """One of it was given to a worker."""
        self._turn(now)
        self._now += 1

    def wait_s(self, now: float) -> float:
        """How long the whole of it takes to be served at its pace; 0 while nothing is known: so
        few starts, or so short a time, say nothing."""
        self._turn(now)
        starts = self._before + self._now
        elapsed = now - self._since
        if starts < _MIN_STARTS or elapsed < _MIN_S:
            return 0.0
        return len(self) * elapsed / starts

    def _turn(self, now: float) -> None:
        """What is older than two buckets is forgotten; a bucket is as long as it must be."""
        if self._now >= _MIN_STARTS and now - self._bucket_at >= _BUCKET_S:
            self._since, self._before = self._bucket_at, self._now
            self._bucket_at, self._now = now, 0


class Admission:
    """Every choice in state `queued` stands in exactly one place here, unless it is parked, as
    one in `decode_wait` may be."""

    def __init__(self) -> None:
        self._lanes: dict[str, dict[str, Lane]] = {}
        self.lonely: OrderedDict[str, Choice] = OrderedDict()
        """Those that run alone on a worker."""
        self.parked: dict[str, Choice] = {}
        """Those whom only those could take that failed them, or nobody: they wait a little."""
        self.num_queued = 0
        """In lanes and lonely."""

    def add(self, choice: Choice, now: float, *, first: bool = False) -> None:
        """To the end of where it belongs, or in front."""
        if choice.tries.alone:
            self.lonely[choice.id] = choice
        else:
            spec = choice.spec
            lanes = self._lanes.setdefault(spec.model, {})
            lane = lanes.get(spec.model_digest)
            if lane is None:
                lane = lanes[spec.model_digest] = Lane(now)
            queue = lane.retries if choice.retrying else lane.fresh
            queue[choice.id] = choice
            if first:
                queue.move_to_end(choice.id, last=False)
        self.num_queued += 1

    def discard(self, choice: Choice) -> None:
        """From wherever it stands, if anywhere."""
        self.parked.pop(choice.id, None)
        found = self.lonely.pop(choice.id, None)
        spec = choice.spec
        lanes = self._lanes.get(spec.model)
        if found is None and lanes is not None:
            lane = lanes.get(spec.model_digest)
            if lane is not None:
                found = (lane.retries if choice.retrying else lane.fresh).pop(choice.id, None)
                if not lane.retries and not lane.fresh:
                    del lanes[spec.model_digest]
                    if not lanes:
                        del self._lanes[spec.model]
        if found is not None:
            self.num_queued -= 1

    def lane_of(self, choice: Choice) -> Lane | None:
        """Where it stands or would stand, if anybody stands there."""
        spec = choice.spec
        return self._lanes.get(spec.model, {}).get(spec.model_digest)

    def is_first(self, choice: Choice) -> bool:
        """Whether others perhaps do not start because this one stands in front of them."""
        lane = self.lane_of(choice)
        if choice.id in self.lonely or lane is None:
            return choice.id in self.lonely
        return any(next(iter(queue), "") == choice.id for queue in (lane.retries, lane.fresh))

    def lanes(self, model: str) -> list[Lane]:
        lanes = self._lanes.get(model)
        return list(lanes.values()) if lanes else []

    def _all(self) -> Iterator[Choice]:
        yield from self.lonely.values()
        for lanes in self._lanes.values():
            for lane in lanes.values():
                yield from lane.retries.values()
                yield from lane.fresh.values()

    def validate(self, choices: dict[str, Choice]) -> None:
        """Raises LocalError unless the queued choices are those that stand here, once each."""
        here = [choice.id for choice in self._all()]
        standing = here + [c.id for c in self.parked.values() if c.state == "queued"]
        queued = [c.id for c in choices.values() if c.state == "queued"]
        if sorted(standing) != sorted(queued) or len(here) != self.num_queued:
            raise LocalError(f"queue {sorted(standing)}, states {sorted(queued)}")
