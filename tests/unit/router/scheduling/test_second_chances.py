"""Every row of the deadline table, every failure code, every way a worker can be lost."""

import pytest

from protocol.out import FailureCode
from protocol.worker_info import EngineTraits
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
    report,
    submitted,
    without_notes,
)


def failed(attempt: int, code: FailureCode) -> ev.AttemptFailed:
    return ev.AttemptFailed(attempt, "decode", code, "why")


# -- deadlines


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


# -- failures


@pytest.mark.parametrize(
    ("code", "told"),
    [
        ("handle_mismatch", "handle_mismatch"),
        ("invalid_request", "invalid_request"),
        ("context_length", "context_length_exceeded"),
    ],
)
def test_what_no_other_worker_would_spare_us_ends_the_choice(code: FailureCode, told: str) -> None:
    bench = Bench()
    bench.pd(2)
    start = bench.to_transfer()[1]
    assert bench.feed(failed(2, code)) == [
        cmd.ForgetAttempt(2, start.worker, start.incarnation),
        cmd.ReleaseHandle("p", "p-1", "h-c/0"),
        cmd.EndChoice("c/0", "failed", "decode", told, "why"),
    ]


@pytest.mark.parametrize("code", ["engine", "aborted", "transfer_failed"])
def test_a_failed_pull_goes_to_another_decode_worker_with_the_same_handle(
    code: FailureCode,
) -> None:
    bench = Bench()
    bench.pd(2)
    start = bench.to_transfer()[1]
    other = {"d1": "d2", "d2": "d1"}[start.worker]
    assert bench.feed(failed(2, code)) == [
        cmd.ForgetAttempt(2, start.worker, start.incarnation),
        cmd.Note("retry", code, start.worker, "c/0"),
        cmd.StartDecode(3, "c/0", other, f"{other}-1", start.handle),
    ]


def test_a_source_whose_handle_fails_twice_is_not_trusted_again() -> None:
    bench = Bench()
    bench.list_workers(info("q", "prefill"))
    bench.pd(3)
    first, start = bench.to_transfer()
    source = bench.scheduler.story("c/0")[1][1].split()[1]
    bench.feed(failed(2, "transfer_failed"))
    out = bench.feed(failed(3, "transfer_failed"))
    assert first == 1
    assert start.handle is not None
    assert cmd.ReleaseHandle(source, f"{source}-1", start.handle.handle_id) in out
    assert only(out, cmd.StartPrefill).worker == {"p": "q", "q": "p"}[source]


def test_a_lost_lease_is_never_pulled_again_and_excludes_nobody() -> None:
    bench = Bench()
    bench.pd()
    bench.to_transfer()
    assert bench.feed(failed(2, "lease_lost")) == [
        cmd.ForgetAttempt(2, "d1", "d1-1"),
        cmd.ReleaseHandle("p", "p-1", "h-c/0"),
        cmd.Note("retry", "lease_lost", "d1", "c/0"),
        cmd.StartPrefill(3, "c/0", "p", "p-1"),
    ]
    out = bench.feed(ev.Prefilled(3, handle("p"), ended=False))
    assert only(out, cmd.StartDecode).worker == "d1"


def test_an_attempt_the_worker_does_not_know_starts_again_without_blame() -> None:
    bench = Bench()
    bench.pd()
    bench.to_decoding()
    assert bench.feed(failed(2, "unknown_attempt")) == [
        cmd.ForgetAttempt(2, "d1", "d1-1"),
        cmd.Note("retry", "unknown_attempt", "d1", "c/0"),
        cmd.StartPrefill(3, "c/0", "p", "p-1"),
    ]


def test_an_engine_that_fails_is_not_used_again_for_this_choice() -> None:
    bench = Bench()
    bench.list_workers(info("p1", "prefill"), info("p2", "prefill"), info("d", "decode"))
    first = only(bench.feed(submitted()), cmd.StartPrefill)
    out = bench.feed(ev.AttemptFailed(1, "prefill", "engine", "boom"))
    second = only(out, cmd.StartPrefill)
    assert second.worker != first.worker
    out = bench.feed(ev.AttemptFailed(2, "prefill", "engine", "boom"))
    assert only(out, cmd.StartDecode).handle is None
    assert notes(out) == [("retry", "engine"), ("local_prefill", "no_prefill_worker")]


