"""Time in which our own loop stood still, and workers that were silent and are heard again."""

import pytest

from router.scheduling import commands as cmd
from router.scheduling import events as ev
from router.scheduling.deadlines import SLACK_S
from router.scheduling.limits import Limits
from tests.unit.router.scheduling.bench import (
    Bench,
    ends,
    info,
    notes,
    report,
    submitted,
    without_notes,
)

PAUSED = [cmd.Note("paused", "loop")]


def stand_still(bench: Bench, seconds: float) -> None:
    """As the driver tells it: before anything else, at the new time."""
    bench.now += seconds
    bench.next_report = max(bench.next_report, bench.now)
    assert bench.feed(ev.Paused(seconds)) == PAUSED


def bus_now(bench: Bench) -> float:
    return bench.scheduler._t.bus_now


def suspected(bench: Bench, worker: str) -> bool:
    views = bench.scheduler.workers()
    return next(view.suspected for view in views if view.info.worker_id == worker)


def fall_silent(bench: Bench, worker: str) -> None:
    assert ("silent", "silent") in notes(bench.pass_time(3.0, worker))


def test_nobody_is_silent_because_we_stood_still() -> None:
    bench = Bench()
    bench.pd()
    start = bench.to_decoding()
    bench.pass_time(1.0)
    stand_still(bench, 60.0)
    assert bench.feed(ev.Ticked()) == []
    bench.heard[start.attempt] = bench.now
    assert bench.pass_time(2.0, "*") == []
    assert ("silent", "silent") in notes(bench.pass_time(1.0, "*")), "but in time that we had"


def test_a_job_may_be_accepted_as_late_as_if_we_had_not_stood_still() -> None:
    bench = Bench()
    bench.pd()
    bench.feed(submitted())
    bench.pass_time(0.9)
    stand_still(bench, 5.0)
    assert bench.pass_time(0.05) == []
    assert notes(bench.pass_time(0.1))[0] == ("retry", "accept_timeout")


def test_a_stream_has_its_whole_stall_from_its_last_token() -> None:
    """Which came before we stood still, and long after the worker's last word on the attempt."""
    bench = Bench()
    bench.pd()
    start = bench.to_decoding()
    bench.pass_time(9.5)
    bench.heard[start.attempt] = bench.now
    stand_still(bench, 20.0)
    assert without_notes(bench.pass_time(9.9)) == []
    assert notes(bench.pass_time(0.2)) == [("replay", "stall")]


def test_the_queue_expires_while_we_stand_still() -> None:
    """Its deadline is a promise to the client, whose time goes on."""
    bench = Bench()
    bench.list_workers(info("d", running=1))
    bench.to_decoding_local("c/0")
    bench.feed(submitted("c/1"))
    stand_still(bench, 31.0)
    assert ends(bench.feed(ev.Ticked())) == [("expired", "queue", "queue_timeout")]


@pytest.mark.parametrize("claimed", [1.9, 2.0, 1e9])
def test_the_clock_of_the_bus_never_goes_back(claimed: float) -> None:
    """Whatever is claimed, it is not behind the last event that was handled."""
    bench = Bench()
    bench.pd()
    bench.pass_time(1.0)
    before = bus_now(bench)
    bench.now += 2.0
    assert bench.feed(ev.Paused(claimed)) == PAUSED
    assert bus_now(bench) == pytest.approx(before + max(0.0, 2.0 - claimed))
    assert bus_now(bench) >= before - SLACK_S
    assert bench.feed(ev.Paused(claimed)) == [], "at the same moment nothing more has passed"
    bench.now += 0.5
    bench.feed(ev.Ticked())
    assert bus_now(bench) == pytest.approx(before + max(0.0, 2.0 - claimed) + 0.5)


@pytest.mark.parametrize("seconds", [-1.0, 0.0, float("nan"), float("inf"), float("-inf")])
def test_a_pause_that_cannot_be_changes_nothing(seconds: float) -> None:
    bench = Bench()
    bench.pd()
    deadline = bench.scheduler.next_deadline()
    bench.now += 1.0
    assert bench.feed(ev.Paused(seconds)) == []
    assert bus_now(bench) == bench.now
    assert bench.scheduler.next_deadline() == deadline


