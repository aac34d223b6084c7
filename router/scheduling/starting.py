"""From the queue to a worker: who starts next, where, and how.

`drain` runs once at the end of every event that may have freed something, and starts a bounded
number of jobs: first those that hold a handle (two workers are charged for them), then choices that
run alone, then retries, then new work. A lane stops at its first choice that finds no place, unless
only something of its own keeps that one back: then it stands aside (ADR 15).
"""

from collections.abc import Callable, Set
from itertools import islice
from typing import Final, Literal

from router.scheduling.admission import Lane
from router.scheduling.alone import Suspects
from router.scheduling.attempts import LOOKS
from router.scheduling.commands import Note, StartDecode, StartPrefill
from router.scheduling.deadlines import Timer
from router.scheduling.fleet import Model, Worker
from router.scheduling.lifecycle import EXPECTED_OUTPUT, Choice
from router.scheduling.moving import Mover
from router.scheduling.policy import (
    Pick,
    Want,
    candidates,
    choose_decode,
    choose_prefill,
    could_take,
    largest,
    others,
    should_disaggregate,
    smallest,
)
from router.scheduling.pools import Group
from router.scheduling.prefix_index import Match
from router.scheduling.tables import Tables

MAX_STARTS: Final = 32
_NO_MATCH: Final[Match] = []
_NOBODY: Final[Set[str]] = frozenset()
_MAX_WALK: Final = 256
"""Who waits for a decode worker behind so many others does not overtake them."""
_SURE: Final = 4
"""So many have to find nothing: each looks at some workers only."""
_FIRST_AND_NEXT: Final = 2

Placed = Literal["started", "waits", "parked"]


