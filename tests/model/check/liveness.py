"""That everything ends once faults stop: by fixed points over what was explored, or by doing it.

Without faults means: nothing more is lost, repeated, paused or killed, who is dead stays dead, who
is paused goes on, and deadlines fire only when nothing else can happen. `stuck` gives the states
from which *no* way leads to rest, `restless` those from which *some* way does not. Where a scope
was not exhausted, its unexpanded states count as at rest if one fair way of going on leads there.
"""

from array import array
from collections import Counter, deque
from collections.abc import Iterable

from tests.model.check.explore import Explorer
from tests.model.check.fleet import Fleet
from tests.model.check.state import FAULTS, Action, State
from tests.model.check.wire import Violation

MAX_STEPS = 2000


class Ways:
    """The edges without faults of one exploration, backwards."""

    def __init__(self, explorer: Explorer) -> None:
        size = len(explorer.known)
        self._first = array("i", bytes(4 * (size + 1)))
        self._num_after = array("i", bytes(4 * size))
        pairs = [
            (source, target)
            for source, target in zip(explorer.edges_from, explorer.edges_to, strict=True)
            if source != target
        ]
        for source, target in pairs:
            self._first[target + 1] += 1
            self._num_after[source] += 1
        for number in range(size):
            self._first[number + 1] += self._first[number]
        self._before = array("i", bytes(4 * len(pairs)))
        place = array("i", self._first)
        for source, target in pairs:
            self._before[place[target]] = source
            place[target] += 1
        self.size = size

    def stuck(self, at_rest: Iterable[int]) -> list[int]:
        """States from which no way leads to rest."""
        return self._rest(at_rest, needs_all=False)

    def restless(self, at_rest: Iterable[int]) -> list[int]:
        """States from which some way does not lead to rest."""
        return self._rest(at_rest, needs_all=True)

    def _rest(self, at_rest: Iterable[int], *, needs_all: bool) -> list[int]:
        good = bytearray(self.size)
        left = array("i", self._num_after)
        queue = deque(at_rest)
        for number in queue:
            good[number] = 1
        while queue:
            number = queue.popleft()
            for source in self._before[self._first[number] : self._first[number + 1]]:
                left[source] -= 1
                if not good[source] and not (needs_all and left[source]):
                    good[source] = 1
                    queue.append(source)
        return [number for number, is_good in enumerate(good) if not is_good]


class Completion:
    """Lets a state come to rest in one fair way, and remembers which states did."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        self._good: set[bytes] = set()

    def settle(self, state: State) -> list[Action]:
        """The way to rest, as far as it was not known; raises Violation where there is none."""
        fleet, way, done = self._fleet, [], Counter[Action]()
        passed: list[bytes] = []
        while len(way) < MAX_STEPS:
            form = fleet.form(state)
            passed.append(form)
            if form in self._good or fleet.is_settled(state):
                self._good.update(passed)
                return way
            action = self._next(state, done)
            if action is None:
                break
            way.append(action)
            done[action] += 1
            state = fleet.after(state, action)
        raise Violation(f"after {len(way)} more steps without a fault it has not come to rest")

    def _next(self, state: State, done: Counter[Action]) -> Action | None:
        """Who is paused goes on first, then work is done, then time passes; nobody is left out."""
        allowed = [a for a in self._fleet.actions(state) if a[0] not in FAULTS]
        orders = (("resume",), ("deliver", "turn", "read", "tell", "news", "tail"))
        for kinds in (*orders, ("due", "tick", "pass")):
            found = [action for action in allowed if action[0] in kinds]
            if found:
                return min(found, key=lambda action: done[action])
        return None


def why_not_live(explorer: Explorer) -> str:
    """Empty if everything ends once faults stop; else why not, and `found.story` says how."""
    at_rest = list(explorer.settled)
    completion = Completion(explorer.fleet)
    for number, state in explorer.unexpanded():
        try:
            completion.settle(state)
        except Violation as violation:
            explorer.found.story = explorer.story(number)
            return str(violation)
        at_rest.append(number)
    ways = Ways(explorer)
    for found, why in (
        (ways.stuck(at_rest), "nothing that can happen leads to rest any more"),
        (ways.restless(at_rest), "it may go on for ever without a fault"),
    ):
        if found:
            explorer.found.story = explorer.story(found[0])
            return why
    return ""
