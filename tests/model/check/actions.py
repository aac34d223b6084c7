"""What can happen next in a state. Each action is one smallest step.

One envelope arrives, one turn of an engine runs, one block or word is read, one deadline fires.
"""

from collections.abc import Iterator

from tests.model.check.parts import Parts
from tests.model.check.processes import DEAD, ReadView
from tests.model.check.state import PASS_S, WORK, Action, State
from tests.model.check.wire import Violation


class Actions(Parts):
    """Names what can happen; does nothing."""

    def actions(self, state: State) -> Iterator[Action]:
        """Deadlines fire when nothing else can happen, or early, which is a fault."""
        env = state.env
        others: list[Action] = []
        for index, number in enumerate(state.workers):
            if number != DEAD and not env.paused[index]:
                others += self._worker_actions(state, index)
            others += self._channel_actions(state, index)
            yield from self._life_actions(state, index)
        if state.router != DEAD:
            others += self._router_actions(state)
        yield from others
        if self.scope.prompt_time:
            if self._may_pass(state, others):
                yield ("pass",)
            return
        busy = any(action[0] in WORK for action in others)
        if not busy or env.slow:
            for action in self._deadlines(state):
                yield ("slow", *action) if busy else action

    def _may_pass(self, state: State, others: list[Action]) -> bool:
        """Reads take their time, but less than a silence may last; all else takes none."""
        return not any(action[0] in WORK - {"read"} for action in others) and all(
            self._worker(number).sink_due_s > PASS_S for number in state.workers
        )

    def _deadlines(self, state: State) -> Iterator[Action]:
        for index in self._healthy(state):
            view = self._worker(state.workers[index])
            for kind in view.deadlines:
                yield ("due", index, kind)
            if view.knows_router and state.router == DEAD:
                yield ("due", index, "router_silent")
        if state.router != DEAD and self._next_due(state) is not None:
            yield ("tick",)

    def _channel_actions(self, state: State, index: int) -> Iterator[Action]:
        env = state.env
        for way, letters in (("down", state.down[index]), ("up", state.up[index])):
            if not letters:
                continue
            if way == "up" or self._listens(state, index, letters[0][0]):
                yield ("deliver", way, index)
                if env.repeats and letters[0][1]:
                    yield ("repeat", way, index)
            if env.losses and letters[0][1]:
                yield ("lose", way, index)
            if env.swaps and len(letters) > 1 and letters[0] != letters[1]:
                yield ("swap", way, index)

    def _listens(self, state: State, index: int, incarnation: str) -> bool:
        """Whether a letter to this incarnation can be taken, or bounced, now."""
        number = state.workers[index]
        if number == DEAD or self._worker(number).incarnation != incarnation:
            return True
        return not state.env.paused[index]

    def _worker_actions(self, state: State, index: int) -> Iterator[Action]:
        view = self._worker(state.workers[index])
        if view.wants_turn and self._does_something(state.workers[index]):
            yield ("turn", index)
        if view.knows_router and state.router != DEAD and state.env.pauses:
            yield ("hush", index, "router_silent")
        for number, read in enumerate(view.reads):
            yield from self._read_actions(state, index, number, read)
        if state.env.strangers:
            yield ("stranger", index)

    def _does_something(self, number: int) -> bool:
        """A turn in which everybody waits is none: time may pass."""
        try:
            return self.processes.move(number, ("turn",)) != (number, ())
        except Violation:
            return True

    def _read_actions(
        self, state: State, index: int, number: int, read: ReadView
    ) -> Iterator[Action]:
        if read.is_over or (read.remote < 0 and not read.is_word and not self.scope.two_sided):
            yield ("tell", index, number)
            return
        source = self.source(state, read.source)
        if source is None or not (self.scope.two_sided and state.env.paused[source]):
            yield ("read", index, number)
        if read.aborted:
            yield ("stop", index, number)

    def _life_actions(self, state: State, index: int) -> Iterator[Action]:
        env, alive = state.env, state.workers[index] != DEAD
        if alive and env.crashes:
            yield ("crash", index)
        if not alive and self.scope.restarts and state.router != DEAD:
            yield ("restart", index)
        if env.unlisted[index] and state.router != DEAD:
            yield ("unlist", index)
        if alive and env.paused[index]:
            yield ("resume", index)
        elif alive and env.pauses:
            yield ("pause", index)

    def _router_actions(self, state: State) -> Iterator[Action]:
        view = self._router(state)
        if state.news:
            yield ("news",)
        if view.num_tails:
            yield ("tail",)
        if state.env.cancels:
            for choice, outcome in enumerate(view.outcomes):
                if not outcome:
                    yield ("cancel", choice)
        if state.env.deaths:
            yield ("death",)