def test_a_prefill_without_a_handle_is_a_failure_of_its_engine() -> None:
    bench = Bench()
    bench.pd()
    bench.feed(submitted())
    out = bench.feed(ev.Prefilled(1, None, ended=False))
    assert out[:2] == [
        cmd.ForgetAttempt(1, "p", "p-1"),
        cmd.Note("retry", "no_handle", "p", "c/0"),
    ]
    assert only(out, cmd.StartDecode).handle is None


def test_a_refusal_excludes_nobody_but_gives_the_worker_a_rest() -> None:
    bench = Bench()
    bench.list_workers(info("a"))
    bench.feed(submitted())
    assert bench.feed(ev.Refused(1, "full")) == [
        cmd.ForgetAttempt(1, "a", "a-1"),
        cmd.Note("retry", "refused", "a", "c/0"),
    ]
    assert bench.pass_time(0.2) == []
    assert bench.pass_time(0.1) == [cmd.StartDecode(2, "c/0", "a", "a-1", None)]


def test_refusals_are_bounded_too() -> None:
    bench = Bench(Limits(retry_floor=100))
    bench.list_workers(info("a"))
    out = bench.feed(submitted())
    dispatches = 0
    while not ends(out):
        out = [c for c in out if isinstance(c, cmd.StartDecode)] or bench.pass_time(0.3)
        for start in out:
            if isinstance(start, cmd.StartDecode):
                dispatches += 1
                out = bench.feed(ev.Refused(start.attempt, "full"))
    assert ends(out) == [("failed", "prefill", "attempts_exhausted")]
    assert dispatches == 20


def test_when_all_have_failed_it_waits_and_tries_them_again_until_the_attempts_are_used() -> None:
    bench = Bench()
    bench.list_workers(info("a"))
    bench.feed(submitted())
    for n in range(1, 4):
        assert len(bench.feed(ev.AttemptFailed(n, "prefill", "engine", "boom"))) == 2
        assert bench.scheduler.num_queued == 1
        bench.pass_time(0.1 * 2**n / 2 - 0.01)
        assert bench.scheduler.num_queued == 1
        assert only(bench.pass_time(0.1 * 2**n + 0.02), cmd.StartDecode).attempt == n + 1
    end = only(bench.feed(ev.AttemptFailed(4, "prefill", "engine", "boom")), cmd.EndChoice)
    assert (end.outcome, end.leg, end.code) == ("failed", "prefill", "attempts_exhausted")
    assert "4 attempts" in end.message
    assert "engine" in end.message


def test_when_all_decode_workers_have_failed_the_handle_waits_for_them() -> None:
    bench = Bench()
    bench.pd()
    start = bench.to_transfer()[1]
    assert len(bench.feed(failed(2, "engine"))) == 2
    assert bench.scheduler.choices_waiting == ["c/0"]
    again = only(bench.pass_time(0.5), cmd.StartDecode)
    assert (again.worker, again.handle) == ("d1", start.handle)


def test_a_parked_choice_can_be_cancelled() -> None:
    codes: tuple[FailureCode, ...] = ("engine", "lease_lost")
    for fails in codes:
        bench = Bench()
        bench.pd()
        bench.to_transfer()
        bench.feed(failed(2, fails))
        assert ends(bench.feed(ev.ClientGone("c/0")))[0][0] == "cancelled"
        assert ends(bench.pass_time(5)) == []


def test_progress_makes_the_account_new() -> None:
    bench = Bench()
    bench.list_workers(info("a"), info("b"))
    out = bench.feed(submitted())
    for n in range(1, 12):
        start = only(out, cmd.StartDecode)
        bench.feed(ev.Accepted(start.attempt))
        bench.feed(ev.DecodingStarted(start.attempt))
        bench.heard[start.attempt] = bench.now
        bench.output["c/0"] = 64 * n
        bench.pass_time(2)
        out = bench.feed(failed(start.attempt, "engine"))
        assert notes(out)[0] == ("resume", "engine")


