"""`Scheduler`: events in, commands out, one mutator.

This is the whole surface: the driver feeds facts with `handle` and runs the commands in order, it
calls back with `Ticked` when `next_deadline` has passed, and everything else here only reads. The
parts share `Tables`; each is a page: `attempt_events` and `fleet_events` take what is said,
`moving` ends choices and sends them back, `starting` sends them out.
"""

from collections.abc import Callable
from typing import Any, Final

from protocol.errors import LocalError
from router.scheduling.alone import Suspects
from router.scheduling.attempt_events import AttemptEvents
from router.scheduling.commands import Command, EndChoice
from router.scheduling.deadlines import Timer
from router.scheduling.events import (
    Accepted,
    AttemptFailed,
    BusDown,
    BusUp,
    ClientGone,
    DecodingStarted,
    Ended,
    Event,
    GapSeen,
    KvChanged,
    KvSnapshotArrived,
    Paused,
    Prefilled,
    Progressed,
    Refused,
    Submitted,
    Ticked,
    WorkerLeaving,
    WorkerListed,
    WorkerReported,
    WorkerUnlisted,
    WorkerUnreachable,
)
from router.scheduling.fleet import Model, ModelView, WorkerView
from router.scheduling.fleet_events import FleetEvents
from router.scheduling.lifecycle import Choice
from router.scheduling.limits import Limits
from router.scheduling.moving import Mover
from router.scheduling.policy import Rng
from router.scheduling.starting import Placer
from router.scheduling.tables import Past, StreamView, Tables

MAX_TIMERS: Final = 256
"""Deadlines served in one tick; the rest is due at once."""
NO_WORKER_RETRY_S: Final = 3


