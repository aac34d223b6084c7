"""What the scheduler knows and the few moves that keep its books: the shared state of its parts.

Two clocks. `now` is the caller's. `bus_now` stands still while our own bus is away; everything that
is measured by hearing from a worker is timed in it, so that an outage expires nothing and shifts
every such deadline by its own length.

Books. An attempt is opened once and closed once, with `ForgetAttempt` if its outcome has arrived
and `CancelAttempt` if not; a handle is held once and let go once. This file decides nothing.
"""

from collections import OrderedDict
from collections.abc import Collection
from typing import Final, NamedTuple, Protocol

from protocol.errors import LocalError
from protocol.handoff import KvHandle
from router.scheduling.admission import Admission
from router.scheduling.attempts import RetryBudget
from router.scheduling.commands import (
    AskReplay,
    CancelAttempt,
    Cause,
    Command,
    ForgetAttempt,
    Note,
    ReleaseHandle,
)
from router.scheduling.deadlines import Deadlines, Timer
from router.scheduling.fleet import Fleet, Reservation, ReservationKind, Worker
from router.scheduling.lifecycle import Attempt, AttemptKind, Choice, LegTrace, Lent
from router.scheduling.limits import Limits
from router.scheduling.policy import Rng
from router.scheduling.pools import Group
from router.scheduling.siblings import Siblings

_MAX_ENDED: Final = 1024
_RENEWALS_PER_LEASE: Final = 3
_MAX_LEVEL: Final = 16
_MIN_RENEW_S: Final = 0.1
_SAFE_SHARE: Final = 0.5
"""Of a lease that nobody can renew: a pull begins within it or not at all."""
_KIND_OF: Final[dict[AttemptKind, ReservationKind]] = {
    "prefill": "prefill",
    "pull": "decode",
    "local": "local",
}


class Past(NamedTuple):
    """What people are told of a choice: the lines of its life, and its attempts."""

    story: Collection[tuple[float, str, str]]
    legs: Collection[LegTrace]


NO_PAST: Final = Past((), ())


class StreamView(Protocol):
    """What the driver knows of the token streams; pure reads."""

    def last_heard(self, attempt: int) -> float:
        """When tokens of this attempt last arrived, or it started."""

    def num_output(self, choice: str) -> int:
        """Tokens the stream has."""