@pytest.mark.parametrize(("resumable", "trait"), [(False, "exact"), (True, "none")])
def test_what_cannot_be_resumed_fails_once_the_client_has_a_token(
    resumable: bool, trait: str
) -> None:
    bench = Bench()
    bench.list_workers(info("a", traits=EngineTraits(resume=trait)))  # type: ignore[arg-type]
    bench.feed(submitted(resumable=resumable))
    bench.feed(ev.DecodingStarted(1))
    bench.output["c/0"] = 1
    out = bench.feed(failed(1, "engine"))
    assert ends(out) == [("failed", "decode", "worker_failed")]


def test_retries_have_a_budget_and_wait_in_the_queue_ahead_of_new_work() -> None:
    bench = Bench(Limits(retry_floor=1, retry_share=0.0))
    bench.list_workers(info("a", running=3))
    for n in range(3):
        bench.feed(submitted(f"c/{n}"))
        bench.feed(ev.Accepted(n + 1))
    out = bench.feed(failed(1, "unknown_attempt"))
    assert only(out, cmd.StartDecode).choice == "c/0"
    bench.feed(ev.Accepted(4))
    assert len(bench.feed(failed(2, "unknown_attempt"))) == 2
    assert only(bench.feed(submitted("c/3")), cmd.StartDecode).choice == "c/3"
    bench.feed(ev.Accepted(5))
    bench.feed(submitted("c/4"))
    assert without_notes(bench.pass_time(9)) == []
    bench.feed(ev.Ended(4))
    assert [c.choice for c in bench.pass_time(2) if isinstance(c, cmd.StartDecode)] == ["c/1"]


# -- workers


def test_a_silent_workers_jobs_move_at_once() -> None:
    bench = Bench()
    bench.pd(2)
    start = bench.to_decoding()
    bench.output["c/0"] = 3
    bench.pass_time(2.4, start.worker)
    assert bench.pass_time(0.2, start.worker) == [
        cmd.Note("silent", "silent", start.worker),
        cmd.Note("suspected", "silent", start.worker),
        cmd.CancelAttempt(2, start.worker, start.incarnation),
        cmd.Note("resume", "silent", start.worker, "c/0"),
        cmd.StartPrefill(3, "c/0", "p", "p-1"),
    ]
    view = next(v for v in bench.scheduler.workers() if v.info.worker_id == start.worker)
    assert (view.listed, view.live, view.eligible, view.suspected) == (True, False, False, True)
    bench.pass_time(1.2, start.worker)
    out = bench.feed(ev.WorkerReported(start.worker, start.incarnation, report()))
    assert out == [cmd.Note("live", "reported", start.worker)]
    assert all(v.eligible for v in bench.scheduler.workers())


def test_suspicion_grows_with_repetition_and_ends() -> None:
    bench = Bench()
    bench.list_workers(info("a"))
    lengths = []
    for _ in range(7):
        bench.feed(ev.WorkerUnreachable("a", "a-1"))
        since = bench.now
        while bench.scheduler.workers()[0].suspected:
            bench.pass_time(0.5)
        lengths.append(round(bench.now - since))
    assert lengths == [1, 2, 4, 8, 16, 30, 30]
    bench.pass_time(61)
    bench.feed(ev.WorkerUnreachable("a", "a-1"))
    bench.pass_time(1.1)
    assert not bench.scheduler.workers()[0].suspected


def test_a_new_incarnation_means_that_the_old_one_is_dead() -> None:
    bench = Bench()
    bench.pd()
    bench.to_decoding()
    bench.feed(submitted("c/1"))
    out = bench.feed(ev.WorkerListed(info("d1", "decode", incarnation="d1-2")))
    assert out == [
        cmd.CancelAttempt(2, "d1", "d1-1"),
        cmd.Note("retry", "replaced", "d1", "c/0"),
        cmd.Note("removed", "replaced", "d1"),
    ]
    assert notes(bench.feed(ev.Ended(2))) == [("late", "ended")]
    assert bench.feed(ev.WorkerReported("d1", "d1-1", report())) == []
    out = bench.feed(ev.WorkerReported("d1", "d1-2", report()))
    assert out == [
        cmd.Note("live", "reported", "d1"),
        cmd.StartPrefill(4, "c/0", "p", "p-1"),
    ]


