"""What can be asked of a state: who lives, what is on its way, and which states are the same."""

from array import array
from hashlib import blake2b
from typing import Any

from protocol.codec import decode_jobs, decode_out
from protocol.errors import BadMessage
from tests.model.check.canon import Walk
from tests.model.check.processes import DEAD, Processes, RouterView, WorkerView
from tests.model.check.scopes import Scope
from tests.model.check.state import State


class Parts:
    """Reads states of one scope; changes none."""

    def __init__(self, scope: Scope) -> None:
        self.scope = scope
        self.processes = Processes(scope)
        self.names = scope.names
        self._letters: dict[bytes, tuple[int, tuple[Any, ...], int]] = {}

    def _worker(self, number: int) -> WorkerView:
        view: WorkerView = self.processes.locals[number].view
        return view

    def _router(self, state: State) -> RouterView:
        view: RouterView = self.processes.locals[state.router].view
        return view

    def source(self, state: State, incarnation: str) -> int | None:
        """Which worker has this memory, if it lives."""
        for index, number in enumerate(state.workers):
            if number != DEAD and self._worker(number).incarnation == incarnation:
                return index
        return None

    def reaches(self, state: State, index: int, incarnation: str) -> bool:
        """A mailbox belongs to one incarnation."""
        number = state.workers[index]
        return number != DEAD and self._worker(number).incarnation == incarnation

    def _healthy(self, state: State) -> list[int]:
        return [
            index
            for index, number in enumerate(state.workers)
            if number != DEAD and not state.env.paused[index]
        ]

    def reports(self, state: State) -> tuple[tuple[str, str, int, int], ...]:
        """What those that can speak would report, as far as their letters have come."""
        reports = []
        for index in self._healthy(state):
            view = self._worker(state.workers[index])
            last = view.seq
            for incarnation, payload in state.up[index]:
                if incarnation == view.incarnation and payload:
                    last = min(last, self.letter(payload)[2] - 1)
            blocks = len(view.content)
            reports.append((self.names[index], view.incarnation, blocks, last))
        return tuple(reports)

    def _next_due(self, state: State) -> float | None:
        """Seconds until something fires at the router, if those that can speak go on to."""
        speaking = [self._worker(state.workers[i]).incarnation for i in self._healthy(state)]
        for due, silent in self._router(state).timers:
            if silent not in speaking:
                return due
        return None

    def letter(self, payload: bytes) -> tuple[int, tuple[Any, ...], int]:
        """Its shape, the names in it, its number (0 for jobs)."""
        known = self._letters.get(payload)
        if known is None:
            message: Any
            try:
                message = decode_out(payload)
                seq, content = message.seq, message.outs
            except BadMessage:
                message = decode_jobs(payload)
                seq, content = 0, message.jobs
            walk = Walk(0.0)
            shape = self.processes.shape((type(message).__name__, walk.of(content)))
            known = self._letters[payload] = (shape, tuple(walk.names), seq)
        return known

    def is_settled(self, state: State) -> bool:
        """All choices have ended, nothing is held, lent, fenced or charged anywhere."""
        if state.router != DEAD and not self._router(state).is_empty:
            return False
        return all(n == DEAD or self._worker(n).is_empty for n in state.workers)

    def form(self, state: State) -> bytes:
        """Equal for states that differ in names and clocks alone."""
        processes = self.processes.locals
        known: dict[Any, int] = {}
        numbers: list[int] = []

        def add(names: tuple[Any, ...]) -> None:
            for name in names:
                number = known.get(name)
                if number is None:
                    number = known[name] = len(known)
                numbers.append(number)

        seen: dict[str, int] = {}
        if state.router != DEAD:
            local = processes[state.router]
            seen = local.view.seen
            numbers.append(local.shape)
            add(local.names)
        for number in state.workers:
            if number == DEAD:
                numbers.append(-1)
                continue
            local = processes[number]
            numbers.append(local.shape)
            add(local.names)
            if state.router != DEAD:
                numbers.append(local.view.seq - seen.get(local.view.incarnation, 0))
        for letters in (*state.down, *state.up):
            numbers.append(len(letters))
            for incarnation, payload in letters:
                add((incarnation,))
                if payload:
                    shape, names, seq = self.letter(payload)
                    numbers.append(shape)
                    add(names)
                    if seq:
                        numbers.append(seq - seen.get(incarnation, 0))
                else:
                    numbers.append(-2)
        self._add_rest(state, known, numbers)
        return blake2b(array("i", numbers).tobytes(), digest_size=16).digest()

    def _add_rest(self, state: State, known: dict[Any, int], numbers: list[int]) -> None:
        """Discovery's news, what is half forgotten, and what may still go wrong."""
        env = state.env
        for kind, index, life in state.news:
            numbers += (len(kind), index, life - env.lives[index])
        if state.router != DEAD:
            weak = self.processes.locals[state.router].weak
            for kind, name, age in sorted(
                (kind, known[name], age) for kind, name, age in weak if name in known
            ):
                numbers += (len(kind), name, int(age * 1000))
        numbers += env.paused
        for index, life in enumerate(env.unlisted):
            numbers.append(life and env.lives[index] - life + 1)
        numbers += env[3:]
