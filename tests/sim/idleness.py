"""Whether somebody waited until its deadline beside workers that had nothing to do.

Looked at through the router's own books and the workers' reports. Excused is who waits for the
retry budget, for a worker of its own, or for a bus that was away.
"""

from collections.abc import Iterable, Iterator
from typing import Final

from protocol.worker_info import Role
from router.scheduling.commands import Command, EndChoice
from router.scheduling.events import Event, Ticked, WorkerReported
from router.scheduling.fleet import Worker
from router.scheduling.lifecycle import Choice
from router.scheduling.scheduler import Scheduler

IDLE_S: Final = 8.0
"""Longer than a choice stands aside, with the worst of luck."""
_WAITED: Final = frozenset({"queue_timeout", "decode_wait_timeout"})


class IdleWatch:
    """Stands between a driver and its scheduler."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self._handle = scheduler.handle
        self._idle_since: dict[str, float] = {}
        self.problems: list[str] = []
        scheduler.handle = self.handle  # type: ignore[method-assign]

    def handle(self, event: Event, now: float) -> list[Command]:
        t = self._scheduler._t
        before = dict(t.choices) if isinstance(event, Ticked) else {}
        commands = self._handle(event, now)
        if isinstance(event, WorkerReported):
            worker = t.fleet.workers.get(event.worker)
            if worker is not None:
                self._look_at(worker, now)
        for command in commands:
            if isinstance(command, EndChoice) and command.code in _WAITED:
                choice = before.get(command.choice)
                if choice is not None:
                    self._judge(choice, now)
        return commands

    def _look_at(self, worker: Worker, now: float) -> None:
        report = worker.report
        idle = (
            worker.eligible
            and not worker.claim
            and not worker.reservations
            and report is not None
            and not (report.running or report.waiting)
            and not (report.lent_blocks or report.quarantined_blocks)
        )
        if idle:
            self._idle_since.setdefault(worker.incarnation, now)
        else:
            self._idle_since.pop(worker.incarnation, None)

    def _judge(self, choice: Choice, now: float) -> None:
        t = self._scheduler._t
        was_up = t.frozen_at is None and (t.up_at is None or t.bus_now - t.up_at > IDLE_S)
        if not was_up or choice.tries.alone or not t.budget.allows(now):
            return
        eligible = [worker for worker in t.fleet.workers.values() if worker.eligible]
        idle = [worker for worker in eligible if self._is_idle(worker, now)]
        prefillers = list(_of("decode", eligible))
        if any(_of("prefill", idle)) and (not prefillers or any(_of("decode", idle))):
            names = [worker.incarnation for worker in idle]
            self.problems.append(
                f"{choice.id} waited beside {names}, excluded {choice.tries.excluded}"
            )

    def _is_idle(self, worker: Worker, now: float) -> bool:
        since = self._idle_since.get(worker.incarnation)
        return since is not None and now - since >= IDLE_S and not worker.reservations


def _of(other: Role, workers: Iterable[Worker]) -> Iterator[Worker]:
    """Those that do not have the other role."""
    return (worker for worker in workers if worker.info.role != other)
