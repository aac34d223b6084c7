"""Every row of the deadline table."""

import pytest

from router.scheduling import commands as cmd
from router.scheduling import events as ev
from router.scheduling.limits import Limits
from tests.unit.router.scheduling.bench import (
    Bench,
    ends,
    handle,
    info,
    notes,
    only,
    submitted,
    without_notes,
)


def test_queue_timeout_expires_the_choice() -> None:
    bench = Bench()
    bench.list_workers(info("a", running=1))
    bench.to_decoding_local("c/0")
    bench.feed(submitted("c/1"))
    assert ends(bench.pass_time(29.9)) == []
    end = only(bench.pass_time(0.2), cmd.EndChoice)
    assert (end.outcome, end.leg, end.code) == ("expired", "queue", "queue_timeout")
    assert end.retry_after_s == 2


def test_accept_timeout_sends_the_job_to_the_next_worker() -> None:
    bench = Bench()
    bench.list_workers(info("p1", "prefill"), info("p2", "prefill"), info("d", "decode"))
    first = only(bench.feed(submitted()), cmd.StartPrefill)
    other = {"p1": "p2", "p2": "p1"}[first.worker]
    assert bench.pass_time(0.9) == []
    assert bench.pass_time(0.2) == [
        cmd.CancelAttempt(1, first.worker, first.incarnation),
        cmd.Note("retry", "accept_timeout", first.worker, "c/0"),
        cmd.StartPrefill(2, "c/0", other, f"{other}-1"),
    ]


@pytest.mark.parametrize(
    "sign",
    [ev.Accepted(1), ev.Progressed(1), ev.Prefilled(1, handle("p"), ended=False)],
)
def test_any_word_ends_the_wait_for_acceptance(sign: ev.Event) -> None:
    bench = Bench()
    bench.pd()
    bench.feed(submitted())
    bench.feed(sign)
    bench.feed(ev.Accepted(2)) if isinstance(sign, ev.Prefilled) else None
    assert bench.pass_time(1.5) == []


def test_a_worker_that_answers_no_job_at_all_is_suspected() -> None:
    bench = Bench()
    bench.list_workers(info("a"), info("b", draining=True))
    for n in range(2):
        bench.feed(submitted(f"c/{n}"))
    out = bench.pass_time(1.1)
    assert notes(out)[:3] == [
        ("retry", "accept_timeout"),
        ("suspected", "accept_timeout"),
        ("retry", "accept_timeout"),
    ]


def test_prefill_timeout_is_restarted_by_progress() -> None:
    bench = Bench()
    bench.list_workers(info("p1", "prefill"), info("p2", "prefill"), info("d", "decode"))
    bench.feed(submitted())
    bench.feed(ev.Accepted(1))
    bench.pass_time(29)
    bench.feed(ev.Progressed(1))
    assert bench.pass_time(29) == []
    out = bench.pass_time(1.1)
    assert [type(c) for c in out] == [cmd.CancelAttempt, cmd.Note, cmd.StartPrefill]
    assert notes(out) == [("retry", "prefill_timeout")]


def test_a_local_prefill_has_the_same_deadline() -> None:
    bench = Bench()
    bench.list_workers(info("d1", "decode"), info("d2", "decode"))
    bench.feed(submitted())
    bench.feed(ev.Accepted(1))
    assert notes(bench.pass_time(30.1))[0] == ("retry", "prefill_timeout")


def test_decode_wait_timeout_expires_the_choice() -> None:
    bench = Bench()
    bench.pd()
    bench.feed(submitted())
    bench.feed(ev.WorkerLeaving("d1", "d1-1"))
    bench.feed(ev.Prefilled(1, handle("p"), ended=False))
    out = without_notes(bench.pass_time(30.1))
    assert [c for c in out if not isinstance(c, cmd.RenewHandles)] == [
        cmd.ReleaseHandle("p", "p-1", "h1"),
        cmd.EndChoice("c/0", "expired", "transfer", "decode_wait_timeout"),
    ]


def test_a_transfer_without_progress_moves_to_another_decode_worker_with_the_same_handle() -> None:
    bench = Bench()
    bench.pd(2)
    _, start = bench.to_transfer()
    other = {"d1": "d2", "d2": "d1"}[start.worker]
    bench.feed(ev.Accepted(2))
    bench.pass_time(59)
    bench.feed(ev.Progressed(2))
    assert ends(bench.pass_time(59)) == []
    out = [c for c in bench.pass_time(1.5) if not isinstance(c, cmd.RenewHandles)]
    assert out == [
        cmd.CancelAttempt(2, start.worker, start.incarnation),
        cmd.Note("retry", "kv_transfer_timeout", start.worker, "c/0"),
        cmd.StartDecode(3, "c/0", other, f"{other}-1", start.handle),
    ]


def test_the_transfer_deadline_counts_from_its_start() -> None:
    bench = Bench(Limits(kv_transfer_timeout_s=5.0))
    bench.pd(2)
    bench.to_transfer()
    bench.pass_time(0.9)
    bench.feed(ev.Accepted(2))
    assert notes(bench.pass_time(4.0)) == []
    assert notes(bench.pass_time(0.2)) == [("retry", "kv_transfer_timeout")]


def test_a_stalled_stream_is_replayed_first_and_then_resumed_elsewhere() -> None:
    bench = Bench()
    bench.pd(2)
    start = bench.to_decoding()
    bench.output["c/0"] = 10
    bench.pass_time(6)
    bench.heard[2] = bench.now
    assert bench.pass_time(9.9) == []
    assert bench.pass_time(0.2) == [
        cmd.AskReplay(2, start.worker, start.incarnation),
        cmd.Note("replay", "stall", start.worker, "c/0"),
    ]
    out = bench.pass_time(1.0)
    assert out == [
        cmd.CancelAttempt(2, start.worker, start.incarnation),
        cmd.Note("resume", "no_replay", start.worker, "c/0"),
        cmd.StartPrefill(3, "c/0", "p", "p-1"),
    ]
    bench.feed(ev.Accepted(3))
    again = only(bench.feed(ev.Prefilled(3, handle("p"), ended=False)), cmd.StartDecode)
    assert again.worker != start.worker


@pytest.mark.parametrize("answer", ["event", "tokens"])
def test_an_answered_replay_keeps_the_stream_where_it_is(answer: str) -> None:
    bench = Bench()
    bench.pd()
    bench.to_decoding()
    bench.pass_time(10.1)
    if answer == "event":
        assert bench.feed(ev.DecodingStarted(2)) == []
    else:
        bench.heard[2] = bench.now + 0.1
    assert bench.pass_time(9) == []
    assert notes(bench.pass_time(1.1)) == [("replay", "stall")]


def test_the_whole_request_may_have_a_deadline() -> None:
    bench = Bench(Limits(request_timeout_s=5.0))
    bench.pd()
    start = bench.to_decoding()
    bench.heard[2] = bench.now + 5
    assert bench.pass_time(5.1) == [
        cmd.CancelAttempt(2, start.worker, start.incarnation),
        cmd.EndChoice("c/0", "expired", "request", "request_timeout"),
    ]