def test_a_dead_lenders_handles_are_not_waited_for_and_nothing_is_sent_to_it() -> None:
    bench = Bench()
    bench.list_workers(info("q", "prefill"))
    bench.pd()
    bench.feed(submitted())
    bench.feed(ev.WorkerLeaving("d1", "d1-1"))
    source = bench.scheduler.story("c/0")[1][1].split()[1]
    bench.feed(ev.Prefilled(1, handle(source), ended=False))
    out = bench.feed(ev.WorkerListed(info(source, "prefill", incarnation="new")))
    assert out == [
        cmd.Note("retry", "replaced", source, "c/0"),
        cmd.Note("removed", "replaced", source),
    ]


def test_a_pull_from_a_dead_lender_may_still_end_well() -> None:
    bench = Bench()
    bench.pd()
    bench.to_transfer()
    bench.feed(ev.Accepted(2))
    out = bench.feed(ev.WorkerListed(info("p", "prefill", incarnation="p-2")))
    assert notes(out) == [("removed", "replaced")]
    assert bench.feed(ev.DecodingStarted(2)) == []
    assert ends(bench.feed(ev.Ended(2))) == [("completed", "decode", "")]


def test_a_pull_from_a_dead_lender_is_not_waited_for_long() -> None:
    bench = Bench()
    bench.pd()
    bench.to_transfer()
    bench.feed(ev.Accepted(2))
    bench.feed(ev.WorkerListed(info("p", "prefill", incarnation="p-2")))
    out = bench.pass_time(2.6)
    assert notes(out) == [("retry", "kv_transfer_timeout")]
    assert not [c for c in out if isinstance(c, cmd.ReleaseHandle)]


def test_a_lender_that_dies_with_its_attempt_ends_the_early_decode_leg() -> None:
    bench = Bench()
    bench.pd()
    bench.feed(submitted())
    bench.feed(ev.Accepted(1, handle("p")))
    out = bench.feed(ev.WorkerListed(info("p", "prefill", incarnation="p-2")))
    assert without_notes(out)[:2] == [
        cmd.CancelAttempt(1, "p", "p-1"),
        cmd.CancelAttempt(2, "d1", "d1-1"),
    ]


def test_a_worker_unlisted_but_heard_is_kept_for_the_grace() -> None:
    bench = Bench()
    bench.list_workers(info("a"))
    bench.feed(ev.WorkerUnlisted("a", "a-1"))
    bench.pass_time(29)
    assert bench.scheduler.workers()[0].eligible
    bench.feed(submitted())
    bench.feed(ev.DecodingStarted(1))
    bench.heard[1] = bench.now + 5
    assert notes(bench.pass_time(2)) == []
    assert not bench.scheduler.workers()[0].eligible
    bench.feed(ev.Ended(1))
    assert notes(bench.pass_time(1)) == [("removed", "unlisted")]
    assert bench.scheduler.workers() == []


def test_a_worker_listed_again_within_the_grace_stays() -> None:
    bench = Bench()
    bench.list_workers(info("a"))
    bench.feed(ev.WorkerUnlisted("a", "a-1"))
    bench.feed(ev.WorkerListed(info("a")))
    bench.pass_time(40)
    assert bench.scheduler.workers()[0].eligible


def test_a_worker_unlisted_and_silent_is_forgotten() -> None:
    bench = Bench()
    bench.list_workers(info("a"))
    bench.feed(submitted())
    bench.feed(ev.Accepted(1))
    bench.feed(ev.WorkerUnlisted("a", "a-1"))
    out = bench.pass_time(2.6, "a")
    assert notes(out) == [
        ("silent", "silent"), ("retry", "silent"), ("removed", "silent"),
    ]  # fmt: skip
    assert bench.scheduler.workers() == []
    assert bench.feed(ev.WorkerUnlisted("a", "a-1")) == []


def test_reports_of_workers_never_listed_are_ignored() -> None:
    bench = Bench()
    assert bench.feed(ev.WorkerReported("x", "x-1", report())) == []
    assert bench.feed(ev.WorkerLeaving("x", "x-1")) == []
    assert bench.feed(ev.WorkerUnreachable("x", "x-1")) == []
    assert bench.feed(ev.KvChanged("x", "x-1", 1, [])) == []
    assert bench.feed(ev.KvSnapshotArrived("x", "x-1", 1, [])) == []
    assert bench.scheduler.workers() == []


