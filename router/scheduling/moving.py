"""Endings and second chances: the only places where a choice ends or goes back.

`move` takes an attempt that is over, charges the choice for it and sends the work where it can go
on: the same handle to another decode worker while the handle is good, else back to the queue to be
prefilled again. Whether the client has tokens already only changes the name (retry, resume): the
driver continues from what was sent. It starts nothing; what goes back is picked up by the placer.
"""

from typing import Final

from protocol.errors import Outcome
from router.scheduling.alone import Suspects
from router.scheduling.attempts import LOOKS, REFUSALS
from router.scheduling.commands import EndChoice, EndLeg, Note
from router.scheduling.deadlines import Timer
from router.scheduling.fleet import Worker
from router.scheduling.lifecycle import LEG_OF, Attempt, Choice
from router.scheduling.tables import Tables

_MAX_PULL_FAILURES: Final = 2
"""So many decode workers may fail on one handle before its source is blamed."""
_PAUSE_S: Final = 0.1
_MAX_PAUSE_S: Final = 2.0
_LOOK_S: Final = 0.5
_KILLER: Final = "workers died under this request, again and again"


class Mover:
    def __init__(self, tables: Tables, suspects: Suspects) -> None:
        self._t = tables
        self._suspects = suspects

    def end(
        self,
        choice: Choice,
        outcome: Outcome,
        code: str = "",
        *,
        leg: EndLeg | None = None,
        message: str = "",
        retry_after_s: int | None = None,
    ) -> None:
        """Take it off everything it holds and tell the client."""
        t = self._t
        leg = leg or LEG_OF[choice.state]
        self._let_go(choice)
        t.unclaim(choice)
        t.deadlines.disarm(choice.timer)
        if choice.request_timer is not None:
            t.deadlines.disarm(choice.request_timer)
        choice.move("end", t.now, code or outcome)
        t.bury(choice)
        t.out.append(EndChoice(choice.id, outcome, leg, code, message, retry_after_s))

    def _let_go(self, choice: Choice) -> None:
        """Cancel what is out, release what is held, leave every queue."""
        t = self._t
        if choice.prefill is not None:
            t.close(choice.prefill, done=False)
        if choice.decode is not None:
            t.close(choice.decode, done=False)
        t.release(choice)
        t.forget_place(choice)
        if t.admission.is_first(choice):
            t.dirty.add(choice.spec.model)  # others stood behind it
        t.admission.discard(choice)
        if choice.backoff is not None:
            t.deadlines.disarm(choice.backoff)

    def move(
        self,
        attempt: Attempt,
        cause: str,
        *,
        exclude: bool = True,
        free: bool = False,
        died: bool = False,
        done: bool = False,
        keep_handle: bool = True,
        blame_handle: bool = False,
    ) -> None:
        """The attempt is over without an outcome; `done`: its worker said so itself.

        `exclude`: not on this incarnation again. `free`: nobody's fault, not charged. `died`: the
        process did. `blame_handle`: the pull failed, which may be the source's fault."""
        t = self._t
        choice = attempt.choice
        attempt.trace.cause = cause
        if attempt is choice.prefill and choice.state == "decoding":
            t.close(attempt, done=done)  # the decode leg needs nothing of it any more
            return
        tries = choice.tries
        tries.progressed(t.view.num_output(choice.id), t.limits)
        if exclude:
            tries.exclude(attempt.worker.incarnation, away=died)
        if died and (attempt.phase == "decoding" or _computes(attempt)):
            output = t.view.num_output(choice.id)
            tries.died(attempt.worker.incarnation, output, alone=choice.id in t.claims)
        if blame_handle and choice.lent is not None:
            choice.lent.failures += 1
            tries.lost_pulls += 1
            if choice.lent.failures >= _MAX_PULL_FAILURES:
                t.suspect(choice.lent.reservation.worker, "not_pulled")
        leg = LEG_OF[choice.state]
        rewait = keep_handle and attempt.kind == "pull" and self._good_handle(choice)
        resumable = _resumes(attempt.worker)
        t.close(attempt, done=done)
        waits_on = cause == "refused" and free and (rewait or attempt.kind != "pull")
        if not waits_on:
            tries.wait_until = None
            if not self._may_go_on(choice, cause, leg, free=free):
                return
        if died or blame_handle or (free and cause != "refused"):
            t.budget.excused(t.now)
        if rewait and not tries.alone:
            self._rewait(choice, cause, attempt.worker.id)
        else:
            self.requeue(choice, cause, worker=attempt.worker.id, leg=leg, resumable=resumable)

    def came_back(self, incarnation: str) -> None:
        """It was only away: nobody has killed it, and whom it failed may try it again."""
        self._suspects.absolve([incarnation])
        for choice in self._t.choices.values():
            choice.tries.came_back(incarnation)

    def lose_source(self, choice: Choice, cause: str) -> None:
        """The lender died while the handle waited for a decode worker."""
        assert choice.lent is not None
        lender = choice.lent.reservation.worker
        leg = LEG_OF[choice.state]
        if self._may_go_on(choice, cause, leg, free=False):
            if not lender.live:
                self._t.budget.excused(self._t.now)
            self.requeue(choice, cause, worker=lender.id, leg=leg, resumable=_resumes(lender))

    def give_back(self, choice: Choice, cause: str) -> None:
        """Nobody can pull its handle, for no fault of anybody's: it is prefilled again."""
        assert choice.lent is not None
        leg = LEG_OF[choice.state]
        if self._may_go_on(choice, cause, leg, free=True):
            self._t.budget.excused(self._t.now)
            resumable = _resumes(choice.lent.reservation.worker)
            self.requeue(choice, cause, worker="", leg=leg, resumable=resumable)

    def _may_go_on(self, choice: Choice, cause: str, leg: EndLeg, *, free: bool) -> bool:
        """Charge the choice; it ends here if that was the last time."""
        t = self._t
        tries = choice.tries
        tries.charge(t.limits, free=free)
        if tries.killer:
            self.end(choice, "failed", "worker_killer", leg=leg, message=_KILLER)
            self._suspects.convict(choice)
        elif tries.exhausted(t.limits):
            message = f"gave up after {tries.charged} attempts, the last one: {cause}"
            self.end(choice, "failed", "attempts_exhausted", leg=leg, message=message)
        return choice.state != "ended"

    def _good_handle(self, choice: Choice) -> bool:
        """May another decode worker pull it? A source that fails them all is excluded."""
        lent = choice.lent
        if lent is None or choice.prefill is not None:
            return False
        source = lent.reservation.worker
        if lent.expires_at is not None:
            return False  # whoever began to pull may have used it up: such a source cannot say
        if lent.failures >= _MAX_PULL_FAILURES:
            choice.tries.exclude(source.incarnation)
            return False
        return source.live and not source.dead

    def _rewait(self, choice: Choice, cause: str, worker: str) -> None:
        """Another decode worker shall pull the same handle."""
        t = self._t
        lent = choice.lent
        assert lent is not None
        group = lent.reservation.worker.group
        choice.move("rewait", t.now, cause)
        t.expect_place(choice, group, lent.decode_blocks)
        self.wait_for_place(choice)
        t.budget.retried(t.now)
        t.out.append(Note("retry", cause, worker, choice.id))

    def wait_for_place(self, choice: Choice) -> None:
        """It holds a handle and stands in `decode_wait`: first come, first served."""
        t = self._t
        t.wait(choice)
        self._arm_wait(choice, t.limits.decode_wait_timeout_s)

    def _arm_wait(self, choice: Choice, timeout_s: float) -> None:
        """Whom a worker refused goes on with the wait that it had, and pauses if many did."""
        t = self._t
        tries = choice.tries
        until, tries.wait_until = tries.wait_until, None
        t.deadlines.arm(choice.timer, t.now + timeout_s if until is None else until)
        if until is not None and tries.refusals >= REFUSALS:
            self._pause(choice, _PAUSE_S * 2 ** min(tries.refusals - REFUSALS, REFUSALS))

    def requeue(
        self, choice: Choice, cause: str, *, worker: str, leg: EndLeg, resumable: bool = True
    ) -> None:
        """Everything it holds is given back; it is prefilled again, ahead of new work."""
        t = self._t
        resumes = t.view.num_output(choice.id) > 0
        self._let_go(choice)
        t.unclaim(choice)
        if resumes and not (resumable and choice.spec.resumable):
            message = f"the worker was lost ({cause}) and this engine cannot resume"
            self.end(choice, "failed", "worker_failed", leg=leg, message=message)
            return
        choice.move("requeue", t.now, cause)
        choice.retrying = True
        t.admission.add(choice, t.bus_now)
        self._arm_wait(choice, t.limits.queue_timeout_s)
        t.dirty.add(choice.spec.model)
        t.out.append(Note("resume" if resumes else "retry", cause, worker, choice.id))

    def park(self, choice: Choice) -> None:
        """Every worker has failed it: all may try again, after a pause that grows. Whom the wire
        has failed does without it then."""
        tries = choice.tries
        tries.forgive()
        tries.local = tries.local or tries.lost_pulls >= _MAX_PULL_FAILURES
        self._pause(choice, _PAUSE_S * 2**choice.tries.charged)

    def step_aside(self, choice: Choice) -> None:
        """Those that have room have failed it, or all are too small: the others must not wait for
        it. It looks again after a pause that grows."""
        self._pause(choice, _LOOK_S * 2 ** min(choice.tries.looks, LOOKS))
        choice.tries.looks += 1

    def _pause(self, choice: Choice, pause_s: float) -> None:
        t = self._t
        t.stop_waiting(choice)
        t.admission.discard(choice)
        t.admission.parked[choice.id] = choice
        if choice.backoff is None:
            choice.backoff = Timer("backoff", choice)
        t.deadlines.arm(choice.backoff, t.now + min(_MAX_PAUSE_S, pause_s) * (0.5 + t.rng.random()))

    def unpark(self, choice: Choice) -> None:
        """The pause is over."""
        t = self._t
        if choice.backoff is not None:
            t.deadlines.disarm(choice.backoff)
        del t.admission.parked[choice.id]
        t.dirty.add(choice.spec.model)
        if choice.state == "decode_wait" and choice.tries.local:
            self.give_back(choice, "transfer_failed")
        elif choice.state == "decode_wait":
            t.wait(choice)
        else:
            # Who stood aside lets pass those who came meanwhile, not the whole queue.
            t.admission.add(choice, t.bus_now, first=choice.tries.looks > 0)


def _resumes(worker: Worker) -> bool:
    """Whether a stream that its engine began can go on elsewhere."""
    return worker.info.traits.resume != "none"


def _computes(attempt: Attempt) -> bool:
    return attempt.kind != "pull" and attempt.phase == "accepted"