class Placer:
    def __init__(self, tables: Tables, mover: Mover, suspects: Suspects) -> None:
        self._t = tables
        self._mover = mover
        self._suspects = suspects
        self._left = 0
        self._budget_timer = Timer("drain", None)

    def drain(self) -> None:
        """Start what can be started, at most `MAX_STARTS`; the rest follows at once, as a tick."""
        t = self._t
        if t.frozen_at is not None:
            return
        if not (t.num_waiters or t.admission.num_queued):
            t.dirty.clear()  # nobody is here to whom it could matter, as after most events
            return
        names = sorted(t.dirty)
        t.dirty.clear()
        self._left = MAX_STARTS
        for name in names:
            model = t.fleet.models.get(name)
            if model is not None:
                self._serve(name, model)
        if t.dirty and self._left <= 0:
            t.deadlines.arm(t.drain_timer, t.now)

    # -- the queues

    def _serve(self, name: str, model: Model) -> None:
        t = self._t
        if t.num_waiters:
            for group in list(model.groups.values()):
                if group.waiters:
                    self._serve_waiters(group)
        if t.admission.num_queued:
            if t.admission.lonely or t.claims:
                self._serve_lonely(name, model)
            for lane in t.admission.lanes(name):
                self._serve_lane(lane)
        if self._left <= 0:
            t.dirty.add(name)

    def _serve_waiters(self, group: Group) -> None:
        """Others may overtake those that fit nowhere now: their place may be what these lend. Who
        needs no less than some that found nothing is not looked at."""
        t = self._t
        missed: list[tuple[int, int]] = []
        for choice in list(islice(group.waiters.values(), _MAX_WALK)):
            if self._left <= 0 or len(missed) >= MAX_STARTS or not group.decode.order:
                return
            tokens = choice.spec.num_prompt_tokens + t.view.num_output(choice.id)
            need = group.decode.context_for(tokens), choice.pending_blocks
            if _may_expire(choice) or not _is_covered(need, missed):
                self._pull(choice, group)
                if choice.id in group.waiters:
                    missed.append(need)

    def _serve_lonely(self, name: str, model: Model) -> None:
        """Two processes died under each: a worker of its own."""
        for choice, worker in self._suspects.ready(name, model):
            want = self._want(choice, worker.group, _NOBODY, self._tokens(choice))
            self._leave_queue(choice)
            self._start_local(choice, worker, want.tokens, want.decode_blocks)
            self._suspects.started(worker)

    def _serve_lane(self, lane: Lane) -> None:
        t = self._t
        while lane.retries and self._left > 0:
            if not t.budget.allows(t.now):
                t.deadlines.arm(self._budget_timer, t.budget.next_change())
                break
            if self._place(next(iter(lane.retries.values()))) == "waits":
                return
        while lane.fresh and self._left > 0:
            if self._place(next(iter(lane.fresh.values()))) == "waits":
                return

    # -- one choice

    def _place(self, choice: Choice) -> Placed:
        """Start a queued choice where it costs least, over all groups that may serve it. It waits
        in front of others only for what they wait for, too."""
        tries = choice.tries
        groups = self._groups_of(choice)
        best = self._best(choice, groups, tries.excluded)
        if best is None and groups and tries.excluded:
            if all(group.decode.all_in(tries.excluded) for group in groups):
                return self._pause(choice, self._mover.park)
            best = self._best(choice, groups, _NOBODY)
            if best is not None and tries.looks < LOOKS:
                return self._pause(choice, self._mover.step_aside)
        if best is not None:
            self._start(choice, *best)
            return "started"
        if groups and self._lacks_size(choice, groups):
            return self._pause(choice, self._mover.step_aside)
        return "waits"

    def _pause(self, choice: Choice, how: Callable[[Choice], None]) -> Placed:
        self._left -= 1
        how(choice)
        return "parked"

    def _groups_of(self, choice: Choice) -> list[Group]:
        """Those that may serve it and have somebody who decodes."""
        groups = self._t.fleet.models[choice.spec.model].groups.values()
        digest = choice.spec.model_digest
        return [g for g in groups if g.decode.order and digest in ("", g.digest)]

    def _best(
        self, choice: Choice, groups: list[Group], excluded: Set[str], tokens: int = 0
    ) -> tuple[Pick, Pick | None, Group, Want] | None:
        """`tokens`: as if it had no more than these."""
        best: tuple[Pick, Pick | None, Group, Want] | None = None
        for group in groups:
            want = self._want(choice, group, excluded, tokens or self._tokens(choice))
            if group.has_place(want.decode_blocks):
                self._look_up(choice, group, want)
                found = self._plan(group, want, local=choice.tries.local)
                if found is not None and (best is None or found[0].cost < best[0].cost):
                    best = (*found, group, want)
        return best

    def _lacks_size(self, choice: Choice, groups: list[Group]) -> bool:
        """Whether it waits because it is longer than others: everybody who is here is too small
        for it, or those that are not are busy, and one as long as all can take could start. For
        the second it does not stand aside for ever: shorter ones would always be faster."""
        tokens = self._tokens(choice)
        if tokens > max(largest(group.decode) for group in groups):
            return True
        pools = [pool for g in groups for pool in (g.decode, g.prefill) if pool.order]
        short = min(smallest(pool) for pool in pools)
        if tokens <= short or choice.tries.looks >= LOOKS:
            return False
        return self._best(choice, groups, choice.tries.excluded, max(1, short)) is not None

    def _tokens(self, choice: Choice) -> int:
        """Prompt and output so far."""
        output = self._t.view.num_output(choice.id) if choice.retrying else 0
        return choice.spec.num_prompt_tokens + output

    def _want(self, choice: Choice, group: Group, excluded: Set[str], tokens: int) -> Want:
        t = self._t
        spec = choice.spec
        output = max(0, tokens - spec.num_prompt_tokens)
        expected = max(1, min(spec.max_tokens - output, EXPECTED_OUTPUT))
        size = group.block_size
        return Want(
            tokens,
            -(-tokens // size),
            -(-(tokens + expected) // size),
            size,
            excluded,
            _NO_MATCH,
            t.limits.num_samples,
            t.siblings.place_of(spec.siblings),
            (spec.num_prompt_tokens - 1) // size * size,
        )

    def _look_up(self, choice: Choice, group: Group, want: Want) -> None:
        """Who has the beginning of the prompt."""
        index = self._t.fleet.index
        if choice.spec.packed_prompt and index.num_pairs:
            want.match = index.match(choice.hashes_for(group))

    def _plan(self, group: Group, want: Want, *, local: bool) -> tuple[Pick, Pick | None] | None:
        """(decode worker, prefill worker or None if the decode worker does it all)."""
        t = self._t
        fleet = t.fleet
        slots = fleet.index.num_slots
        found = candidates(group.decode, want, fleet.by_slot, t.rng, slots)
        here = choose_decode(want, found, local=True) or choose_decode(
            want, others(group.decode, want, found), local=True
        )
        if here is None:
            return None
        if local or here.uncached <= t.limits.local_prefill_tokens:
            return here, None
        if want.tokens > here.worker.info.capacity.max_context - _FIRST_AND_NEXT:
            return here, None  # behind a first token from elsewhere it could not go on
        found = candidates(group.prefill, want, fleet.by_slot, t.rng, slots)
        there = choose_prefill(want, found) or choose_prefill(
            want, others(group.prefill, want, found)
        )
        if there is None and could_take(group.prefill, want.tokens, want.excluded):
            return None  # prefill workers are busy: their queue is here
        if not should_disaggregate(want, here, there, t.limits.local_prefill_tokens):
            return here, None
        return here, there

    def _start(
        self, choice: Choice, here: Pick, there: Pick | None, group: Group, want: Want
    ) -> None:
        t = self._t
        self._leave_queue(choice)
        if there is None:
            self._start_local(choice, here.worker, here.uncached, want.decode_blocks)
            if here.uncached > t.limits.local_prefill_tokens:
                self._note_local(choice, group, want, here.worker)
            return
        worker = there.worker
        choice.move("start_prefill", t.now, worker.id)
        t.expect_place(choice, group, want.decode_blocks)
        attempt = t.open(choice, worker, "prefill", there.uncached, want.prefill_blocks)
        t.siblings.started(choice.spec.siblings, attempt.reservation)
        t.out.append(StartPrefill(attempt.id, choice.id, worker.id, worker.incarnation))

    def _note_local(self, choice: Choice, group: Group, want: Want, worker: Worker) -> None:
        """Why the decode worker prefills a long prompt for itself, unless it only costs less."""
        cause = "transfer_failed" if choice.tries.local else "no_prefill_worker"
        if choice.tries.local or not could_take(group.prefill, want.tokens, want.excluded):
            self._t.out.append(Note("local_prefill", cause, worker.id, choice.id))

    def _start_local(self, choice: Choice, worker: Worker, tokens: int, blocks: int) -> None:
        t = self._t
        choice.move("start_local", t.now, worker.id)
        attempt = t.open(choice, worker, "local", tokens, blocks)
        t.siblings.started(choice.spec.siblings, attempt.reservation)
        t.out.append(StartDecode(attempt.id, choice.id, worker.id, worker.incarnation, None))

    def _leave_queue(self, choice: Choice) -> None:
        t = self._t
        self._left -= 1
        choice.tries.wait_until = choice.timer.due
        lane = t.admission.lane_of(choice)
        if lane is not None and not choice.tries.alone:
            lane.started(t.bus_now)
        t.admission.discard(choice)
        t.deadlines.disarm(choice.timer)
        if choice.retrying:
            t.budget.retried(t.now)
        else:
            t.budget.admitted(t.now)

    def _pull(self, choice: Choice, group: Group) -> None:
        """Find a decode worker for a choice that holds a handle, on today's load."""
        t = self._t
        lent = choice.lent
        assert lent is not None
        if lent.expires_at is not None and t.now >= lent.expires_at:
            self._mover.lose_source(choice, "lease_expired")
            return
        tries = choice.tries
        output = t.view.num_output(choice.id)
        tokens = choice.spec.num_prompt_tokens + output
        want = Want(
            tokens, 0, lent.decode_blocks, group.block_size, tries.excluded, _NO_MATCH,
            t.limits.num_samples,
        )  # fmt: skip
        pick = self._pick_puller(group, want)
        if pick is None and tries.excluded:
            if group.decode.all_in(tries.excluded):
                self._mover.park(choice)
                return
            want.excluded = _NOBODY
            pick = self._pick_puller(group, want)
            if pick is not None and tries.looks < LOOKS:
                self._mover.step_aside(choice)
                return
        if pick is None:
            if want.tokens > largest(group.decode):
                self._miss(choice)
            return
        self._left -= 1
        tries.wait_until = choice.timer.due
        t.deadlines.disarm(choice.timer)
        t.forget_place(choice)
        worker = pick.worker
        choice.move("start_pull", t.now, worker.id)
        attempt = t.open(choice, worker, "pull", 0, lent.decode_blocks)
        t.out.append(StartDecode(attempt.id, choice.id, worker.id, worker.incarnation, lent.handle))

    def _miss(self, choice: Choice) -> None:
        """It holds a handle, and whoever is large enough for it is away, perhaps for a moment. Then
        it waits without blocks, and without a place that others could have."""
        if choice.tries.looks < LOOKS:
            self._mover.step_aside(choice)
        else:
            self._mover.give_back(choice, "too_large")

    def _pick_puller(self, group: Group, want: Want) -> Pick | None:
        t = self._t
        found = candidates(group.decode, want, t.fleet.by_slot, t.rng, 1)
        return choose_decode(want, found, local=False) or choose_decode(
            want, others(group.decode, want, found), local=False
        )


def _may_expire(choice: Choice) -> bool:
    return choice.lent is not None and choice.lent.expires_at is not None


def _is_covered(need: tuple[int, int], missed: list[tuple[int, int]]) -> bool:
    """Whether enough others that need no more, of context and blocks, found nothing."""
    found = (need[0] >= context and need[1] >= blocks for context, blocks in missed)
    return sum(found) >= _SURE
