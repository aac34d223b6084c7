"""What workers say about attempts, and what their silence means.

Handlers are named `on_<event>`; an attempt that is not open any more is late and moves nothing.
Every word about an attempt is a sign of life: it answers a pending replay and restarts the deadline
of the leg that it is in.
"""

from typing import Final

from protocol.out import FailureCode
from router.scheduling.commands import EndLeg, Note
from router.scheduling.events import (
    Accepted,
    AttemptFailed,
    DecodingStarted,
    Ended,
    GapSeen,
    Prefilled,
    Progressed,
    Refused,
)
from router.scheduling.lifecycle import Attempt
from router.scheduling.moving import Mover
from router.scheduling.tables import Tables

REFUSED_S: Final = 0.25
"""A worker that refused gets nothing new for so long."""
MAX_IDLE_SIGNS: Final = 64
"""Words about one attempt that brought neither a token nor progress: ten minutes of a worker that
answers every stall, as one does that has put the sequence off."""
GAP_PATIENCE: Final = 2
_SAME_GAP_S: Final = 0.05
_MISSES: Final = 2
"""Jobs in a row that a worker did not answer at all before it is suspected."""
_FATAL: Final[dict[FailureCode, str]] = {
    "handle_mismatch": "handle_mismatch",
    "invalid_request": "invalid_request",
    "context_length": "context_length_exceeded",
}
"""Failures that no other worker would spare us, and the code the client gets."""


