"""The fleet: who is listed, live and eligible, and the ledger of what each worker was promised.

*Listed*: discovery says it may exist. *Live*: its reports arrive. *Eligible*: listed (or not long
ago), live, not draining, not stuck, not suspected: new work may go there. A `Worker` is one
incarnation; its successor under the same name is another one.

Ledger. Each attempt charges one `Reservation` to one worker, and a lent handle keeps the prefill's.
A worker's load is the sum of its live reservations and nothing else (`validate`). This file sends
nothing and starts no timers.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal

from protocol.errors import LocalError
from protocol.events import LoadReport
from protocol.worker_info import Role, WorkerInfo
from router.scheduling.deadlines import Timer
from router.scheduling.limits import Limits
from router.scheduling.pools import Group, Seat
from router.scheduling.prefix_index import PrefixIndex

if TYPE_CHECKING:
    from router.scheduling.lifecycle import Attempt, Lent

ReservationKind = Literal["prefill", "lent", "decode", "local"]

KNOWN_S: Final = 300.0
"""A model that nobody serves any more is remembered so long: 503, not 404."""
HOPE_S: Final = 10.0
"""So long after its last decode worker was eligible, a model's work may wait in the queue."""
_MAX_MODELS: Final = 1024
_MAX_PAST: Final = 8


class Reservation:
    """Capacity charged to one worker for one attempt."""

    __slots__ = ("attempt", "blocks", "kind", "tokens", "worker")

    def __init__(
        self, attempt: int, worker: Worker, kind: ReservationKind, tokens: int, blocks: int
    ) -> None:
        self.attempt = attempt
        self.worker = worker
        self.kind: ReservationKind = kind
        self.tokens = tokens
        """Tokens still to compute."""
        self.blocks = blocks


class Worker:
    """One incarnation of one worker, as this router sees it."""

    __slots__ = (
        "accept_misses", "attempts", "blocks", "claim", "claim_is_due", "claim_timer", "dead",
        "draining", "expired", "foreign_blocks", "grace", "group", "handles", "id", "incarnation",
        "info", "leaving", "listed", "live", "past", "prefills", "reask", "refused",
        "refused_timer", "renew", "report", "reservations", "running", "seats", "silence", "slot",
        "snapshot_asked", "steps_at", "stray", "stuck", "suspect_level", "suspect_timer",
        "suspected", "suspected_at", "tokens", "unreachable_at", "was_silent",
    )  # fmt: skip

    def __init__(self, info: WorkerInfo, group: Group, slot: int) -> None:
        self.info = info
        self.id = info.worker_id
        self.incarnation = info.incarnation
        self.group = group
        self.slot = slot
        self.listed = True
        self.live = False
        self.leaving = False
        self.expired = False
        """Its key has been gone for longer than the grace."""
        self.dead = False
        """Replaced or removed: nothing is sent to it any more."""
        self.suspected = False
        self.was_silent = False
        """It is suspected for its silence alone."""
        self.stuck = False
        self.refused = False
        self.draining = info.draining
        self.report: LoadReport | None = None
        self.steps_at = 0.0
        self.suspect_level = 0
        self.suspected_at = 0.0
        self.accept_misses = 0
        self.unreachable_at: float | None = None
        """When the bus first said that nobody listens, unless it was heard since."""
        self.snapshot_asked = 0.0
        self.foreign_blocks = 0
        """Blocks that others than us use, by its last report."""
        self.claim = ""
        """The choice that wants this worker for itself."""
        self.claim_is_due = False
        """It has waited long enough for the worker to run empty."""
        self.claim_timer = Timer("claim", self)
        self.past: deque[str] = deque(maxlen=_MAX_PAST)
        """Dead incarnations of the same name."""
        self.stray = ""
        """An incarnation that was never listed but reports under this name."""
        self._open_books()
        self.silence = Timer("silence", self)
        self.grace = Timer("grace", self)
        self.suspect_timer = Timer("suspect", self)
        self.refused_timer = Timer("refused", self)
        self.reask = Timer("reask", self)
        self.renew = Timer("renew", self)

    def _open_books(self) -> None:
        """Nothing is promised yet."""
        self.tokens = 0
        self.blocks = 0
        self.running = 0
        self.prefills = 0
        self.reservations: dict[int, Reservation] = {}
        self.attempts: dict[int, Attempt] = {}
        """Open attempts by number."""
        self.handles: dict[str, Lent] = {}
        """Handles that live choices hold of it."""
        self.seats: list[Seat] = []
        """Its places in the pools; empty iff it is not eligible."""

    def could_be_eligible(self) -> bool:
        """All that eligibility asks for."""
        return (
            self.live
            and (self.listed or not self.expired)
            and not (self.draining or self.leaving or self.dead)
            and not (self.suspected or self.stuck)
        )

    @property
    def eligible(self) -> bool:
        return bool(self.seats)