class Scheduler:
    """Which worker does what. Not thread-safe; `now` never goes back."""

    def __init__(self, limits: Limits, view: StreamView, rng: Rng, first_attempt: int = 1) -> None:
        t = self._t = Tables(limits, view, rng, first_attempt)
        suspects = Suspects(t)
        self._mover = Mover(t, suspects)
        self._placer = Placer(t, self._mover, suspects)
        self._bus_was = t.bus_now
        """When the event before this one was handled."""
        self._listen(AttemptEvents(t, self._mover), FleetEvents(t, self._mover), suspects)

    def _listen(self, attempts: AttemptEvents, fleet: FleetEvents, suspects: Suspects) -> None:
        """Who takes which event, and which deadline."""
        self._handlers: dict[type[Any], Callable[[Any], None]] = {
            Submitted: self._on_submitted,
            ClientGone: self._on_client_gone,
            Accepted: attempts.on_accepted,
            Refused: attempts.on_refused,
            Progressed: attempts.on_progressed,
            Prefilled: attempts.on_prefilled,
            DecodingStarted: attempts.on_decoding_started,
            Ended: attempts.on_ended,
            AttemptFailed: attempts.on_attempt_failed,
            GapSeen: attempts.on_gap_seen,
            WorkerListed: fleet.on_listed,
            WorkerUnlisted: fleet.on_unlisted,
            WorkerReported: fleet.on_reported,
            WorkerLeaving: fleet.on_leaving,
            WorkerUnreachable: fleet.on_unreachable,
            KvChanged: fleet.on_kv_changed,
            KvSnapshotArrived: fleet.on_kv_snapshot,
            BusUp: lambda _event: fleet.on_bus_up(),
            BusDown: lambda _event: fleet.on_bus_down(),
            Paused: lambda event: fleet.on_paused(event, self._bus_was),
            Ticked: lambda _event: self._on_ticked(),
        }
        self._on_due: dict[str, Callable[[Any], None]] = {
            "attempt": attempts.on_attempt_due,
            "silence": fleet.on_silence_due,
            "grace": fleet.on_grace_due,
            "suspect": fleet.on_suspect_due,
            "refused": fleet.on_refused_due,
            "reask": fleet.on_reask_due,
            "renew": fleet.on_renew_due,
            "wait": self._on_wait_due,
            "backoff": self._mover.unpark,
            "request": self._on_request_due,
            "claim": suspects.on_claim_due,
            "outage": lambda _owner: fleet.on_outage_due(),
            "drain": lambda _owner: self._t.dirty.update(self._t.fleet.models),
        }

    def handle(self, event: Event, now: float) -> list[Command]:
        """Take one fact; the answer is complete and in the order to be run.

        Raises LocalError if our own side broke a rule (a choice submitted twice, an illegal move);
        what workers, discovery and the bus say never raises."""
        t = self._t
        self._bus_was = t.bus_now
        t.set_time(now)
        out = t.out = []
        self._handlers[type(event)](event)
        if t.dirty:
            self._placer.drain()
        return out

    def next_deadline(self) -> float | None:
        """When to call back with `Ticked`, in the caller's time."""
        t = self._t
        due = t.deadlines.next()
        if t.frozen_at is None:
            bus_due = t.bus_deadlines.next()
            if bus_due is not None and (due is None or bus_due + t.outage_s < due):
                due = bus_due + t.outage_s
        return due

    # -- what the client does

    def _on_submitted(self, event: Submitted) -> None:
        t = self._t
        if event.choice in t.choices:
            raise LocalError(f"choice {event.choice} was submitted twice")
        code = self._why_rejected(event)
        if code:
            retry_after_s = NO_WORKER_RETRY_S if code == "no_decode_worker" else None
            self._reject(event, code, retry_after_s)
            return
        choice = t.choices[event.choice] = Choice(event, t.now)
        t.siblings.join(event.siblings)
        t.admission.add(choice, t.bus_now)
        if t.limits.request_timeout_s is not None:
            choice.request_timer = Timer("request", choice)
            t.deadlines.arm(choice.request_timer, t.now + t.limits.request_timeout_s)
        t.dirty.add(event.model)
        self._placer.drain()
        if choice.state != "queued":
            return
        if self.num_queued > t.limits.max_queue or self._would_expire(choice):
            wait_s = t.budget.wait_s(t.admission.num_queued, t.now)
            self._mover.end(choice, "rejected", "queue_full", retry_after_s=wait_s)
        else:
            t.deadlines.arm(choice.timer, t.now + t.limits.queue_timeout_s)

    def _would_expire(self, choice: Choice) -> bool:
        """At the pace of this queue its turn comes after its deadline: better said at once."""
        t = self._t
        lane = t.admission.lane_of(choice)
        return lane is not None and lane.wait_s(t.bus_now) > t.limits.queue_timeout_s

    def _why_rejected(self, event: Submitted) -> str:
        """The error code, or empty if the choice may at least wait."""
        t = self._t
        model = t.fleet.known(event.model, t.bus_now)
        if model is None:
            return "model_not_found"
        has_group = can_decode = False
        longest = 0
        for group in model.groups.values():
            if event.model_digest in ("", group.digest):
                has_group = True
                can_decode = can_decode or bool(group.decode.order)
                longest = max(longest, group.max_context)
        if not can_decode and (not has_group or t.bus_now >= model.hope_until):
            return "no_decode_worker"
        if event.packed_prompt and longest and event.num_prompt_tokens >= longest:
            return "context_length_exceeded"
        return ""

    def _reject(self, event: Submitted, code: str, retry_after_s: int | None) -> None:
        t = self._t
        t.keep_story(event.choice, Past([(t.now, "rejected", code)], ()))
        message = _MESSAGES[code].format(event.model)
        t.out.append(EndChoice(event.choice, "rejected", "queue", code, message, retry_after_s))

    def _on_client_gone(self, event: ClientGone) -> None:
        choice = self._t.choices.get(event.choice)
        if choice is not None:
            self._mover.end(choice, "cancelled", "cancelled")

    # -- time

    def _on_ticked(self) -> None:
        t = self._t
        t.fleet.index.sweep()
        for _ in range(MAX_TIMERS):
            timer = t.deadlines.pop_due(t.now)
            if timer is None and t.frozen_at is None:
                timer = t.bus_deadlines.pop_due(t.bus_now)
            if timer is None:
                return
            self._on_due[timer.kind](timer.owner)

    def _on_wait_due(self, choice: Choice) -> None:
        t = self._t
        if choice.state == "decode_wait":
            self._mover.end(choice, "expired", "decode_wait_timeout")
        else:
            wait_s = t.budget.wait_s(t.admission.num_queued, t.now)
            self._mover.end(choice, "expired", "queue_timeout", retry_after_s=wait_s)

    def _on_request_due(self, choice: Choice) -> None:
        self._mover.end(choice, "expired", "request_timeout", leg="request")

    # -- reading

    @property
    def num_queued(self) -> int:
        """Choices that wait for a first or second start."""
        return self._t.admission.num_queued + len(self._t.admission.parked)

    @property
    def num_inflight(self) -> int:
        """Choices that have not ended."""
        return len(self._t.choices)

    @property
    def choices_waiting(self) -> list[str]:
        """Ids of the choices that no worker has now."""
        waiting = ("queued", "decode_wait")
        return [choice.id for choice in self._t.choices.values() if choice.state in waiting]

    def has_worker(self, worker: str, incarnation: str) -> bool:
        """Whether that process still counts, listed or not."""
        return self._t.fleet.find(worker, incarnation) is not None

    def workers(self) -> list[WorkerView]:
        return [
            WorkerView(
                info=worker.info,
                listed=worker.listed,
                live=worker.live,
                eligible=worker.eligible,
                suspected=worker.suspected or worker.stuck,
                draining=worker.draining or worker.leaving,
                report=worker.report,
                num_reservations=len(worker.reservations),
                running=worker.running,
                prefills=worker.prefills,
                tokens=worker.tokens,
                blocks=worker.blocks,
            )
            for worker in self._t.fleet.workers.values()
        ]

    def models(self) -> dict[str, ModelView]:
        """Every name that is served, or was not long ago, and how many workers could take it."""
        fleet = self._t.fleet
        return {
            name: _model_view(model)
            for name, model in fleet.models.items()
            if fleet.known(name, self._t.bus_now) is not None
        }

    def story(self, choice: str) -> list[tuple[float, str]]:
        """What happened to a choice that lives or has ended not long ago; empty if unknown."""
        story = self._t.past(choice).story
        return [(at, f"{what} {detail}".rstrip()) for at, what, detail in story]

    def past(self, choice: str) -> Past:
        """The same with its attempts, for whoever shows it; not to be changed."""
        return self._t.past(choice)

    def validate(self) -> None:
        """Raises LocalError unless loads, queues, states and timers all agree."""
        self._t.validate()


def _model_view(model: Model) -> ModelView:
    groups = model.groups.values()
    return ModelView(
        prefill=sum(len(group.prefill.order) for group in groups),
        decode=sum(len(group.decode.order) for group in groups),
        listed=model.num_workers,
    )


_MESSAGES: Final = {
    "model_not_found": "the model `{}` does not exist",
    "no_decode_worker": "no worker can serve `{}` now",
    "context_length_exceeded": "the prompt is longer than `{}` can take",
}