class AttemptEvents:
    def __init__(self, tables: Tables, mover: Mover) -> None:
        self._t = tables
        self._mover = mover

    # -- signs of life

    def _is_news(self, attempt: Attempt) -> bool:
        """Whether this word counts as a sign of life. A worker that answers for ever and brings
        nothing does not keep a choice for ever."""
        output = self._t.view.num_output(attempt.choice.id)
        if output > attempt.output_seen:
            attempt.output_seen = output
            attempt.idle_signs = 0
        attempt.idle_signs += 1
        return attempt.idle_signs <= MAX_IDLE_SIGNS

    def _sign(self, attempt: Attempt) -> None:
        t = self._t
        if not self._is_news(attempt):
            return
        attempt.sign = t.bus_now
        attempt.asked = None
        attempt.blameless = False
        worker = attempt.worker
        worker.accept_misses = 0
        worker.unreachable_at = None
        if attempt.phase == "sent":
            attempt.phase = "accepted"
            attempt.trace.accepted_at = t.now
            attempt.choice.tries.taken()
            attempt.choice.tell(t.now, "accepted", worker.id)
        self._rearm(attempt)

    def _rearm(self, attempt: Attempt) -> None:
        """The deadline of the leg, from now on."""
        t = self._t
        limits = t.limits
        if attempt.phase == "decoding":
            t.arm_bus(attempt.timer, limits.stall_timeout_s)
        elif attempt.kind == "pull":
            t.arm_bus(attempt.timer, limits.kv_transfer_timeout_s)
        else:
            t.arm_bus(attempt.timer, limits.prefill_timeout_s)

    def on_accepted(self, event: Accepted) -> None:
        t = self._t
        attempt = t.attempts.get(event.attempt)
        if attempt is None:
            t.note_late("accepted")
            return
        due = None
        if attempt.kind == "pull" and attempt.phase != "decoding":
            due = attempt.started + t.limits.kv_transfer_timeout_s
            due = max(due, t.bus_now + t.limits.accept_timeout_s)
        self._sign(attempt)
        if due is not None:
            t.bus_deadlines.arm(attempt.timer, due)
        if event.handle is not None and attempt.choice.state == "prefilling":
            t.hold(attempt, event.handle)
            self._lend(attempt)

    def on_progressed(self, event: Progressed) -> None:
        attempt = self._t.attempts.get(event.attempt)
        if attempt is None:
            self._t.note_late("progressed")
            return
        attempt.idle_signs = 0
        self._sign(attempt)

    def _lend(self, attempt: Attempt) -> None:
        choice = attempt.choice
        choice.move("lend", self._t.now, attempt.worker.id)
        self._mover.wait_for_place(choice)

    # -- outcomes

    def on_prefilled(self, event: Prefilled) -> None:
        t = self._t
        attempt = t.attempts.get(event.attempt)
        if attempt is None or attempt.kind != "prefill":
            t.note_late("prefilled")
            return
        self._sign(attempt)
        choice = attempt.choice
        choice.tell(t.now, "prefilled", attempt.worker.id)
        if event.ended:
            t.close(attempt, done=True)
            self._mover.end(choice, "completed", leg="prefill")
            return
        if choice.state != "prefilling":  # the handle came with `Accepted`
            t.close(attempt, done=True)
        elif event.handle is None:
            self._mover.move(attempt, "no_handle", done=True)
        else:
            t.hold(attempt, event.handle)
            t.close(attempt, done=True)
            self._lend(attempt)

    def on_decoding_started(self, event: DecodingStarted) -> None:
        t = self._t
        attempt = t.attempts.get(event.attempt)
        if attempt is None or attempt.kind == "prefill":
            t.note_late("decoding_started")
            return
        started = attempt.phase != "decoding"
        if started:
            attempt.choice.tries.taken()
            attempt.phase = "decoding"
            attempt.trace.decoding_at = t.now
        self._sign(attempt)
        if not started:
            return
        choice = attempt.choice
        choice.move("decode", t.now, attempt.worker.id)
        if attempt.kind == "local":
            t.fleet.relieve(attempt.reservation)
        else:
            t.release(choice)
        t.dirty.add(choice.spec.model)

    def on_ended(self, event: Ended) -> None:
        t = self._t
        attempt = t.attempts.get(event.attempt)
        if attempt is None:
            t.note_late("ended")
            return
        leg: EndLeg = "prefill" if attempt.kind == "prefill" else "decode"
        self._sign(attempt)
        t.close(attempt, done=True)
        self._mover.end(attempt.choice, "completed", leg=leg)

    def on_refused(self, event: Refused) -> None:
        t = self._t
        attempt = t.attempts.get(event.attempt)
        if attempt is None:
            t.note_late("refused")
            return
        worker = attempt.worker
        worker.refused = True
        t.update_seats(worker)
        t.arm_bus(worker.refused_timer, REFUSED_S)
        if attempt.phase == "sent":
            attempt.choice.tries.refusals += 1
        # One that takes a job and refuses it then has failed.
        free = attempt.phase == "sent"
        self._mover.move(attempt, "refused", exclude=not free, free=free, done=True)

    def on_attempt_failed(self, event: AttemptFailed) -> None:
        t = self._t
        attempt = t.attempts.get(event.attempt)
        if attempt is None:
            t.note_late("failed")
            return
        code = event.code
        attempt.choice.tell(t.now, code, event.message)
        choice = attempt.choice
        if code in _FATAL and not (attempt is choice.prefill and choice.state == "decoding"):
            leg = event.leg
            attempt.trace.cause = code
            t.close(attempt, done=True)
            self._mover.end(choice, "failed", _FATAL[code], leg=leg, message=event.message)
        elif code == "unknown_attempt":
            self._mover.move(attempt, code, exclude=False, free=True, done=True)
        elif code == "lease_lost":
            self._mover.move(attempt, code, exclude=False, done=True, keep_handle=False)
        else:
            blame = code == "transfer_failed"
            # Who could not pull from a source that had gone away has not failed.
            exclude = not (blame and choice.lent is not None and choice.lent.is_doubtful)
            self._mover.move(attempt, code, exclude=exclude, done=True, blame_handle=blame)

    def on_gap_seen(self, event: GapSeen) -> None:
        t = self._t
        worker = t.fleet.find(event.worker, event.incarnation)
        if worker is None:
            t.note_late("gap")
            return
        recent = t.bus_now - _SAME_GAP_S
        asked = False
        for attempt in worker.attempts.values():
            if attempt.asked is None or attempt.asked < recent:
                t.ask_replay(attempt, patience=GAP_PATIENCE, blameless=True, cause="gap")
                asked = True
        if asked:
            t.out.append(Note("replay", "gap", worker.id))

    # -- silence

    def on_attempt_due(self, attempt: Attempt) -> None:
        t = self._t
        heard = attempt.sign
        if attempt.phase == "decoding":
            heard = max(heard, t.view.last_heard(attempt.id) - t.outage_s)
        if attempt.asked is not None:
            self._on_replay_due(attempt, heard)
        elif attempt.phase == "decoding":
            self._on_stall_due(attempt, heard)
        elif attempt.phase == "sent":
            self._on_accept_due(attempt)
        elif attempt.kind == "pull":
            self._mover.move(attempt, "kv_transfer_timeout", blame_handle=True)
        else:
            self._mover.move(attempt, "prefill_timeout")

    def _on_replay_due(self, attempt: Attempt, heard: float) -> None:
        t = self._t
        assert attempt.asked is not None
        if heard > attempt.asked:
            attempt.asked = None
            attempt.blameless = False
            t.bus_deadlines.arm(attempt.timer, heard + t.limits.stall_timeout_s)
        elif attempt.patience > 0:
            patience, blameless = attempt.patience - 1, attempt.blameless
            t.ask_replay(attempt, patience=patience, blameless=blameless, cause="no_replay")
        else:
            free = attempt.blameless
            self._mover.move(attempt, "no_replay", exclude=not free, free=free)

    def _on_stall_due(self, attempt: Attempt, heard: float) -> None:
        t = self._t
        due = heard + t.limits.stall_timeout_s
        if due > t.bus_now:
            t.bus_deadlines.arm(attempt.timer, due)
            return
        t.ask_replay(attempt, patience=0, blameless=False, cause="stall")
        t.out.append(Note("replay", "stall", attempt.worker.id, attempt.choice.id))

    def _on_accept_due(self, attempt: Attempt) -> None:
        worker = attempt.worker
        worker.accept_misses += 1
        if worker.accept_misses >= _MISSES:
            self._t.suspect(worker, "accept_timeout")
        self._mover.move(attempt, "accept_timeout")
