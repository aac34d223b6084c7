"""Messages that got lost on the way, and the time while our own bus is away."""

from router.scheduling import commands as cmd
from router.scheduling import events as ev
from tests.unit.router.scheduling.bench import (
    Bench,
    ends,
    failed,
    info,
    notes,
    report,
    submitted,
    without_notes,
)


def test_a_gap_asks_again_for_all_that_the_worker_holds() -> None:
    bench = Bench()
    bench.pd()
    bench.to_decoding("c/0")
    bench.to_transfer("c/1")
    gap = ev.GapSeen("d1", "d1-1")
    assert bench.feed(gap) == [
        cmd.AskReplay(2, "d1", "d1-1"),
        cmd.AskReplay(4, "d1", "d1-1"),
        cmd.Note("replay", "gap", "d1"),
    ]
    assert bench.feed(gap) == []
    bench.feed(ev.Accepted(4))
    out = without_notes(bench.pass_time(2.5))
    assert out == [cmd.AskReplay(2, "d1", "d1-1")] * 2
    out = bench.pass_time(0.6)
    assert notes(out) == [("retry", "no_replay")]


def test_while_our_bus_is_away_nothing_of_the_workers_expires() -> None:
    bench = Bench()
    bench.pd(2)
    bench.to_decoding("c/0")
    bench.feed(submitted("c/1"))
    bench.pass_time(0.5)
    bench.feed(ev.BusDown())
    bench.feed(ev.BusDown())
    assert bench.pass_time(20, "*") == []
    assert bench.feed(submitted("c/2")) == []
    assert bench.feed(ev.WorkerUnreachable("p", "p-1")) == []
    out = bench.feed(ev.BusUp())
    decoder = bench.scheduler.story("c/0")[5][1].split()[1]
    assert out == [
        cmd.AskReplay(2, decoder, f"{decoder}-1"),
        cmd.AskReplay(3, "p", "p-1"),
        cmd.Note("replay", "bus_up"),
        cmd.StartPrefill(4, "c/2", "p", "p-1"),
    ]
    for answer in (ev.DecodingStarted(2), ev.Accepted(3), ev.Accepted(4)):
        assert bench.feed(answer) == []
    assert bench.pass_time(2.4, "*") == []
    bench.report_all()
    assert bench.pass_time(5) == []


def test_the_queue_still_expires_while_our_bus_is_away() -> None:
    bench = Bench()
    bench.pd()
    bench.feed(ev.BusDown())
    bench.feed(submitted())
    assert ends(bench.pass_time(31, "*")) == [("expired", "queue", "queue_timeout")]


def test_handles_are_renewed_as_soon_as_our_bus_is_back() -> None:
    bench = Bench()
    bench.pd()
    bench.to_transfer()
    bench.feed(ev.BusDown())
    bench.now += 8
    out = bench.feed(ev.BusUp())
    assert out[0] == cmd.RenewHandles("p", "p-1", ["h-c/0"])


def test_a_worker_may_come_back_to_the_bus_later_than_we() -> None:
    bench = Bench()
    bench.pd()
    bench.to_decoding("c/0")
    bench.feed(ev.BusDown())
    bench.now += 3
    bench.feed(ev.BusUp())
    asks = 0
    gone = ev.WorkerUnreachable("d1", "d1-1")
    bench.feed(gone)
    for _ in range(4):
        out = bench.pass_time(0.5, "*")
        assert ends(out) == []
        assert not [c for c in out if isinstance(c, cmd.CancelAttempt)]
        asks += len([c for c in out if isinstance(c, cmd.AskReplay)])
        bench.feed(gone)
    assert asks >= 4
    bench.feed(ev.DecodingStarted(2))
    assert [v.suspected for v in bench.scheduler.workers()] == [False, False]


def test_a_job_sent_to_a_worker_that_is_not_back_yet_blames_nobody() -> None:
    bench = Bench()
    bench.list_workers(info("a"))
    bench.feed(ev.BusDown())
    bench.now += 3
    bench.feed(ev.BusUp())
    bench.feed(submitted())
    bench.feed(ev.WorkerUnreachable("a", "a-1"))
    out = without_notes(bench.pass_time(0.5))
    assert out == [cmd.AskReplay(1, "a", "a-1")]
    out = bench.feed(failed(1, "unknown_attempt"))
    assert without_notes(out) == [
        cmd.ForgetAttempt(1, "a", "a-1"),
        cmd.StartDecode(2, "c/0", "a", "a-1", None),
    ]


def test_bus_up_without_an_outage_asks_nothing_of_nobody() -> None:
    bench = Bench()
    assert bench.feed(ev.BusUp()) == []
    assert bench.scheduler.next_deadline() is None


def test_after_an_outage_requests_wait_for_workers_that_were_thought_silent() -> None:
    """A router that stood still believed them gone before it noticed that its own bus was."""
    bench = Bench()
    bench.list_workers(info("a"))
    bench.pass_time(3.0, "*")
    bench.feed(ev.BusDown())
    bench.now += 20.0
    assert bench.feed(submitted("early")) == [], "nothing was heard because nothing could be"
    bench.feed(ev.BusUp())
    bench.now += 9.0
    assert bench.feed(submitted("late")) == []
    out = bench.feed(ev.WorkerReported("a", "a-1", report()))
    out += bench.pass_time(1.5)
    assert [c.choice for c in out if isinstance(c, cmd.StartDecode)] == ["early", "late"]


def test_an_outage_gives_no_hope_for_workers_that_were_long_gone_before() -> None:
    bench = Bench()
    bench.list_workers(info("a"))
    bench.pass_time(20.0, "*")
    bench.feed(ev.BusDown())
    assert ends(bench.feed(submitted())) == [("rejected", "queue", "no_decode_worker")]
