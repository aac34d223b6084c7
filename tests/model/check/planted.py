"""Mistakes to plant in the real machines: each function gives the patches of one.

Every one is something that an implementation of this hand-off has done, or could do.
"""

from collections.abc import Callable, Sequence
from typing import Any
from unittest import mock

import msgspec

from protocol.handoff import KvHandle
from protocol.ids import JobKey
from protocol.out import OutEnvelope
from router.dispatch import Dispatch
from router.inbox import Inbox
from router.scheduling.attempt_events import AttemptEvents
from router.scheduling.attempts import Tries
from router.scheduling.fleet_events import FleetEvents
from router.scheduling.tables import Tables
from tests.model.check.fleet import Fleet
from tests.model.check.state import State
from tests.model.check.worker_side import FIRST_NONCE, Nonces
from worker.engine.lending import Lender
from worker.engine.pulling import Puller
from worker.handoff import sink as sink_module
from worker.handoff import states
from worker.handoff.ends import TransferEnd
from worker.handoff.sink import Sink
from worker.handoff.source import Lease, Source
from worker.handoff.states import Held, PullEvent, PullState
from worker.kv import pool as pool_module
from worker.outbox import Outbox
from worker.service import Service

Patch = Any
"""A context manager of `unittest.mock`."""


def _set(owner: object, name: str, new: Any) -> Patch:
    return mock.patch.object(owner, name, new)


def _rows(table: dict[Any, Any], rows: dict[Any, Any]) -> Patch:
    return mock.patch.dict(table, rows)


# -- the word


def no_check() -> Sequence[Patch]:
    real = Sink.data_ended

    def data_ended(self: Sink, pull_id: int, end: TransferEnd, now: float) -> Any:
        record = self._records.get(pull_id)
        if record is not None and end.ok:
            end = msgspec.structs.replace(end, word=record.pull.handle.ranks[0].nonce)
        return real(self, pull_id, end, now)

    return [_set(Sink, "data_ended", data_ended)]


def word_before_data() -> Sequence[Patch]:
    return [
        _rows(
            states.NEXT,
            {
                (PullState.WAITING, PullEvent.START): PullState.CHECKING,
                (PullState.CHECKING, PullEvent.WORD_RIGHT): PullState.PULLING,
                (PullState.PULLING, PullEvent.DATA_CAME): PullState.READY,
            },
        )
    ]


def server_looks_early() -> Sequence[Patch]:
    real = Fleet._read

    def read(self: Fleet, state: State, index: int, number: int) -> State:
        view = self._worker(state.workers[index]).reads[number]
        source = self.source(state, view.source)
        if view.remote >= 0 and source is not None:
            word = self._worker(state.workers[source]).words[view.lease_slot]
            state = self._tell_worker(state, index, ("early", number, word))
        return real(self, state, index, number)

    return [_set(Fleet, "_read", read)]


def word_zeroed_late() -> Sequence[Patch]:
    def move(self: Source, handle_id: str, event: Any, now: float) -> Lease | None:
        lease = self._lent.get(handle_id)
        if lease is None or event.value == "renew":
            return lease
        del self._lent[handle_id]
        self._pool.unlend(lease.blocks)
        self._words.zero(lease.slot)
        self._free_slots.append(lease.slot)
        return lease

    return [_set(Source, "_move", move)]


def nonce_reused() -> Sequence[Patch]:
    def lend(self: Lender, sequence: Any, now: float) -> KvHandle | None:
        nonces, self._nonce = self._nonce, _WordAgain(self._nonce)
        try:
            return real(self, sequence, now)
        finally:
            self._nonce = nonces

    real = Lender.lend
    return [_set(Lender, "lend", lend)]


class _WordAgain:
    """Fresh handle ids, and always the same word."""

    def __init__(self, nonces: Callable[[], int]) -> None:
        self.nonces = nonces
        self.asked = 0

    def __call__(self) -> int:
        self.asked += 1
        return FIRST_NONCE + 7 if self.asked == 3 else self.nonces()


# -- fencing


def free_before_terminal() -> Sequence[Patch]:
    return [
        _rows(
            states.NEXT,
            {
                (PullState.PULLING, PullEvent.ABANDON): PullState.FREED,
                (PullState.PULLING, PullEvent.TIME_OUT): PullState.FAILED,
            },
        )
    ]


def quarantine_not_kept() -> Sequence[Patch]:
    def quarantine(self: Puller, pulling_: Any, blocks: Sequence[int]) -> Any:
        self._pool.release(blocks)
        return [pulling_.lost] if pulling_.lost is not None else []

    def free(self: Puller, pulling_: Any, blocks: Sequence[int], now: float) -> Any:
        return []

    return [_set(Puller, "_quarantine", quarantine), _set(Puller, "_free", free)]


def scratch_slot_reused() -> Sequence[Patch]:
    fewer = {PullState.FENCED_WORD: states.HOLDS[PullState.FENCED_WORD] - {Held.SLOT}}
    return [_rows(states.HOLDS, fewer)]


def cancel_leaks_pull() -> Sequence[Patch]:
    return [_set(Puller, "abandon", lambda self, sequence, now: None)]


# -- leases and blocks


def double_release() -> Sequence[Patch]:
    real = Lender.release

    def release(self: Lender, handle_ids: Sequence[str], now: float) -> None:
        blocks = [self._source._lent[one].blocks for one in handle_ids if one in self._source._lent]
        real(self, handle_ids, now)
        for lent in blocks:
            self._source._pool.unlend(lent)

    return [_set(Lender, "release", release)]