def test_without_a_bus_a_pause_is_counted_with_the_outage() -> None:
    bench = Bench()
    bench.pd()
    bench.feed(ev.BusDown())
    frozen = bus_now(bench)
    bench.now += 5.0
    assert bench.feed(ev.Paused(5.0)) == []
    assert bus_now(bench) == frozen
    bench.feed(ev.BusUp())
    bench.feed(ev.Ticked())
    assert bus_now(bench) == frozen
    assert bench.pass_time(2.4, "*") == []


def test_one_who_is_heard_again_is_better_than_nobody() -> None:
    bench = Bench()
    bench.list_workers(info("a"))
    fall_silent(bench, "a")
    assert bench.feed(submitted()) == []
    out = bench.feed(ev.WorkerReported("a", "a-1", report()))
    assert without_notes(out) == [cmd.StartDecode(1, "c/0", "a", "a-1", None)]
    view = bench.scheduler.workers()[0]
    assert (view.live, view.eligible, view.suspected) == (True, True, False)


def test_such_a_silence_does_not_make_the_next_suspicion_longer() -> None:
    bench = Bench()
    bench.list_workers(info("a"))
    for _ in range(3):
        fall_silent(bench, "a")
        bench.report_all()
    bench.feed(ev.WorkerUnreachable("a", "a-1"))
    bench.pass_time(0.9)
    assert suspected(bench, "a")
    bench.pass_time(0.2)
    assert not suspected(bench, "a")


def test_beside_others_it_has_to_wait() -> None:
    bench = Bench()
    bench.list_workers(info("a"), info("b"))
    fall_silent(bench, "a")
    bench.report_all()
    assert suspected(bench, "a")
    bench.pass_time(1.0)
    assert not suspected(bench, "a"), "its time is over"


def test_it_has_waited_when_the_others_are_gone() -> None:
    bench = Bench(Limits(suspect_s=10.0))
    bench.list_workers(info("a"), info("b"))
    for _ in range(2):
        fall_silent(bench, "a")
        bench.report_all()
        assert suspected(bench, "a")
    fall_silent(bench, "b")
    assert not suspected(bench, "a")
    assert suspected(bench, "b")


def test_it_has_to_wait_if_somebody_else_can_do_its_part() -> None:
    bench = Bench()
    bench.list_workers(info("p", "prefill"), info("d1", "decode"), info("d2", "decode"))
    bench.pass_time(3.0, "p", "d1")
    bench.report_all()
    assert not suspected(bench, "p")
    assert suspected(bench, "d1")


def test_who_is_suspected_for_something_else_has_to_wait_though_it_is_alone() -> None:
    bench = Bench()
    bench.list_workers(info("a"))
    bench.pass_time(2.0, "*")
    bench.feed(ev.WorkerUnreachable("a", "a-1"))
    assert ("silent", "silent") in notes(bench.pass_time(0.6, "*"))
    bench.report_all()
    assert suspected(bench, "a")
    bench.pass_time(0.5)
    assert not suspected(bench, "a")


def test_twins_who_fight_for_one_name_have_to_wait() -> None:
    bench = Bench()
    bench.list_workers(info("a"))
    bench.feed(ev.WorkerReported("a", "a-2", report()))
    bench.report_all()
    assert suspected(bench, "a")


def test_leases_are_renewed_at_once_after_we_stood_still() -> None:
    """Their time has gone on at the workers."""
    bench = Bench()
    bench.list_workers(info("p", "prefill"), info("d", "decode"))
    bench.to_transfer()
    bench.now += 8.0
    out = bench.feed(ev.Paused(8.0))
    assert [c.worker for c in out if isinstance(c, cmd.RenewHandles)] == ["p"]
    assert bench.scheduler._t.fleet.workers["p"].renew.due is not None
