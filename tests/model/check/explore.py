"""Breadth first over canonical states, those with fewer faults first: every state once.

So a bounded run has seen everything that fewer faults than `num_faults` can do, and a story is one
with the fewest faults, and the shortest of these.
"""

import time
from array import array
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from tests.model.check.fleet import Fleet
from tests.model.check.scopes import Scope
from tests.model.check.state import FAULTS, Action, State
from tests.model.check.wire import Violation


@dataclass
class Found:
    """What an exploration has seen."""

    scope: Scope
    num_states: int = 0
    num_transitions: int = 0
    num_faults: int = 0
    """All that fewer faults can do was seen."""
    depth: int = 0
    seconds: float = 0.0
    exhausted: bool = False
    num_audited: int = 0
    """States reached in two ways whose successors were compared."""
    violation: str = ""
    story: list[Action] = field(default_factory=list)


class Explorer:
    """One scope, state by state."""

    def __init__(
        self,
        scope: Scope,
        *,
        audited: int = 0,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """`audited`: so many of the first states are compared when they are met again."""
        self.scope = scope
        self.fleet = Fleet(scope)
        self.found = Found(scope)
        self._clock = clock
        self._audited = audited
        self._samples: dict[int, State] = {}
        self._by_action: dict[Action, int] = {}
        self._actions: list[Action] = []
        self._came_by = array("i")
        self._parents = array("i")
        self.known: dict[bytes, int] = {}
        self._frontiers: list[deque[tuple[int, State, int]]] = [deque()]
        """States that were met and not looked at yet, with their depths, by faults."""
        self.edges_from = array("i")
        self.edges_to = array("i")
        self.settled: list[int] = []

    def run(self, *, max_states: int, keep_edges: bool = True) -> Found:
        """Until all is seen, `max_states` states are, or something is wrong."""
        found = self.found
        began_at = self._clock()
        try:
            first = self.fleet.beginning()
            self._frontiers[0].append((self._add(first, -1, (), self.fleet.form(first)), first, 0))
            while len(self.known) < max_states and (waiting := self._next_frontier()):
                number, state, depth = waiting.popleft()
                found.depth = max(found.depth, depth)
                self._expand(number, state, depth, keep_edges=keep_edges)
            found.exhausted = self._next_frontier() is None
        except Violation as violation:
            found.violation = str(violation)
        found.num_states = len(self.known)
        found.seconds = self._clock() - began_at
        return found

    def _next_frontier(self) -> deque[tuple[int, State, int]] | None:
        """Those with the fewest faults that there are."""
        while self.found.num_faults < len(self._frontiers):
            waiting = self._frontiers[self.found.num_faults]
            if waiting:
                return waiting
            self.found.num_faults += 1
        return None

    def unexpanded(self) -> Iterator[tuple[int, State]]:
        """What was met and not looked at."""
        for waiting in self._frontiers:
            for number, state, _ in waiting:
                yield number, state

    def _expand(self, number: int, state: State, depth: int, *, keep_edges: bool) -> None:
        fleet, found = self.fleet, self.found
        for action in fleet.actions(state):
            try:
                after = fleet.after(state, action)
            except Violation:
                found.story = [*self.story(number), action]
                raise
            found.num_transitions += 1
            form = fleet.form(after)
            known = self.known.get(form)
            if known is None:
                known = self._add(after, number, action, form)
                self._wait(known, after, depth + 1, found.num_faults + (action[0] in FAULTS))
            elif known in self._samples:
                self._audit(known, after)
            if keep_edges and action[0] not in FAULTS and action[0] != "restart":
                self.edges_from.append(number)
                self.edges_to.append(known)

    def _wait(self, number: int, state: State, depth: int, faults: int) -> None:
        if faults == len(self._frontiers):
            self._frontiers.append(deque())
        self._frontiers[faults].append((number, state, depth))

    def _audit(self, number: int, state: State) -> None:
        """What is taken for the same must go on in the same way. Raises Violation."""
        other = self._samples[number]
        if other == state:
            return
        self.found.num_audited += 1
        if self._successors(other) != self._successors(state):
            self.found.story = self.story(number)
            raise Violation("two states are taken for the same and go on differently")

    def _successors(self, state: State) -> list[bytes]:
        fleet = self.fleet
        return sorted(fleet.form(fleet.after(state, action)) for action in fleet.actions(state))

    def _add(self, state: State, parent: int, action: Action, form: bytes) -> int:
        number = len(self.known)
        self.known[form] = number
        self._parents.append(parent)
        self._came_by.append(self._number_of(action))
        if number < self._audited:
            self._samples[number] = state
        if self.fleet.is_settled(state):
            self.settled.append(number)
        return number

    def _number_of(self, action: Action) -> int:
        number = self._by_action.get(action)
        if number is None:
            number = self._by_action[action] = len(self._actions)
            self._actions.append(action)
        return number

    def story(self, number: int) -> list[Action]:
        """The actions that led to a state, the shortest way."""
        actions: list[Action] = []
        while self._parents[number] >= 0:
            actions.append(self._actions[self._came_by[number]])
            number = self._parents[number]
        return actions[::-1]
