"""Planted bugs: each must be found by the simulation, or what it says proves nothing.

A mutant replaces a method or two of the product while it is applied. `python -m tests.sim
--mutants` says which seed finds each, and how.
"""

from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, Final
from unittest import mock

from router.attempts import Attempt
from router.dispatch import Dispatch
from router.inbox import Inbox
from router.scheduling.attempt_events import AttemptEvents
from router.scheduling.attempts import Tries
from router.scheduling.commands import ReleaseHandle
from router.scheduling.fleet_events import FleetEvents
from router.scheduling.moving import Mover
from router.scheduling.tables import Tables
from tests.sim.run import Result, run_seed
from worker.engine.pulling import Puller
from worker.handoff.sink import Sink
from worker.handoff.source import Source
from worker.kv.pool import BlockPool
from worker.outbox import Outbox

Mutant = Callable[[], AbstractContextManager[Any]]


def _nothing(*_args: Any, **_options: Any) -> None:
    return None


def _no_lease_check() -> AbstractContextManager[Any]:
    """KV is used whatever the word says."""
    judge = Sink._judge

    def believing(self: Sink, pull_id: int, end: Any, events: Any, now: float) -> Any:
        if end.ok:
            return self._on(pull_id, events[0], "", now)
        return judge(self, pull_id, end, events, now)

    return mock.patch.object(Sink, "_judge", believing)


def _no_fence() -> AbstractContextManager[Any]:
    """Blocks that a live transfer may still write are free at once."""

    def unfenced(self: Puller, pulling: Any, blocks: Sequence[int]) -> list[Any]:
        self._pool.release(blocks)
        return [pulling.lost] if pulling.lost is not None else []

    def free(self: BlockPool, blocks: Sequence[int]) -> None:
        return None

    stack = ExitStack()
    stack.enter_context(mock.patch.object(Puller, "_quarantine", unfenced))
    stack.enter_context(mock.patch.object(BlockPool, "unquarantine", free))
    return stack


def _release_skipped() -> AbstractContextManager[Any]:
    """Handles are never given back, and expire."""
    release = Tables.release

    def forgetting(self: Tables, choice: Any) -> None:
        release(self, choice)
        self.out[:] = [one for one in self.out if not isinstance(one, ReleaseHandle)]

    return mock.patch.object(Tables, "release", forgetting)


def _resume_off_by_one() -> AbstractContextManager[Any]:
    """Another worker is told one token less than the client has."""
    start = Dispatch._start

    def short(self: Dispatch, command: Any, now: float) -> None:
        choice = self._choices[command.choice]
        whole = choice.output
        handle = getattr(command, "handle", None)
        choice.output = array("I", whole if handle is not None else whole[:-1])
        try:
            start(self, command, now)
        finally:
            choice.output = whole

    return mock.patch.object(Dispatch, "_start", short)


def _gap_overlooked() -> AbstractContextManager[Any]:
    """A delta behind a hole is taken for the next one."""
    deliver = Inbox._deliver

    def careless(self: Inbox, number: int, entry: Attempt, delta: Any, now: float) -> None:
        if delta.index > len(entry.choice.output):
            delta.index = len(entry.choice.output)
        deliver(self, number, entry, delta, now)

    return mock.patch.object(Inbox, "_deliver", careless)


@contextmanager
def _excluded_again() -> Iterator[None]:
    """Who failed a choice gets it again, for ever."""
    move = Mover.move

    def forgiving(self: Mover, attempt: Any, cause: str, **options: Any) -> None:
        move(self, attempt, cause, **{**options, "exclude": False})

    with mock.patch.object(Mover, "move", forgiving), mock.patch.object(Tries, "charge", _nothing):
        yield


MUTANTS: Final[dict[str, Mutant]] = {
    "no lease check": _no_lease_check,
    "no fence": _no_fence,
    "release skipped": _release_skipped,
    "resume off by one": _resume_off_by_one,
    "gap overlooked": _gap_overlooked,
    "replay lost": lambda: mock.patch.object(Outbox, "replay", _nothing),
    "excluded again": _excluded_again,
    "deadline not re-armed": lambda: mock.patch.object(AttemptEvents, "_rearm", _nothing),
    "stall not noticed": lambda: mock.patch.object(AttemptEvents, "_on_stall_due", _nothing),
    "leases do not expire": lambda: mock.patch.object(Source, "expire", return_value=[]),
    "records stay": lambda: mock.patch.object(Outbox, "sweep", _nothing),
    "the dead keep their work": lambda: mock.patch.object(FleetEvents, "_evacuate", _nothing),
    "hung engine believed": lambda: mock.patch.object(FleetEvents, "_move_streams", _nothing),
    "suspected for ever": lambda: mock.patch.object(FleetEvents, "on_suspect_due", _nothing),
}


FOUND_BY: Final[dict[str, int]] = {
    "no lease check": 2,
    "no fence": 14,
    "release skipped": 2,
    "resume off by one": 1,
    "gap overlooked": 3,
    "replay lost": 138,
    "excluded again": 494,
    "deadline not re-armed": 30,
    "stall not noticed": 1,
    "leases do not expire": 26,
    "records stay": 2,
    "the dead keep their work": 1,
    "hung engine believed": 169,
    "suspected for ever": 2,
}
"""The first seed that finds each, as `--mutants` says."""


def hunt(name: str, seeds: range) -> Result | None:
    """The first seed that finds the mutant."""
    with MUTANTS[name]():
        for seed in seeds:
            result = run_seed(seed)
            if result.problems:
                return result
    return None