def test_a_successor_that_reports_before_it_is_listed_ends_the_old_one() -> None:
    bench = Bench()
    bench.list_workers(info("a"), info("b"))
    start = only(bench.feed(submitted()), cmd.StartDecode)
    bench.feed(ev.Accepted(1))
    out = bench.feed(ev.WorkerReported(start.worker, "new", report()))
    assert notes(out) == [("silent", "replaced"), ("suspected", "replaced"), ("retry", "replaced")]
    assert only(out, cmd.StartDecode).worker != start.worker
    assert bench.feed(ev.WorkerReported(start.worker, "new", report())) == []


def test_a_ghost_is_ignored_once_the_real_one_is_heard_again() -> None:
    bench = Bench()
    bench.list_workers(info("a"))
    bench.feed(ev.WorkerReported("a", "ghost", report()))
    assert notes(bench.feed(ev.WorkerReported("a", "a-1", report()))) == [("live", "reported")]
    assert bench.feed(ev.WorkerReported("a", "ghost", report())) == []
    bench.feed(ev.WorkerListed(info("a", incarnation="ghost")))
    bench.feed(ev.WorkerReported("a", "ghost", report()))
    assert bench.scheduler.workers()[0].info.incarnation == "ghost"
    assert bench.scheduler.workers()[0].live


def test_an_engine_that_makes_no_steps_gets_no_new_work() -> None:
    bench = Bench()
    bench.list_workers(info("a"))
    stuck = ev.WorkerReported("a", "a-1", report(running=1, steps=5))
    for _ in range(12):
        bench.feed(stuck)
        bench.now += 1
    view = bench.scheduler.workers()[0]
    assert (view.live, view.eligible, view.suspected) == (True, False, True)
    bench.feed(ev.WorkerReported("a", "a-1", report(running=1, steps=6)))
    assert bench.scheduler.workers()[0].eligible


def test_a_worker_may_say_something_new_about_itself() -> None:
    bench = Bench()
    bench.list_workers(info("a"))
    bench.feed(ev.WorkerListed(info("a", running=2)))
    bench.feed(ev.WorkerListed(info("a", running=2, draining=True)))
    assert not bench.scheduler.workers()[0].eligible
    bench.feed(ev.WorkerReported("a", "a-1", report(draining=True)))
    bench.feed(ev.WorkerListed(info("a", running=2)))
    assert not bench.scheduler.workers()[0].eligible
    bench.feed(ev.WorkerReported("a", "a-1", report()))
    assert bench.scheduler.workers()[0].eligible


def test_an_unreachable_workers_unaccepted_jobs_go_elsewhere_at_once() -> None:
    bench = Bench()
    bench.list_workers(info("a"), info("b"))
    first = only(bench.feed(submitted("c/0")), cmd.StartDecode)
    other = {"a": "b", "b": "a"}[first.worker]
    assert bench.feed(ev.WorkerUnreachable(first.worker, first.incarnation)) == [
        cmd.Note("suspected", "unreachable", first.worker),
        cmd.CancelAttempt(1, first.worker, first.incarnation),
        cmd.Note("retry", "gone", first.worker, "c/0"),
        cmd.Note("gone", "unreachable", first.worker),
        cmd.StartDecode(2, "c/0", other, f"{other}-1", None),
    ]


def test_accepted_jobs_are_asked_for_and_move_when_nobody_listens_again() -> None:
    bench = Bench()
    bench.pd(2)
    start = bench.to_decoding()
    gone = ev.WorkerUnreachable(start.worker, start.incarnation)
    ask = cmd.AskReplay(2, start.worker, start.incarnation)
    assert without_notes(bench.feed(gone)) == [ask]
    assert without_notes(bench.feed(gone)) == []
    assert without_notes(bench.pass_time(0.5, start.worker)) == [ask]
    out = bench.feed(gone)
    assert without_notes(out) == [
        cmd.CancelAttempt(2, start.worker, start.incarnation),
        cmd.StartPrefill(3, "c/0", "p", "p-1"),
    ]


