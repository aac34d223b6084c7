"""Who waits for a first or second start, in which order.

A lane holds the choices that the same workers may serve: one model, one digest. Within a lane
retries and resumes go ahead of new work, and each of the two is first come, first served: a long
prompt is never overtaken for ever by short ones. It knows no workers and starts nothing.
"""

from collections import OrderedDict
from collections.abc import Iterator

from protocol.errors import LocalError
from router.scheduling.lifecycle import Choice

LaneKey = tuple[str, str]


class Lane:
    """Choices of one model and digest, the oldest first."""

    __slots__ = ("fresh", "retries")

    def __init__(self) -> None:
        self.retries: OrderedDict[str, Choice] = OrderedDict()
        self.fresh: OrderedDict[str, Choice] = OrderedDict()


class Admission:
    """Every choice in state `queued` stands in exactly one place here, unless it is parked, as
    one in `decode_wait` may be."""

    def __init__(self) -> None:
        self._lanes: dict[str, dict[str, Lane]] = {}
        self.lonely: OrderedDict[str, Choice] = OrderedDict()
        """Those that run alone on a worker."""
        self.parked: dict[str, Choice] = {}
        """Those whose every worker has failed them: they wait a little."""
        self.num_queued = 0
        """In lanes and lonely."""

    def add(self, choice: Choice) -> None:
        """To the end of where it belongs."""
        if choice.tries.alone:
            self.lonely[choice.id] = choice
        else:
            spec = choice.spec
            lanes = self._lanes.setdefault(spec.model, {})
            lane = lanes.get(spec.model_digest)
            if lane is None:
                lane = lanes[spec.model_digest] = Lane()
            (lane.retries if choice.retrying else lane.fresh)[choice.id] = choice
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