class Tables:
    """Shared by the scheduler's parts; nobody else sees it."""

    def __init__(self, limits: Limits, view: StreamView, rng: Rng, first_attempt: int) -> None:
        self.limits = limits
        self.view = view
        self.rng = rng
        self.now = 0.0
        self.bus_now = 0.0
        self.outage_s = 0.0
        """Sum of all outages of our bus so far."""
        self.frozen_at: float | None = None
        """When our bus went away, while it is."""
        self.up_at: float | None = None
        """Bus time of its return."""
        self.fleet = Fleet(limits)
        self.admission = Admission()
        self.budget = RetryBudget(limits)
        self.deadlines = Deadlines()
        self.bus_deadlines = Deadlines()
        self.drain_timer = Timer("drain", None)
        self.outage_timer = Timer("outage", None)
        self.choices: dict[str, Choice] = {}
        self.attempts: dict[int, Attempt] = {}
        self.siblings = Siblings()
        self.claims: dict[str, Worker] = {}
        """Workers that a choice wants, or has, for itself."""
        self.dirty: set[str] = set()
        """Models for which something may have become possible."""
        self.out: list[Command] = []
        self.num_waiters = 0
        """Choices that stand in the `waiters` of any group."""
        self._next_attempt = first_attempt
        self._ended: OrderedDict[str, Past] = OrderedDict()

    def set_time(self, now: float) -> None:
        self.now = now
        self.bus_now = (now if self.frozen_at is None else self.frozen_at) - self.outage_s

    def arm_bus(self, timer: Timer, delay_s: float) -> None:
        self.bus_deadlines.arm(timer, self.bus_now + delay_s)

    def note_late(self, cause: str) -> None:
        self.out.append(Note("late", cause))

    # -- attempts

    def open(
        self, choice: Choice, worker: Worker, kind: AttemptKind, tokens: int, blocks: int
    ) -> Attempt:
        """Charge the worker and expect to be answered in time; the caller sends the job."""
        number = self._next_attempt
        self._next_attempt += 1
        blocks = min(blocks, worker.info.capacity.num_blocks)
        reservation = Reservation(number, worker, _KIND_OF[kind], tokens, blocks)
        self.fleet.charge(reservation)
        attempt = Attempt(number, choice, kind, reservation, self.bus_now, self.now)
        self.attempts[number] = worker.attempts[number] = attempt
        if choice.retrying:
            choice.tries.begun_at = self.view.num_output(choice.id)
        if kind == "prefill":
            choice.prefill = attempt
        else:
            choice.decode = attempt
        self.arm_bus(attempt.timer, self.limits.accept_timeout_s)
        return attempt

    def close(self, attempt: Attempt, *, done: bool) -> None:
        """The attempt is over; its reservation too, unless its blocks are lent."""
        choice = attempt.choice
        worker = attempt.worker
        del self.attempts[attempt.id]
        del worker.attempts[attempt.id]
        self.bus_deadlines.disarm(attempt.timer)
        if attempt is choice.prefill:
            choice.prefill = None
        else:
            choice.decode = None
        attempt.trace.ended_at = self.now
        attempt.trace.answered = done
        reservation = attempt.reservation
        if choice.lent is not None and choice.lent.reservation is reservation:
            self.fleet.relieve(reservation)
        else:
            self.fleet.free(reservation)
        self.dirty.add(worker.info.model)
        over = ForgetAttempt if done else CancelAttempt
        self.out.append(over(attempt.id, worker.id, worker.incarnation))

    def ask_replay(self, attempt: Attempt, *, patience: int, blameless: bool, cause: Cause) -> None:
        """Ask its worker for its state; without a sign it moves after `patience` more asks."""
        attempt.asked = self.bus_now
        attempt.patience = patience
        attempt.blameless = blameless
        self.arm_bus(attempt.timer, self.limits.replay_timeout_s)
        worker = attempt.worker
        self.out.append(AskReplay(attempt.id, worker.id, worker.incarnation, cause))

    # -- handles

    def hold(self, attempt: Attempt, handle: KvHandle) -> None:
        """The prefill attempt's worker lends blocks to the choice."""
        worker = attempt.worker
        lent = Lent(attempt.choice, handle, attempt.reservation)
        attempt.choice.lent = worker.handles[handle.handle_id] = lent
        if worker.info.traits.release == "timeout":
            lent.expires_at = self.now + handle.lease_s * _SAFE_SHARE
        self.arm_renewal(worker, handle.lease_s)

    def arm_renewal(self, worker: Worker, lease_s: float) -> None:
        """Within a third of this lease, and of any that was promised before."""
        lease_s = min(lease_s, self.limits.lease_s)
        delay_s = max(_MIN_RENEW_S, lease_s / _RENEWALS_PER_LEASE)
        due = worker.renew.due
        if due is None or due > self.bus_now + delay_s:
            self.arm_bus(worker.renew, delay_s)

    def release(self, choice: Choice) -> None:
        """Give the handle back, if one is held; a dead lender is told nothing."""
        lent = choice.lent
        if lent is None:
            return
        choice.lent = None
        reservation = lent.reservation
        worker = reservation.worker
        if worker.handles.get(lent.handle.handle_id) is lent:
            del worker.handles[lent.handle.handle_id]
        if not worker.handles:
            self.bus_deadlines.disarm(worker.renew)
        if choice.prefill is None or choice.prefill.reservation is not reservation:
            self.fleet.free(reservation)
        self.dirty.add(worker.info.model)
        if not worker.dead:
            self.out.append(ReleaseHandle(worker.id, worker.incarnation, lent.handle.handle_id))

    # -- suspicion

    def suspect(self, worker: Worker, cause: str) -> None:
        """No new work for a while that grows with repetition; it always ends by itself."""
        if worker.suspected:
            return
        limits = self.limits
        if self.bus_now - worker.suspected_at > 2 * limits.suspect_max_s:
            worker.suspect_level = 0
        pause_s = min(limits.suspect_max_s, limits.suspect_s * 2**worker.suspect_level)
        worker.suspect_level = min(_MAX_LEVEL, worker.suspect_level + 1)
        worker.suspected = True
        worker.suspected_at = self.bus_now
        self.arm_bus(worker.suspect_timer, pause_s)
        self.fleet.refresh(worker, self.bus_now)
        self.dirty.add(worker.info.model)
        self.out.append(Note("suspected", cause, worker.id))

    # -- waiting for a decode place

    def expect_place(self, choice: Choice, group: Group, blocks: int) -> None:
        """Admitted to prefill: it counts against the group's decode places."""
        choice.group = group
        choice.pending_blocks = blocks
        group.num_pending += 1
        group.pending_blocks += blocks

    def wait(self, choice: Choice) -> None:
        """It wants a decode worker of its group as soon as there is a place."""
        group = choice.group
        assert group is not None
        if choice.id not in group.waiters:
            group.waiters[choice.id] = choice
            self.num_waiters += 1
        self.dirty.add(group.model)

    def stop_waiting(self, choice: Choice) -> None:
        """It keeps its claim to a place, if it has one, but does not want it now."""
        if choice.group is not None and choice.group.waiters.pop(choice.id, None) is not None:
            self.num_waiters -= 1

    def forget_place(self, choice: Choice) -> None:
        """It has a place, or does not want one any more."""
        group = choice.group
        if group is None:
            return
        self.stop_waiting(choice)
        choice.group = None
        group.num_pending -= 1
        group.pending_blocks -= choice.pending_blocks
        self.fleet.drop_if_empty(group)
        self.dirty.add(group.model)

    # -- a worker for one choice alone

    def claim(self, choice: Choice, worker: Worker) -> None:
        self.claims[choice.id] = worker
        worker.claim = choice.id
        self.update_seats(worker)

    def unclaim(self, choice: Choice) -> None:
        worker = self.claims.pop(choice.id, None)
        if worker is not None:
            worker.claim = ""
            worker.claim_is_due = False
            self.bus_deadlines.disarm(worker.claim_timer)
            self.update_seats(worker)
            self.dirty.add(worker.info.model)

    def update_seats(self, worker: Worker) -> None:
        for seat in worker.seats:
            seat.update()

    # -- the past

    def bury(self, choice: Choice) -> None:
        """The choice has ended; only its story stays, for a while."""
        del self.choices[choice.id]
        self.siblings.leave(choice.spec.siblings)
        self.keep_story(choice.id, Past(choice.story, choice.legs))

    def keep_story(self, choice: str, past: Past) -> None:
        self._ended[choice] = past
        if len(self._ended) > _MAX_ENDED:
            self._ended.popitem(last=False)

    def past(self, choice: str) -> Past:
        living = self.choices.get(choice)
        if living is not None:
            return Past(living.story, living.legs)
        return self._ended.get(choice, NO_PAST)

    # -- checks

    def validate(self) -> None:
        """Raises LocalError unless all books agree."""
        self.fleet.validate()
        self.admission.validate(self.choices)
        self.siblings.validate([choice.spec.siblings for choice in self.choices.values()])
        for choice in self.choices.values():
            _validate_choice(choice)
        reservations = {id(a.reservation) for a in self.attempts.values()} | {
            id(c.lent.reservation) for c in self.choices.values() if c.lent is not None
        }
        attempts: dict[int, Attempt] = {}
        for worker in self.fleet.workers.values():
            attempts |= worker.attempts
            if not all(id(r) in reservations for r in worker.reservations.values()):
                raise LocalError(f"{worker.id} is charged for nobody")
            if any(lent.choice.lent is not lent for lent in worker.handles.values()):
                raise LocalError(f"{worker.id} lends to nobody")
            if bool(worker.handles) != (worker.renew.due is not None):
                raise LocalError(f"{worker.id}: handles are not renewed")
        if attempts != self.attempts:
            raise LocalError("attempts and workers do not agree")
        self._validate_pending()

    def _validate_pending(self) -> None:
        groups = [g for model in self.fleet.models.values() for g in model.groups.values()]
        if sum(len(group.waiters) for group in groups) != self.num_waiters:
            raise LocalError("who waits for a decode place is miscounted")
        for model in self.fleet.models.values():
            for group in model.groups.values():
                pending = [c for c in self.choices.values() if c.group is group]
                waiting = {c.id for c in pending if c.state == "decode_wait"}
                waiting -= self.admission.parked.keys()
                counted = (len(pending), sum(c.pending_blocks for c in pending), waiting)
                if counted != (group.num_pending, group.pending_blocks, set(group.waiters)):
                    raise LocalError(f"{group.model}: waiting for decode does not add up")
        for choice, worker in self.claims.items():
            if choice not in self.choices or worker.claim != choice:
                raise LocalError(f"{worker.id} is claimed by nobody")


def _validate_choice(choice: Choice) -> None:
    state = choice.state
    right = (
        (choice.decode is not None) == (state in ("transferring", "local", "decoding"))
        and (choice.lent is not None) == (state in ("decode_wait", "transferring"))
        and (choice.group is not None) == (state in ("prefilling", "decode_wait"))
        and (choice.prefill is not None or state != "prefilling")
        and (choice.prefill is None or state not in ("queued", "local"))
        and (choice.timer.due is not None) == (state in ("queued", "decode_wait"))
    )
    for attempt in (choice.prefill, choice.decode):
        if attempt is not None and (attempt.choice is not choice or attempt.timer.due is None):
            right = False
    if not right:
        raise LocalError(f"choice {choice.id} in {state} is inconsistent: {list(choice.story)}")