def test_an_unreachable_worker_that_answers_keeps_its_jobs() -> None:
    bench = Bench()
    bench.pd()
    bench.to_decoding()
    bench.feed(ev.WorkerUnreachable("d1", "d1-1"))
    bench.feed(ev.DecodingStarted(2))
    assert without_notes(bench.pass_time(0.6)) == []
    bench.now += 0.1
    assert without_notes(bench.feed(ev.WorkerUnreachable("d1", "d1-1"))) == [
        cmd.AskReplay(2, "d1", "d1-1")
    ]


def test_a_choice_under_which_two_processes_died_runs_alone_and_a_third_death_ends_it() -> None:
    bench = Bench()
    workers = [info(name, "decode") for name in "abcd"]
    bench.list_workers(*workers)
    others: list[str] = []
    out = bench.feed(submitted("evil"))
    for _ in range(2):
        start = only(out, cmd.StartDecode)
        bench.feed(ev.Accepted(start.attempt))
        others = [v.info.worker_id for v in bench.scheduler.workers() if not v.num_reservations]
        out = bench.feed(ev.WorkerReported(start.worker, "next", report()))
    start = only(out, cmd.StartDecode)
    assert start.worker in others
    bench.feed(ev.Accepted(start.attempt))
    for n in range(8):
        placed = only(bench.feed(submitted(f"c/{n}")), cmd.StartDecode)
        assert placed.worker != start.worker
        bench.feed(ev.Accepted(placed.attempt))
    assert bench.feed(submitted("c/8")) == []
    out = bench.feed(ev.WorkerReported(start.worker, "next", report()))
    assert ends(out) == [("failed", "prefill", "worker_killer")]


def test_who_runs_alone_waits_until_its_worker_is_empty_and_the_worker_takes_nothing_new() -> None:
    bench = Bench()
    bench.list_workers(info("a", "decode"), info("b", "decode"), info("c", "decode"))
    for n in range(6):
        bench.feed(submitted(f"c/{n}"))
        bench.feed(ev.Accepted(n + 1))
    victims = [v.info.worker_id for v in bench.scheduler.workers()]
    evil = bench.feed(ev.WorkerReported(victims[0], "x", report()))
    moved = [c for c in evil if isinstance(c, cmd.StartDecode)]
    for start in moved:
        bench.feed(ev.Accepted(start.attempt))
    out = bench.feed(ev.WorkerReported(moved[0].worker, "x", report()))
    lonely = moved[0].choice
    assert lonely not in [c.choice for c in out if isinstance(c, cmd.StartDecode)]
    for command in out:
        if isinstance(command, cmd.StartDecode):
            bench.feed(ev.Accepted(command.attempt))
    assert bench.feed(submitted("late")) == []
    started = []
    for attempt in range(1, 40):
        out = bench.feed(ev.Ended(attempt))
        started += [c.choice for c in out if isinstance(c, cmd.StartDecode)]
    assert lonely in started
    assert "late" in started


def test_a_claim_moves_when_its_worker_goes_and_ends_with_the_choice() -> None:
    bench = Bench()
    bench.list_workers(*(info(name, "decode") for name in "abcd"))
    for n in range(8):
        bench.feed(submitted(f"c/{n}"))
        bench.feed(ev.Accepted(n + 1))
    for _ in range(2):
        victim = next(v for v in bench.scheduler.workers() if v.live and v.num_reservations)
        for c in bench.feed(ev.WorkerReported(victim.info.worker_id, "x", report())):
            if isinstance(c, cmd.StartDecode):
                bench.feed(ev.Accepted(c.attempt))
    waiting = bench.scheduler.choices_waiting
    claimed = bench.scheduler._t.claims
    assert list(claimed) == waiting[:1]
    bench.feed(ev.WorkerLeaving(next(iter(claimed.values())).id, "a-1"))
    bench.feed(ev.WorkerLeaving(claimed[waiting[0]].id, claimed[waiting[0]].incarnation))
    for choice in waiting:
        bench.feed(ev.ClientGone(choice))
    assert claimed == {}


# -- losses and our own bus


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