def lease_never_expires() -> Sequence[Patch]:
    return [_set(Lender, "expire", lambda self, now: None)]


def lent_is_evictable() -> Sequence[Patch]:
    state, block = pool_module._State, pool_module._Block

    def derived(self: Any) -> Any:
        if self.in_transfer:
            return state.QUARANTINED
        if self.sequences:
            return state.USED
        return state.FREE if self.digest is None else state.CACHED

    return [_set(block, "derived", derived)]


def renew_forgotten() -> Sequence[Patch]:
    def on_renew_due(self: FleetEvents, worker: Any) -> None:
        self._t.arm_renewal(worker, self._t.limits.lease_s)

    return [_set(FleetEvents, "on_renew_due", on_renew_due)]


def renew_ignored() -> Sequence[Patch]:
    return [_set(Lender, "renew", lambda self, handle_ids, now: None)]


# -- who is meant


def foreign_incarnation_obeyed() -> Sequence[Patch]:
    def reaches(self: Fleet, state: Any, index: int, incarnation: str) -> bool:
        return bool(state.workers[index] >= 0)

    def first(self: Nonces, first_nonce: int) -> None:
        self.last = FIRST_NONCE + first_nonce // 1_000_000 % 10

    return [_set(Fleet, "reaches", reaches), _set(Nonces, "__init__", first)]


def attempt_ignored() -> Sequence[Patch]:
    real = Inbox._on_outcome

    def on_outcome(self: Inbox, envelope: OutEnvelope, out: Any, now: float) -> None:
        live = self._attempts.live
        if out.attempt not in live:
            for number, entry in live.items():
                out = msgspec.structs.replace(out, attempt=number)
                whose = {"worker": entry.worker, "incarnation": entry.incarnation}
                envelope = msgspec.structs.replace(envelope, **whose)
                break
        real(self, envelope, out, now)

    return [_set(Inbox, "_on_outcome", on_outcome)]


def wrong_handle() -> Sequence[Patch]:
    return [*handles_mixed_up(), _set(sink_module, "mismatch", lambda pull, size: "")]


def handles_mixed_up() -> Sequence[Patch]:
    """Not a mutant by itself: the sink refuses what it gets."""
    real = Dispatch._start

    def start(self: Dispatch, command: Any, now: float) -> None:
        handle = getattr(command, "handle", None)
        if handle is not None:
            others = [
                lent.handle
                for worker in self.scheduler._t.fleet.workers.values()
                for lent in worker.handles.values()
                if lent.choice.id != command.choice
            ]
            command = msgspec.structs.replace(command, handle=(others or [handle])[0])
        real(self, command, now)

    return [_set(Dispatch, "_start", start)]


# -- second chances


class _Nobody(set[str]):
    """Forgets who has failed."""

    def add(self, item: str) -> None: ...


def same_worker_again() -> Sequence[Patch]:
    real = Tries.__init__

    def init(self: Tries) -> None:
        real(self)
        self.excluded = _Nobody()

    return [_set(Tries, "__init__", init)]


def deadline_not_armed() -> Sequence[Patch]:
    real = Tables.open

    def open_(self: Tables, *args: Any) -> Any:
        attempt = real(self, *args)
        self.bus_deadlines.disarm(attempt.timer)
        return attempt

    return [_set(Tables, "open", open_)]


def accept_timeout_waits_on() -> Sequence[Patch]:
    def on_accept_due(self: AttemptEvents, attempt: Any) -> None:
        self._t.arm_bus(attempt.timer, self._t.limits.accept_timeout_s)

    return [_set(AttemptEvents, "_on_accept_due", on_accept_due)]


def stall_waits_on() -> Sequence[Patch]:
    def on_attempt_due(self: AttemptEvents, attempt: Any) -> None:
        self._t.arm_bus(attempt.timer, self._t.limits.stall_timeout_s)

    return [_set(AttemptEvents, "on_attempt_due", on_attempt_due)]


def tries_not_counted() -> Sequence[Patch]:
    return [_set(Tries, "exhausted", lambda self, limits: False)]


def load_not_freed() -> Sequence[Patch]:
    real = Tables.close

    def close(self: Tables, attempt: Any, *, done: bool) -> None:
        reservation = attempt.reservation
        real(self, attempt, done=done)
        worker = reservation.worker
        if reservation.attempt not in worker.reservations:
            worker.blocks += reservation.blocks

    return [_set(Tables, "close", close)]


# -- the stream


def replay_off_by_one() -> Sequence[Patch]:
    real = Outbox.replay

    def replay(self: Outbox, key: JobKey, index: int) -> None:
        real(self, key, index + 1)

    return [_set(Outbox, "replay", replay)]


def repeats_are_taken() -> Sequence[Patch]:
    real = Inbox._deliver

    def deliver(self: Inbox, number: int, entry: Any, delta: Any, now: float) -> None:
        delta.index = len(entry.choice.output)
        real(self, number, entry, delta, now)

    return [_set(Inbox, "_deliver", deliver)]


def gap_is_skipped() -> Sequence[Patch]:
    real = Inbox._deliver

    def deliver(self: Inbox, number: int, entry: Any, delta: Any, now: float) -> None:
        delta.index = min(delta.index, len(entry.choice.output))
        real(self, number, entry, delta, now)

    return [_set(Inbox, "_deliver", deliver)]


# -- dead routers


def dead_router_served() -> Sequence[Patch]:
    return [_set(Service, "_drop_router", lambda self, router, why: None)]
