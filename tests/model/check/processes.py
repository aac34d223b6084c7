"""States of single processes, each kept once, and what one input makes of them, computed once.

A fleet's state is mostly made of parts that many other states have too. So a process's state is
thawed, moved, checked and frozen only the first time that it meets an input; from then on a step is
a look into a table. Two states of a process are one if canonical form and names agree: its clock is
nobody else's business.
"""

import zlib
from dataclasses import dataclass, field
from typing import Any, Final

from tests.model.check.canon import Shape, Walk, name_incarnation
from tests.model.check.copies import freeze, thaw
from tests.model.check.router_side import RouterProcess
from tests.model.check.scopes import Scope
from tests.model.check.wire import Violation
from tests.model.check.worker_process import Input, WorkerProcess, learn

Sent = tuple[tuple[str, bytes], ...]

DEAD: Final = -1


@dataclass(slots=True)
class Local:
    """One state of one process, and what the world may ask of it without thawing it."""

    frozen: bytes
    shape: int
    names: tuple[Any, ...]
    weak: tuple[tuple[str, int, float], ...]
    view: Any
    moves: dict[Input, tuple[int, Sent]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ReadView:
    """An operation of a transport, as the world moves it."""

    source: str
    lease_slot: int
    is_word: bool
    remote: int
    """The next block to be read; -1 if all are here."""
    is_over: bool
    aborted: bool
    pull_id: int


@dataclass(frozen=True, slots=True)
class WorkerView:
    incarnation: str
    seq: int
    deadlines: tuple[str, ...]
    sink_due_s: float
    """Seconds until a pull has been silent for too long."""
    wants_turn: bool
    is_empty: bool
    works_for: bool
    knows_router: bool
    reads: tuple[ReadView, ...]
    content: tuple[tuple[bytes, ...], ...]
    words: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class RouterView:
    seen: dict[str, int]
    live: dict[int, str]
    """The incarnation of each open attempt."""
    members: tuple[str, ...]
    """Incarnations that count."""
    timers: tuple[tuple[float, str], ...]
    num_tails: int
    is_empty: bool
    outcomes: tuple[str, ...]


class Processes:
    """All states of all processes of one scope that were met so far."""

    def __init__(self, scope: Scope) -> None:
        self.scope = scope
        self.locals: list[Local] = []
        self.num_computed = 0
        self._shapes: dict[Shape, int] = {}
        self._by_form: dict[Any, int] = {}
        self._fresh: dict[tuple[int, int], int] = {}
        for prompt in scope.prompts:
            from tests.model.check.worker_side import expected_output

            learn([*prompt, *expected_output(prompt, scope.max_tokens)], scope.block_size)

    def router(self) -> int:
        return self._keep(RouterProcess(self.scope))

    def worker(self, index: int, life: int) -> int:
        """A process that has just started."""
        number = self._fresh.get((index, life))
        if number is None:
            process = WorkerProcess(self.scope, index, life)
            name_incarnation(process.incarnation)
            number = self._fresh[index, life] = self._keep(process)
        return number

    def move(self, number: int, told: Input) -> tuple[int, Sent]:
        """What this process becomes and sends. Raises Violation."""
        local = self.locals[number]
        known = local.moves.get(told)
        if known is None:
            self.num_computed += 1
            process = thaw(zlib.decompress(local.frozen))
            try:
                sent = tuple(process.apply(told))
                process.check()
            except Violation:
                raise
            except Exception as error:
                raise Violation(f"{type(error).__name__}: {error}") from error
            known = local.moves[told] = (self._keep(process), sent)
        return known

    def shape(self, shape: Shape) -> int:
        number = self._shapes.get(shape)
        if number is None:
            number = self._shapes[shape] = len(self._shapes)
        return number

    def thawed(self, number: int) -> Any:
        return thaw(zlib.decompress(self.locals[number].frozen))

    def _keep(self, process: RouterProcess | WorkerProcess) -> int:
        frozen = freeze(process)
        walk = Walk(process.now)
        shape = self.shape(walk.of(process))
        names = tuple(walk.names)
        weak = tuple(walk.weak)
        if isinstance(process, RouterProcess):
            view: Any = router_view(process)
            form: Any = (shape, names, weak, tuple(view.seen.items()))
        else:
            view = worker_view(process)
            form = (shape, names, weak, view.seq)
        number = self._by_form.get(form)
        if number is None:
            number = self._by_form[form] = len(self.locals)
            self.locals.append(Local(zlib.compress(frozen, 1), shape, names, weak, view))
        return number


def router_view(process: RouterProcess) -> RouterView:
    return RouterView(
        process.seen(),
        {number: one.incarnation for number, one in process.front._attempts.live.items()},
        tuple([worker.info.incarnation for worker in process.front.scheduler.workers()]),
        process.timers(),
        len(process.tails),
        process.is_empty(),
        tuple([one.outcome if one is not None else "" for one in process.listeners]),
    )


def worker_view(process: WorkerProcess) -> WorkerView:
    thread = process.thread
    return WorkerView(
        process.incarnation,
        process.seq(),
        process.deadlines(),
        process.sink_due_s(),
        process.wants_turn(),
        process.is_empty(),
        process.works_for(),
        "router" in process.service._routers,
        tuple(
            [
                ReadView(
                    read.source,
                    read.lease_slot,
                    read.is_word,
                    read.remote[read.num_done] if read.num_done < len(read.remote) else -1,
                    read.end is not None,
                    read.aborted,
                    read.pull_id,
                )
                for read in thread.reads.live
            ]
        ),
        tuple(thread.memory.content),
        tuple(thread.leases.words),
    )
