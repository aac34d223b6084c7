"""The whole world: where it begins, and what becomes of a state when something happens.

A state is the number of each process's state, what is on its way between them, and what may still
go wrong. What is checked on the way is what only the world can see: that what is late, or meant for
another process, changes nothing.
"""

from typing import Any

from tests.model.check.actions import Actions
from tests.model.check.processes import DEAD, RouterView
from tests.model.check.state import PASS_S, Action, Env, Letter, State
from tests.model.check.wire import Violation
from tests.model.check.worker_process import Input


class Fleet(Actions):
    """The world of one scope."""

    def beginning(self) -> State:
        """All workers live, are listed and have reported; all choices have been submitted."""
        scope, processes = self.scope, self.processes
        num = len(self.names)
        state = State(
            processes.router(),
            tuple(processes.worker(index, 1) for index in range(num)),
            ((),) * num,
            ((),) * num,
            (),
            Env(
                (1,) * num, (False,) * num, (0,) * num, scope.crashes, scope.losses, scope.repeats,
                scope.swaps, scope.pauses, scope.cancels, scope.router_deaths, scope.strangers,
                scope.slow,
            ),
        )  # fmt: skip
        for index in range(num):
            state = self._tell_router(state, ("listed", index, 1))
        state = self._tell_router(state, ("reports", self.reports(state)))
        for index in range(len(scope.prompts)):
            state = self._tell_router(state, ("submit", index))
        return state

    def after(self, state: State, action: Action) -> State:
        """Raises Violation."""
        after: State = getattr(self, f"_{action[0]}")(state, *action[1:])
        return after

    def _turn(self, state: State, index: int) -> State:
        return self._tell_worker(state, index, ("turn",))

    def _due(self, state: State, index: int, kind: str) -> State:
        if kind != "accept":
            return self._tell_worker(state, index, (kind, state.router != DEAD))
        return self._tell_worker(state, index, (kind,))

    def _slow(self, state: State, *action: Any) -> State:
        return self.after(self._spend(state, "slow"), action)

    def _pass(self, state: State) -> State:
        state = self._tell_router(state, ("tick", PASS_S, self.reports(state)))
        for index in range(len(state.workers)):
            state = self._tell_worker(state, index, ("pass", PASS_S))
        return state

    def _hush(self, state: State, index: int, kind: str) -> State:
        state = self._spend(state, "pauses")
        return self._tell_worker(state, index, (kind, False))

    def _tell(self, state: State, index: int, number: int) -> State:
        return self._tell_worker(state, index, ("tell", number))

    def _stop(self, state: State, index: int, number: int) -> State:
        return self._tell_worker(state, index, ("fail", number, "aborted", False))

    def _stranger(self, state: State, index: int) -> State:
        return self._tell_worker(self._spend(state, "strangers"), index, ("stranger",))

    def _read(self, state: State, index: int, number: int) -> State:
        read = self._worker(state.workers[index]).reads[number]
        source = self.source(state, read.source)
        if source is None:
            return self._tell_worker(state, index, ("fail", number, "the source is gone", True))
        theirs = self._worker(state.workers[source])
        if read.remote >= 0:
            return self._tell_worker(state, index, ("land", number, theirs.content[read.remote]))
        return self._tell_worker(state, index, ("word", number, theirs.words[read.lease_slot]))

    def _deliver(self, state: State, way: str, index: int) -> State:
        letter = getattr(state, way)[index][0]
        return self._take(self._drop(state, way, index), way, index, letter)

    def _lose(self, state: State, way: str, index: int) -> State:
        return self._drop(self._spend(state, "losses"), way, index)

    def _repeat(self, state: State, way: str, index: int) -> State:
        letter = getattr(state, way)[index][0]
        return self._take(self._spend(state, "repeats"), way, index, letter)

    def _swap(self, state: State, way: str, index: int) -> State:
        first, second, *rest = getattr(state, way)[index]
        return self._spend(self._with(state, way, index, (second, first, *rest)), "swaps")

    def _take(self, state: State, way: str, index: int, letter: Letter) -> State:
        incarnation, payload = letter
        if way == "up":
            if not payload:
                return self._tell_router(state, ("gone", self.names[index], incarnation))
            told = ("out", self.names[index], payload)
            self._check_late(state.router, told, payload, incarnation)
            return self._tell_router(state, told)
        if not self.reaches(state, index, incarnation):
            if state.router == DEAD:
                return state
            return self._with(state, "up", index, (*state.up[index], (incarnation, b"")))
        after = self._tell_worker(state, index, ("jobs", payload))
        if self._worker(state.workers[index]).incarnation != incarnation:
            self._check_stale(state, after, index)
        return after

    def _check_stale(self, before: State, after: State, index: int) -> None:
        """What was meant for another incarnation changes nothing, now or in the next turn."""
        plain = self._turn(before, index)
        told = self._turn(after, index)
        if self._form_of(plain.workers[index]) != self._form_of(told.workers[index]):
            raise Violation(f"{self.names[index]} obeys what was meant for another incarnation")

    def _form_of(self, number: int) -> tuple[int, tuple[Any, ...]]:
        local = self.processes.locals[number]
        return local.shape, local.names

    def _check_late(self, router: int, told: Input, payload: bytes, incarnation: str) -> None:
        """Of attempts that are over, or of a process that is, nothing changes anything."""
        _, names, seq = self.letter(payload)
        view: RouterView = self.processes.locals[router].view
        if incarnation in view.members and seq != view.seen.get(incarnation, 0) + 1:
            return  # what was lost before it is asked for
        if view.num_tails:
            return
        if any(view.live.get(name) == incarnation for name in names):
            return
        number, _ = self.processes.move(router, told)
        if self._form_of(router) != self._form_of(number):
            raise Violation("what is late has changed the router")

    def _crash(self, state: State, index: int) -> State:
        env = state.env
        return state._replace(
            workers=_set(state.workers, index, DEAD),
            env=env._replace(
                crashes=env.crashes - 1,
                paused=_set(env.paused, index, False),
                unlisted=_set(env.unlisted, index, env.lives[index]),
            ),
        )

    def _restart(self, state: State, index: int) -> State:
        life = state.env.lives[index] + 1
        return state._replace(
            workers=_set(state.workers, index, self.processes.worker(index, life)),
            news=(*state.news, ("listed", index, life)),
            env=state.env._replace(
                lives=_set(state.env.lives, index, life),
                unlisted=_set(state.env.unlisted, index, 0),
            ),
        )

    def _unlist(self, state: State, index: int) -> State:
        life = state.env.unlisted[index]
        return state._replace(
            news=(*state.news, ("unlisted", index, life)),
            env=state.env._replace(unlisted=_set(state.env.unlisted, index, 0)),
        )

    def _pause(self, state: State, index: int) -> State:
        state = self._spend(state, "pauses")
        return state._replace(env=state.env._replace(paused=_set(state.env.paused, index, True)))

    def _resume(self, state: State, index: int) -> State:
        state = state._replace(env=state.env._replace(paused=_set(state.env.paused, index, False)))
        return self._tell_worker(state, index, ("resume",))

    def _news(self, state: State) -> State:
        news = state.news[0]
        return self._tell_router(state._replace(news=state.news[1:]), news)

    def _tail(self, state: State) -> State:
        return self._tell_router(state, ("tail",))

    def _tick(self, state: State) -> State:
        return self._tell_router(state, ("tick", self._next_due(state), self.reports(state)))

    def _cancel(self, state: State, choice: int) -> State:
        return self._tell_router(self._spend(state, "cancels"), ("cancel", choice))

    def _death(self, state: State) -> State:
        state = self._spend(state, "deaths")
        state = state._replace(router=DEAD, up=((),) * len(state.up), news=())
        for index, number in enumerate(state.workers):
            if number != DEAD:
                state = self._tell_worker(state, index, ("orphaned",))
        return state

    def _spend(self, state: State, budget: str) -> State:
        left = getattr(state.env, budget) - 1
        return state._replace(env=state.env._replace(**{budget: left}))

    def _drop(self, state: State, way: str, index: int) -> State:
        return self._with(state, way, index, getattr(state, way)[index][1:])

    def _with(self, state: State, way: str, index: int, letters: tuple[Letter, ...]) -> State:
        channels = _set(getattr(state, way), index, letters)
        return state._replace(down=channels) if way == "down" else state._replace(up=channels)

    def _tell_worker(self, state: State, index: int, told: Input) -> State:
        number, sent = self.processes.move(state.workers[index], told)
        letters = state.up[index]
        if sent and state.router != DEAD:
            mine = self._worker(number).incarnation
            letters = (*letters, *((mine, payload) for _, payload in sent))
            state = state._replace(up=_set(state.up, index, letters))
        return state._replace(workers=_set(state.workers, index, number))

    def _tell_router(self, state: State, told: Input) -> State:
        number, sent = self.processes.move(state.router, told)
        down = state.down
        for subject, payload in sent:
            worker, incarnation = subject.split(".")[3:5]
            index = self.names.index(worker)
            down = _set(down, index, (*down[index], (incarnation, payload)))
        return state._replace(router=number, down=down)


def _set(items: tuple[Any, ...], index: int, item: Any) -> tuple[Any, ...]:
    return (*items[:index], item, *items[index + 1 :])
