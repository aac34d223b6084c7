"""What discovery and the workers' reports say about the fleet, and what silence does to it.

Discovery lists, reports make live; only both make eligible. Death is known from a new incarnation
under the same name, believed after a silence or two unreachable jobs; in each case the open
attempts move at once and a handle of the dead is not waited for.
"""

from math import isfinite
from typing import Final

from protocol.events import LoadReport
from protocol.worker_info import WorkerInfo
from router.scheduling.commands import AskKvSnapshot, AskReplay, Note, RenewHandles
from router.scheduling.events import (
    KvChanged,
    KvSnapshotArrived,
    Paused,
    WorkerLeaving,
    WorkerListed,
    WorkerReported,
    WorkerUnlisted,
    WorkerUnreachable,
)
from router.scheduling.fleet import Worker
from router.scheduling.lifecycle import Attempt
from router.scheduling.moving import Mover
from router.scheduling.tables import Tables

SECOND_UNREACHABLE_S: Final = 0.5
_REASK_S: Final = 0.25
_SNAPSHOT_AGAIN_S: Final = 6.0
AFTER_OUTAGE_PATIENCE: Final = 2


class FleetEvents:
    def __init__(self, tables: Tables, mover: Mover) -> None:
        self._t = tables
        self._mover = mover

    # -- discovery

    def on_listed(self, event: WorkerListed) -> None:
        t = self._t
        info = event.info
        worker = t.fleet.workers.get(info.worker_id)
        if worker is not None and worker.incarnation == info.incarnation:
            self._on_listed_again(worker, info)
            return
        past: list[str] = []
        if worker is not None:
            past = [i for i in worker.past if i != info.incarnation]
            past.append(worker.incarnation)
            self._remove(worker, "replaced", died=True)
        fresh = t.fleet.add(info, t.bus_now)
        fresh.past.extend(past)
        fresh.steps_at = t.bus_now
        t.arm_bus(fresh.silence, t.limits.silence_timeout_s)

    def _on_listed_again(self, worker: Worker, info: WorkerInfo) -> None:
        t = self._t
        worker.listed = True
        worker.expired = False
        t.bus_deadlines.disarm(worker.grace)
        if info != worker.info:
            t.fleet.update(worker, info, t.bus_now)
        self._refresh(worker)

    def on_unlisted(self, event: WorkerUnlisted) -> None:
        t = self._t
        worker = t.fleet.find(event.worker, event.incarnation)
        if worker is None:
            return
        worker.listed = False
        if worker.live:
            t.arm_bus(worker.grace, t.limits.unlisted_grace_s)
        else:
            self._remove(worker, "unlisted", died=False)

    def on_grace_due(self, worker: Worker) -> None:
        worker.expired = True
        self._refresh(worker)
        self._remove_if_expired(worker)

    def _remove_if_expired(self, worker: Worker) -> None:
        """Unlisted for long: it keeps what it has to finish, then it is forgotten."""
        if worker.expired and not worker.reservations:
            self._remove(worker, "unlisted", died=False)

    def _refresh(self, worker: Worker) -> None:
        if self._t.fleet.refresh(worker, self._t.bus_now):
            self._t.dirty.add(worker.info.model)

    def _remove(self, worker: Worker, cause: str, *, died: bool) -> None:
        t = self._t
        worker.live = False
        worker.dead = True
        t.fleet.refresh(worker, t.bus_now)
        self._evacuate(worker, cause, died=died)
        for timer in (
            worker.silence, worker.grace, worker.suspect_timer, worker.refused_timer,
            worker.reask, worker.renew, worker.claim_timer,
        ):  # fmt: skip
            t.bus_deadlines.disarm(timer)
        t.fleet.remove(worker, t.bus_now)
        t.out.append(Note("removed", cause, worker.id))

    def _evacuate(self, worker: Worker, cause: str, *, died: bool) -> None:
        """Its attempts move at once; who waits with a handle of it is prefilled again."""
        t = self._t
        for attempt in list(worker.attempts.values()):
            if t.attempts.get(attempt.id) is attempt:
                self._mover.move(attempt, cause, died=died)
        for lent in list(worker.handles.values()):
            choice = lent.choice
            if choice.lent is lent and choice.state == "decode_wait":
                self._mover.lose_source(choice, cause)
            elif choice.lent is lent and choice.decode is not None:
                self._hurry(choice.decode)

    def _hurry(self, pull: Attempt) -> None:
        """Its source is silent: the last byte may be here already, but do not wait long for it."""
        t = self._t
        due = pull.timer.due
        soon = t.bus_now + t.limits.silence_timeout_s
        if due is not None and due > soon:
            t.bus_deadlines.arm(pull.timer, soon)

    # -- reports

    def on_reported(self, event: WorkerReported) -> None:
        t = self._t
        worker = t.fleet.workers.get(event.worker)
        if worker is None:
            return
        if worker.incarnation != event.incarnation:
            self._on_stray_report(worker, event.incarnation)
            return
        report = event.report
        if worker.report and (not worker.live or worker.unreachable_at is not None):
            self._mover.came_back(worker.incarnation)
        if not worker.live:
            worker.live = True
            worker.steps_at = t.bus_now
            if worker.stray:
                worker.past.append(worker.stray)
                worker.stray = ""
            t.out.append(Note("live", "reported", worker.id))
        if worker.reask.due is not None:  # it listens again: now it can answer
            t.bus_deadlines.disarm(worker.reask)
            self.on_reask_due(worker)
        worker.unreachable_at = None
        t.arm_bus(worker.silence, t.limits.silence_timeout_s)
        self._take_load(worker, report)
        if worker.was_silent and not self._can_wait(worker):
            self._believe_again(worker)
        self._refresh(worker)
        if t.fleet.index.heard_last(worker.slot, report.last_kv_event) or (
            t.fleet.index.is_waiting(worker.slot)
            and t.bus_now - worker.snapshot_asked > _SNAPSHOT_AGAIN_S
        ):
            self._ask_snapshot(worker)
        self._remove_if_expired(worker)

    def _can_wait(self, worker: Worker) -> bool:
        """Others can do whatever it is there for."""
        return all(pool.order for pool in worker.group.pools(worker.info.role))

    def _believe_again(self, worker: Worker) -> None:
        """Somebody who is heard is better than nobody: this silence is not held against it."""
        self._t.bus_deadlines.disarm(worker.suspect_timer)
        worker.suspected = worker.was_silent = False
        worker.suspect_level = max(0, worker.suspect_level - 1)

    def _take_load(self, worker: Worker, report: LoadReport) -> None:
        t = self._t
        before = worker.report
        worker.report = report
        worker.draining = worker.info.draining or report.draining
        idle = report.running + report.waiting <= 0
        if before is None or idle or report.steps != before.steps:
            worker.steps_at = t.bus_now
            worker.stuck = False
        elif not worker.stuck and t.bus_now - worker.steps_at >= t.limits.stall_timeout_s:
            worker.stuck = True
            t.out.append(Note("suspected", "no_steps", worker.id))
            self._move_streams(worker)
        used = report.num_blocks - report.free_blocks
        foreign = max(0, min(used, worker.info.capacity.num_blocks) - worker.blocks)
        if foreign != worker.foreign_blocks:
            if foreign < worker.foreign_blocks:
                t.dirty.add(worker.info.model)
            worker.foreign_blocks = foreign
            t.update_seats(worker)

    def _move_streams(self, worker: Worker) -> None:
        """The process speaks but its engine stands still. It would answer every replay for ever,
        and no token would come. The other legs are ended by their own deadlines."""
        t = self._t
        for attempt in list(worker.attempts.values()):
            if attempt.phase == "decoding" and t.attempts.get(attempt.id) is attempt:
                self._mover.move(attempt, "no_steps")

    def _on_stray_report(self, worker: Worker, incarnation: str) -> None:
        """A successor that discovery has not told us of, or a ghost. If the one we know is heard
        again, the other was a ghost and is ignored from then on."""
        if incarnation in worker.past or worker.stray == incarnation:
            return
        worker.stray = incarnation
        if worker.live:
            self._fall_silent(worker, "replaced")

    def on_leaving(self, event: WorkerLeaving) -> None:
        worker = self._t.fleet.find(event.worker, event.incarnation)
        if worker is not None:
            worker.leaving = True
            self._refresh(worker)

    def on_silence_due(self, worker: Worker) -> None:
        if worker.live:
            self._fall_silent(worker, "silent")

    def _fall_silent(self, worker: Worker, cause: str) -> None:
        """Nobody says that it lives; unlisted, it is forgotten."""
        t = self._t
        worker.live = False
        t.bus_deadlines.disarm(worker.silence)
        t.bus_deadlines.disarm(worker.reask)
        self._refresh(worker)
        t.out.append(Note("silent", cause, worker.id))
        if worker.listed:
            worker.was_silent = cause == "silent" and (worker.was_silent or not worker.suspected)
            t.suspect(worker, cause)
            self._evacuate(worker, cause, died=True)
        else:
            self._remove(worker, cause, died=True)

    def on_suspect_due(self, worker: Worker) -> None:
        worker.suspected = worker.was_silent = False
        self._refresh(worker)

    def on_refused_due(self, worker: Worker) -> None:
        worker.refused = False
        self._t.update_seats(worker)
        self._t.dirty.add(worker.info.model)

    def on_renew_due(self, worker: Worker) -> None:
        """All handles that we hold of one worker, in one command."""
        t = self._t
        leases = (lent.handle.lease_s for lent in worker.handles.values())
        t.arm_renewal(worker, min(leases, default=t.limits.lease_s))
        t.out.append(RenewHandles(worker.id, worker.incarnation, list(worker.handles)))

    # -- the bus says that nobody listens

    def on_unreachable(self, event: WorkerUnreachable) -> None:
        t = self._t
        worker = t.fleet.find(event.worker, event.incarnation)
        if worker is None or t.frozen_at is not None:
            return
        if self._just_up():
            self._on_not_back_yet(worker)
            return
        t.suspect(worker, "unreachable")
        for attempt in list(worker.attempts.values()):
            if attempt.phase == "sent" and t.attempts.get(attempt.id) is attempt:
                self._mover.move(attempt, "gone", exclude=False, free=True)
        if worker.unreachable_at is None:
            worker.unreachable_at = t.bus_now
            t.out.append(Note("gone", "unreachable", worker.id))
            self._ask_all(worker)
        elif t.bus_now - worker.unreachable_at >= SECOND_UNREACHABLE_S:
            worker.unreachable_at = t.bus_now
            self._evacuate(worker, "gone", died=True)

    def _just_up(self) -> bool:
        """Workers may need longer than we did to find their way back to the bus."""
        t = self._t
        return t.up_at is not None and t.bus_now - t.up_at < t.limits.silence_timeout_s

    def _ask_all(self, worker: Worker) -> None:
        t = self._t
        for attempt in worker.attempts.values():
            t.out.append(AskReplay(attempt.id, worker.id, worker.incarnation, "unreachable"))
        if worker.attempts:
            t.arm_bus(worker.reask, SECOND_UNREACHABLE_S)

    def _on_not_back_yet(self, worker: Worker) -> None:
        """Our bus has just come back; this worker may only be slower than we are."""
        t = self._t
        if worker.reask.due is None:
            t.arm_bus(worker.reask, _REASK_S * (1.0 + t.rng.random()))
        for attempt in worker.attempts.values():
            if attempt.asked is None and attempt.phase == "sent":
                attempt.asked = t.bus_now
                attempt.patience = AFTER_OUTAGE_PATIENCE
                attempt.blameless = True
                t.arm_bus(attempt.timer, t.limits.replay_timeout_s)

    def on_reask_due(self, worker: Worker) -> None:
        """Once more to whom nobody listened: an answer, or the bus says so again."""
        t = self._t
        since = worker.unreachable_at
        if since is None and self._just_up():
            since = t.up_at
        if since is None:
            return  # it was heard
        for attempt in worker.attempts.values():
            if attempt.sign <= since or attempt.asked is not None:
                t.out.append(AskReplay(attempt.id, worker.id, worker.incarnation, "unreachable"))

    # -- our own bus

    def on_bus_down(self) -> None:
        t = self._t
        if t.frozen_at is None:
            t.frozen_at = t.now
            t.deadlines.arm(t.outage_timer, t.now + t.limits.outage_timeout_s)

    def on_outage_due(self) -> None:
        """The other deadlines stand still without a bus: this one bounds what they do not."""
        for choice in [c for c in self._t.choices.values() if c.prefill or c.decode or c.lent]:
            self._mover.end(choice, "expired", "outage_timeout")

    def on_bus_up(self) -> None:
        """Nothing was heard for a while and nothing follows from that: ask everybody."""
        t = self._t
        t.deadlines.disarm(t.outage_timer)
        if t.frozen_at is not None:
            t.outage_s += max(0.0, t.now - t.frozen_at)
            t.frozen_at = None
        t.up_at = t.bus_now
        for worker in t.fleet.workers.values():
            worker.unreachable_at = None
            t.bus_deadlines.disarm(worker.reask)
            worker.steps_at = t.bus_now
            if worker.live:
                t.arm_bus(worker.silence, t.limits.silence_timeout_s)
            if worker.handles:
                self.on_renew_due(worker)
        for attempt in t.attempts.values():
            t.ask_replay(attempt, patience=AFTER_OUTAGE_PATIENCE, blameless=True, cause="bus_up")
        if t.attempts:
            t.out.append(Note("replay", "bus_up"))
        t.fleet.hope_again(t.bus_now)
        t.dirty.update(t.fleet.models)

    # -- our own loop

    def on_paused(self, event: Paused, bus_was: float) -> None:
        """Time in which we did not run is nobody's silence, as time without a bus is not. The bus's
        clock goes back, but not behind `bus_was`, which others may have seen."""
        t = self._t
        if t.frozen_at is not None or not isfinite(event.seconds):
            return
        seconds = min(event.seconds, t.bus_now - bus_was)
        if seconds <= 0.0:
            return
        for attempt in t.attempts.values():
            if attempt.phase == "decoding":  # the driver's time of it is not shifted
                attempt.sign = max(attempt.sign, t.view.last_heard(attempt.id) - t.outage_s)
        t.outage_s += seconds
        t.set_time(t.now)
        for worker in t.fleet.workers.values():
            if worker.handles:  # their leases have gone on
                self.on_renew_due(worker)
        t.out.append(Note("paused", "loop"))

    # -- what is cached where

    def _ask_snapshot(self, worker: Worker) -> None:
        worker.snapshot_asked = self._t.bus_now
        self._t.out.append(AskKvSnapshot(worker.id, worker.incarnation))

    def on_kv_changed(self, event: KvChanged) -> None:
        worker = self._t.fleet.find(event.worker, event.incarnation)
        if worker is not None and self._t.fleet.index.change(
            worker.slot, event.first_id, event.events
        ):
            self._ask_snapshot(worker)

    def on_kv_snapshot(self, event: KvSnapshotArrived) -> None:
        worker = self._t.fleet.find(event.worker, event.incarnation)
        if worker is not None and self._t.fleet.holds(worker, event.last_id, event.hashes):
            self._ask_snapshot(worker)
