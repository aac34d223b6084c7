"""The small parts by themselves: timers, budget, pools, table, policy."""

import random
from itertools import product
from typing import get_args

import pytest

from protocol.blocks import block_hashes, pack_ids, seed_of
from protocol.errors import LocalError
from protocol.events import KvCleared, KvStored
from router.scheduling import commands as cmd
from router.scheduling import events as ev
from router.scheduling.attempts import RetryBudget, Tries
from router.scheduling.deadlines import Deadlines, Timer
from router.scheduling.fleet import Fleet, Reservation
from router.scheduling.lifecycle import TABLE, Choice, Move, State
from router.scheduling.limits import Limits
from tests.unit.router.scheduling.bench import Bench, hashes_of, info, only, report, submitted

# -- the table


def test_every_move_that_the_table_does_not_have_raises_and_changes_nothing() -> None:
    for state, move in product(get_args(State), get_args(Move)):
        choice = Choice(submitted(), 1.0)
        choice.state = state
        if (state, move) in TABLE:
            choice.move(move, 2.0)
            assert choice.state == TABLE[state, move]
        else:
            with pytest.raises(LocalError, match="submitted"):
                choice.move(move, 2.0)
            assert (choice.state, len(choice.story)) == (state, 1)


def test_every_state_can_end_and_nothing_leads_out_of_the_end() -> None:
    assert {s for s, m in TABLE if m == "end"} == set(get_args(State)) - {"ended"}
    assert not [1 for state, _ in TABLE if state == "ended"]


# -- deadlines


def test_timers_fire_in_order_and_once() -> None:
    deadlines = Deadlines()
    timers = [Timer(str(n), None) for n in range(3)]
    for timer, due in zip(timers, (3.0, 1.0, 2.0), strict=True):
        deadlines.arm(timer, due)
    assert deadlines.next() == 1.0
    assert deadlines.pop_due(0.5) is None
    assert [deadlines.pop_due(2.5) for _ in range(3)] == [timers[1], timers[2], None]
    assert len(deadlines) == 1


def test_a_timer_moves_both_ways_and_can_be_disarmed() -> None:
    deadlines = Deadlines()
    timer = Timer("t", None)
    deadlines.arm(timer, 5.0)
    deadlines.arm(timer, 9.0)
    assert deadlines.next() == 9.0
    deadlines.arm(timer, 2.0)
    assert deadlines.next() == 2.0
    deadlines.disarm(timer)
    deadlines.disarm(timer)
    assert deadlines.next() is None
    deadlines.arm(timer, 7.0)
    assert deadlines.pop_due(7.0) is timer
    assert deadlines.pop_due(99.0) is None


def test_the_heap_stays_as_small_as_what_is_armed() -> None:
    deadlines = Deadlines()
    kept = Timer("kept", None)
    deadlines.arm(kept, 1000.0)
    for n in range(10_000):
        timer = Timer("t", None)
        deadlines.arm(timer, 100.0 + n)
        deadlines.disarm(timer)
    assert len(deadlines._heap) < 200
    assert deadlines.next() == 1000.0


@pytest.mark.parametrize("seed", range(5))
def test_timers_agree_with_a_plain_dict(seed: int) -> None:
    rng = random.Random(seed)
    deadlines = Deadlines()
    timers = [Timer(str(n), None) for n in range(30)]
    model: dict[Timer, float] = {}
    for _ in range(3000):
        timer = rng.choice(timers)
        action = rng.randrange(4)
        if action < 2:
            model[timer] = due = float(rng.randrange(50))
            deadlines.arm(timer, due)
        elif action == 2:
            model.pop(timer, None)
            deadlines.disarm(timer)
        else:
            fired = deadlines.pop_due(25.0)
            assert (fired is None) == (min(model.values(), default=99.0) > 25.0)
            if fired is not None:
                assert model[fired] == min(model.values())
                del model[fired]
        assert deadlines.next() == min(model.values(), default=None)
        assert len(deadlines) == len(model)


# -- budget and tries


def test_the_budget_is_a_floor_and_a_share_of_a_sliding_window() -> None:
    budget = RetryBudget(Limits(retry_floor=2, retry_share=0.5, retry_window_s=10.0))
    assert budget.allows(1000.0)
    for _ in range(4):
        budget.admitted(1000.0)
    for _ in range(4):
        assert budget.allows(1000.0)
        budget.retried(1000.0)
    assert not budget.allows(1000.0)
    assert budget.next_change() == 1001.0
    assert not budget.allows(1009.9)
    assert budget.allows(1010.0)
    assert budget.wait_s(0, 1010.0) == 1
    assert budget.wait_s(1000, 1010.0) == 30


def test_free_moves_are_charged_when_they_repeat() -> None:
    limits = Limits(max_attempts=1)
    tries = Tries()
    for _ in range(4):
        tries.charge(limits, free=True)
        assert not tries.exhausted(limits)
    tries.charge(limits, free=True)
    assert tries.exhausted(limits)
    tries.progressed(64, limits)
    assert not tries.exhausted(limits)


# -- ledger, pools, policy


def test_a_reservation_is_freed_once() -> None:
    fleet = Fleet(Limits())
    worker = fleet.add(info("a"), 0.0)
    reservation = Reservation(1, worker, "prefill", 10, 2)
    fleet.charge(reservation)
    fleet.validate()
    fleet.free(reservation)
    with pytest.raises(LocalError, match="twice"):
        fleet.free(reservation)


