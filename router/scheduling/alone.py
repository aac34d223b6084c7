"""Who may be killing workers: choices under which two processes died run alone, one at a time.

A suspect claims the quietest decode worker, which takes nothing new from then on, and starts there
once it has run empty, or at the latest after `PATIENCE_S`: the work that is left there is no
suspect's. Having got tokens for `PROBATION_S` it gives the worker free, and the next one may start.
If the process dies a third time under it, it is the killer, and whoever was suspected only for the
deaths that are the killer's is not any more; nor is anybody for one that comes back, or after some
were harmless. First comes who got the fewest tokens out of those that died: a deadly prompt seldom
gets far. It decides; the placer starts.
"""

from collections.abc import Sequence
from typing import Final

from router.scheduling.fleet import Model, Worker
from router.scheduling.lifecycle import Choice
from router.scheduling.tables import Tables

PATIENCE_S: Final = 1.0
PROBATION_S: Final = 1.0
_LOOK_S: Final = 0.25
_CLAIM_SHARE: Final = 4
_HARMLESS: Final = 3
"""Suspects in a row that did no harm alone: those that still wait go on in company."""


class Suspects:
    def __init__(self, tables: Tables) -> None:
        self._t = tables

    def ready(self, name: str, model: Model) -> list[tuple[Choice, Worker]]:
        """Suspects that may start now, each on the worker it claimed."""
        t = self._t
        for suspect, worker in self._claimed():
            if not worker.seats and suspect.state == "queued":
                t.unclaim(suspect)
        waiting = [
            c for c in t.admission.lonely.values() if c.spec.model == name and c.id not in t.claims
        ]
        while waiting and not _too_many_claims(t, model):
            choice = min(waiting, key=lambda c: c.tries.tokens_under_deaths)
            waiting.remove(choice)
            tokens = choice.spec.num_prompt_tokens + t.view.num_output(choice.id)
            quietest = _quietest(choice, model, tokens)
            if quietest is not None:
                t.claim(choice, quietest)
                t.arm_bus(quietest.claim_timer, PATIENCE_S)
        return [
            (suspect, worker)
            for suspect, worker in self._claimed()
            if suspect.state == "queued"
            and suspect.spec.model == name
            and (worker.claim_is_due or not worker.reservations)
            and not worker.refused
        ]

    def _claimed(self) -> list[tuple[Choice, Worker]]:
        t = self._t
        return [(t.choices[choice], worker) for choice, worker in t.claims.items()]

    def started(self, worker: Worker) -> None:
        """What it claimed runs there from now on."""
        self._t.arm_bus(worker.claim_timer, PROBATION_S)

    def on_claim_due(self, worker: Worker) -> None:
        """Its patience is over, or it has been harmless for long enough: tokens came so long after
        its start. One whose worker is dead and not yet missed has not been harmless."""
        t = self._t
        choice = t.choices[worker.claim]
        attempt = choice.decode
        if attempt is None:
            worker.claim_is_due = True
            t.dirty.add(worker.info.model)
            return
        heard = t.view.last_heard(attempt.id) - t.outage_s
        if heard - attempt.started >= PROBATION_S:
            t.unclaim(choice)
            self._was_harmless(choice.spec.model)
        else:
            t.arm_bus(worker.claim_timer, _LOOK_S)

    def _was_harmless(self, model: str) -> None:
        """Where several were, what killed two workers is hardly among those that still wait; they
        would stand in the queue for as many seconds as they are."""
        t = self._t
        known = t.fleet.models.get(model)
        if known is None:
            return
        known.num_harmless += 1
        if known.num_harmless < _HARMLESS:
            return
        known.num_harmless = 0
        for choice in [c for c in t.admission.lonely.values() if c.spec.model == model]:
            choice.tries.acquit()
            self._rejoin(choice)

    def _rejoin(self, choice: Choice) -> None:
        t = self._t
        if choice.id in t.admission.lonely and not choice.tries.alone:
            t.unclaim(choice)
            t.admission.discard(choice)
            t.admission.add(choice, t.bus_now)
            t.dirty.add(choice.spec.model)

    def convict(self, killer: Choice) -> None:
        """Its deaths are nobody else's."""
        model = self._t.fleet.models.get(killer.spec.model)
        if model is not None:
            model.num_harmless = 0
        self.absolve(killer.tries.deaths)

    def absolve(self, deaths: Sequence[str]) -> None:
        """These are nobody's: a killer is known (and ended), or the process lives."""
        t = self._t
        for choice in t.choices.values():
            if choice.tries.absolve(deaths):
                self._rejoin(choice)


def _too_many_claims(t: Tables, model: Model) -> bool:
    """A dying fleet is not stopped altogether: a quarter of it at most runs single choices."""
    groups = model.groups.values()
    workers = sum(len(group.decode.order) for group in groups)
    claimed = sum(worker.group in groups for worker in t.claims.values())
    return claimed >= max(1, workers // _CLAIM_SHARE)


def _quietest(choice: Choice, model: Model, tokens: int) -> Worker | None:
    """A look at every decode worker: rare enough."""
    digest = choice.spec.model_digest
    fitting = [
        seat.worker
        for group in model.groups.values()
        if digest in ("", group.digest)
        for seat in group.decode.order
        if not (seat.worker.claim or seat.worker.refused)
        and tokens < seat.worker.info.capacity.max_context
    ]
    excluded = choice.tries.excluded
    return min(
        fitting,
        key=lambda w: (w.incarnation in excluded, len(w.reservations), w.id),
        default=None,
    )