@dataclass(frozen=True, slots=True)
class WorkerView:
    """One worker for metrics and admin pages."""

    info: WorkerInfo
    listed: bool
    live: bool
    eligible: bool
    suspected: bool
    draining: bool
    report: LoadReport | None
    num_reservations: int
    running: int
    """Decode and local reservations."""
    prefills: int
    tokens: int
    """Tokens we still wait for it to compute."""
    blocks: int
    """Blocks we promised ourselves or hold lent there."""


@dataclass(frozen=True, slots=True)
class ModelView:
    """How many workers are eligible for a served name."""

    prefill: int
    decode: int
    listed: int


class Model:
    """One served name: its groups of interchangeable workers."""

    __slots__ = ("groups", "hope_until", "known_until", "num_harmless", "num_workers")

    def __init__(self) -> None:
        self.groups: dict[tuple[object, ...], Group] = {}
        self.num_workers = 0
        self.num_harmless = 0
        """Suspected killers that did no harm alone, since the last one that did."""
        self.hope_until = 0.0
        self.known_until = 0.0


class Fleet:
    """All workers, by name, and the models they serve.

    `now` is the bus's clock, which stands still while our own bus is away: who was not heard then
    is neither hoped for nor forgotten in that time.
    """

    def __init__(self, limits: Limits) -> None:
        self.workers: dict[str, Worker] = {}
        self.models: dict[str, Model] = {}
        self.index = PrefixIndex(limits.max_index_blocks)
        self.by_slot: dict[int, Worker] = {}

    def find(self, worker_id: str, incarnation: str) -> Worker | None:
        """The worker, if this is its present incarnation."""
        worker = self.workers.get(worker_id)
        return worker if worker is not None and worker.incarnation == incarnation else None

    def known(self, name: str, now: float) -> Model | None:
        """The model, if it is served or was not long ago."""
        model = self.models.get(name)
        if model is None or (not model.num_workers and now > model.known_until):
            return None
        return model

    def add(self, info: WorkerInfo, now: float) -> Worker:
        """A new incarnation; the caller has removed the one before."""
        slot = self.index.join(2 * info.capacity.num_blocks)
        worker = Worker(info, self._group_for(info, now), slot)
        self.by_slot[worker.slot] = worker
        self.workers[info.worker_id] = worker
        return worker

    def update(self, worker: Worker, info: WorkerInfo, now: float) -> None:
        """The same incarnation says something new about itself."""
        self._unseat(worker, now)
        old = worker.group
        worker.group = self._group_for(info, now)
        self._leave_group(worker, old, now)
        worker.info = info
        worker.draining = info.draining or bool(worker.report and worker.report.draining)

    def holds(self, worker: Worker, last_id: int, hashes: Sequence[bytes]) -> bool:
        """It holds these blocks after its event `last_id`. True: too old already, ask again."""
        slot, again = self.index.replace(worker.slot, last_id, hashes)
        del self.by_slot[worker.slot]
        self.by_slot[slot] = worker
        worker.slot = slot
        return again

    def remove(self, worker: Worker, now: float) -> None:
        """Nothing of it is left; its attempts and handles have been taken off it before."""
        worker.dead = True
        self._unseat(worker, now)
        self._leave_group(worker, worker.group, now)
        self.index.leave(worker.slot)
        del self.by_slot[worker.slot]
        del self.workers[worker.id]

    def refresh(self, worker: Worker, now: float) -> bool:
        """Seat or unseat it as its eligibility says. True if that changed."""
        eligible = worker.could_be_eligible()
        if eligible == bool(worker.seats):
            return False
        if eligible:
            worker.seats = [Seat(pool, worker) for pool in worker.group.pools(worker.info.role)]
        else:
            self._unseat(worker, now)
        return True

    def _unseat(self, worker: Worker, now: float) -> None:
        if worker.seats and can_decode(worker.info.role):
            self.models[worker.info.model].hope_until = now + HOPE_S
        for seat in worker.seats:
            seat.leave()
        worker.seats = []

    def _group_for(self, info: WorkerInfo, now: float) -> Group:
        model = self.models.get(info.model)
        if model is None:
            self._forget_models(now)
            model = self.models[info.model] = Model()
        key = (info.model_digest, info.layout)
        group = model.groups.get(key)
        if group is None:
            group = model.groups[key] = Group(info.model, info.model_digest, info.layout)
        group.join(info)
        model.num_workers += 1
        if can_decode(info.role):
            model.hope_until = max(model.hope_until, now + HOPE_S)
        return group

    def _leave_group(self, worker: Worker, group: Group, now: float) -> None:
        group.leave(worker.info)
        model = self.models[worker.info.model]
        model.num_workers -= 1
        model.known_until = now + KNOWN_S
        self.drop_if_empty(group)

    def hope_again(self, now: float) -> None:
        """Who was not heard because nobody was may be here in a moment."""
        for worker in self.workers.values():
            if can_decode(worker.info.role):
                self.models[worker.info.model].hope_until = now + HOPE_S

    def drop_if_empty(self, group: Group) -> None:
        """A group that has no workers and for which nobody waits is forgotten."""
        if not group.num_workers and not group.num_pending:
            groups = self.models[group.model].groups
            if groups.get((group.digest, group.layout)) is group:
                del groups[group.digest, group.layout]

    def _forget_models(self, now: float) -> None:
        idle = [name for name, m in self.models.items() if not m.num_workers and not m.groups]
        for name in idle:
            if now > self.models[name].known_until or len(self.models) >= _MAX_MODELS:
                del self.models[name]

    def charge(self, reservation: Reservation) -> None:
        worker = reservation.worker
        worker.reservations[reservation.attempt] = reservation
        self._count(reservation, 1)

    def relieve(self, reservation: Reservation) -> None:
        """What it was to compute is computed; a prefill's blocks are lent from now on."""
        worker = reservation.worker
        worker.tokens -= reservation.tokens
        reservation.tokens = 0
        if reservation.kind == "prefill":
            reservation.kind = "lent"
            worker.prefills -= 1
        for seat in worker.seats:
            seat.update()

    def free(self, reservation: Reservation) -> None:
        worker = reservation.worker
        if worker.reservations.pop(reservation.attempt, None) is not reservation:
            raise LocalError(f"reservation of attempt {reservation.attempt} freed twice")
        self._count(reservation, -1)

    def _count(self, reservation: Reservation, sign: int) -> None:
        worker = reservation.worker
        worker.tokens += sign * reservation.tokens
        worker.blocks += sign * reservation.blocks
        kind = reservation.kind
        if kind == "prefill":
            worker.prefills += sign
        elif kind != "lent":
            worker.running += sign
        for seat in worker.seats:
            seat.update()

    def validate(self) -> None:
        """Raises LocalError unless every load is the sum of its reservations."""
        for worker in self.workers.values():
            _validate_load(worker)
        for model in self.models.values():
            for group in model.groups.values():
                group.validate()
        self.index.validate()


def can_decode(role: Role) -> bool:
    return role != "prefill"


def _validate_load(worker: Worker) -> None:
    held = worker.reservations.values()
    kinds = [r.kind for r in held]
    counted = (
        sum(r.tokens for r in held),
        sum(r.blocks for r in held),
        kinds.count("prefill"),
        kinds.count("decode") + kinds.count("local"),
    )
    if counted != (worker.tokens, worker.blocks, worker.prefills, worker.running):
        raise LocalError(f"load of {worker.id} is not the sum of its reservations")
    if worker.could_be_eligible() != worker.eligible:
        raise LocalError(f"{worker.id} is seated wrongly")