def test_books_that_do_not_agree_are_found() -> None:
    def broken(spoil: str) -> Bench:
        bench = Bench()
        bench.pd()
        bench.to_transfer()
        bench.feed(submitted("c/1"))
        t = bench.scheduler._t
        worker = t.fleet.workers["d1"]
        choice = t.choices["c/0"]
        exec(spoil, {"t": t, "worker": worker, "choice": choice, "p": t.fleet.workers["p"]})
        return bench

    for spoil in (
        "worker.tokens += 1",
        "worker.live = False",
        "worker.seats[0].pool.running += 1",
        "worker.seats[0].position = 3",
        "worker.seats[0].pool.order.clear()",
        "worker.seats[0].pool.members['x'] = worker.seats[0]",
        "t.attempts.clear()",
        "choice.lent = None",
        "choice.decode.timer.due = None",
        "t.admission.num_queued += 1",
        "worker.group.num_pending += 1",
        "t.claims['x'] = worker",
        "p.handles.clear()",
        "t.choices.pop('c/1')",
        "p.handles['x'] = type(choice.lent)(t.choices['c/1'], choice.lent.handle, None)",
    ):
        bench = broken(spoil)
        with pytest.raises(LocalError):
            bench.scheduler.validate()


def test_a_cached_prefix_draws_the_choice_and_shortens_its_prefill() -> None:
    bench = Bench()
    bench.list_workers(*(info(f"p{n}", "prefill") for n in range(40)), info("d", "decode"))
    packed = pack_ids(range(200))
    blocks = block_hashes(packed, 16, seed_of("d"))
    bench.feed(ev.KvChanged("p33", "p33-1", 1, [KvStored(b"".join(blocks[:8]))]))
    assert only(bench.feed(submitted()), cmd.StartPrefill).worker == "p33"
    view = next(v for v in bench.scheduler.workers() if v.info.worker_id == "p33")
    assert view.tokens == 200 - 8 * 16
    other = submitted("c/1", cache_salt="other")
    assert only(bench.feed(other), cmd.StartPrefill).worker != "p33"


def test_a_snapshot_takes_the_place_of_what_was_known_before() -> None:
    bench = Bench()
    bench.list_workers(*(info(f"p{n}", "prefill") for n in range(40)), info("d", "decode"))
    blocks = block_hashes(pack_ids(range(200)), 16, seed_of("d"))
    for number, held in enumerate((blocks[:2], blocks[:8]), 1):
        bench.feed(ev.KvSnapshotArrived("p33", "p33-1", number, held))
    assert only(bench.feed(submitted()), cmd.StartPrefill).worker == "p33"
    view = next(v for v in bench.scheduler.workers() if v.info.worker_id == "p33")
    assert view.tokens == 200 - 8 * 16
    bench.feed(ev.KvSnapshotArrived("p33", "p33-1", 3, []))
    assert only(bench.feed(submitted("c/1")), cmd.StartPrefill).worker != "p33"


def test_a_decode_worker_that_has_almost_all_of_it_prefills_the_rest() -> None:
    bench = Bench()
    bench.pd(2)
    blocks = block_hashes(pack_ids(range(200)), 16, seed_of("d"))
    bench.feed(ev.KvChanged("d2", "d2-1", 1, [KvStored(b"".join(blocks))]))
    start = only(bench.feed(submitted()), cmd.StartDecode)
    assert (start.worker, start.handle) == ("d2", None)


def test_lost_kv_events_are_asked_for_and_asked_again() -> None:
    bench = Bench()
    bench.list_workers(info("a"))
    ask = cmd.AskKvSnapshot("a", "a-1")
    lost = ev.WorkerReported("a", "a-1", report(last_kv_event=3))
    assert bench.feed(lost) == [ask]
    assert bench.feed(lost) == []
    for _ in range(6):
        bench.now += 1
        assert bench.feed(lost) == []
    bench.now += 1
    assert bench.feed(lost) == [ask]
    assert bench.feed(ev.KvSnapshotArrived("a", "a-1", 3, hashes_of("a"))) == []
    assert bench.feed(lost) == []
    assert bench.feed(ev.KvChanged("a", "a-1", 7, [KvCleared()])) == [ask]
    assert bench.feed(ev.KvSnapshotArrived("a", "a-1", 5, [])) == [ask]


def test_idle_workers_are_never_missed() -> None:
    bench = Bench()
    bench.list_workers(*(info(f"d{n:03}", "decode", running=1) for n in range(100)))
    for n in range(100):
        assert [c for c in bench.feed(submitted(f"c/{n}")) if isinstance(c, cmd.StartDecode)]
    assert bench.feed(submitted("c/100")) == []
    assert all(view.running == 1 for view in bench.scheduler.workers())


def test_prefill_load_is_spread_over_the_workers() -> None:
    bench = Bench()
    bench.list_workers(
        *(info(f"p{n}", "prefill") for n in range(4)), info("d", "decode", running=64)
    )
    for n in range(16):
        bench.feed(submitted(f"c/{n}"))
    loads = [v.prefills for v in bench.scheduler.workers() if v.info.role == "prefill"]
    assert loads == [4, 4, 4, 4]


def test_model_names_are_bounded() -> None:
    bench = Bench()
    for n in range(1100):
        bench.feed(ev.WorkerListed(info("a", model=f"m{n}", incarnation=f"a-{n}")))
    assert len(bench.scheduler.models()) <= 1025
