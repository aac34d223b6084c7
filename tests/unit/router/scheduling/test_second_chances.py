"""Every failure code: what a choice may try next, and when it has tried enough."""

import pytest

from protocol.out import FailureCode
from protocol.worker_info import EngineTraits
from router.scheduling import commands as cmd
from router.scheduling import events as ev
from router.scheduling.attempts import FREE_SHARE
from router.scheduling.limits import Limits
from tests.unit.router.scheduling.bench import (
    Bench,
    ends,
    failed,
    handle,
    info,
    notes,
    only,
    submitted,
    without_notes,
)


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


def test_who_could_not_pull_from_a_lost_source_has_not_failed() -> None:
    """Else one death excludes two workers, and the next choice of a worker is among the others."""
    bench = Bench()
    bench.pd(1)
    bench.to_transfer()
    bench.feed(ev.WorkerUnreachable("p", "p-1"))
    bench.feed(failed(2, "transfer_failed"))
    assert bench.scheduler._t.choices["c/0"].tries.excluded == set()


def test_who_could_not_pull_from_a_source_that_pulls_made_suspect_has_failed() -> None:
    """It may be the wire: the choice shall meet other workers, until it does without the wire."""
    bench = Bench()
    bench.pd(3)
    bench.to_transfer("c/0")
    start = bench.to_transfer("c/1")[1]
    again = only(bench.feed(failed(2, "transfer_failed")), cmd.StartDecode)
    out = bench.feed(failed(again.attempt, "transfer_failed"))
    assert ("suspected", "not_pulled") in notes(out)
    bench.feed(failed(start.attempt, "transfer_failed"))
    assert bench.scheduler._t.choices["c/1"].tries.excluded == {start.incarnation}


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


def test_a_source_that_nobody_can_pull_from_gets_no_new_prefills_for_a_while() -> None:
    """One wire is cut: the choices after the first need not find out again, each for itself."""
    bench = Bench()
    bench.list_workers(info("q", "prefill"))
    bench.pd(3)
    bench.to_transfer()
    source = bench.scheduler.story("c/0")[1][1].split()[1]
    other = {"p": "q", "q": "p"}[source]
    bench.feed(failed(2, "transfer_failed"))
    views = {view.info.worker_id: view for view in bench.scheduler.workers()}
    assert not views[source].suspected
    out = bench.feed(failed(3, "transfer_failed"))
    assert ("suspected", "not_pulled") in notes(out)
    given = [only(bench.feed(submitted(f"new/{n}")), cmd.StartPrefill).worker for n in range(6)]
    assert given == [other] * 6
    bench.pass_time(1.0)
    views = {view.info.worker_id: view for view in bench.scheduler.workers()}
    assert views[source].eligible, "every suspicion ends"


def test_a_choice_whose_pulls_have_failed_everywhere_is_prefilled_where_it_decodes() -> None:
    """The workers live, so it is served, whatever the wire between them does."""
    bench = Bench()
    bench.pd(2)
    bench.to_transfer()
    bench.feed(failed(2, "transfer_failed"))
    assert without_notes(bench.feed(failed(3, "transfer_failed")))[-1] == cmd.ReleaseHandle(
        "p", "p-1", "h-c/0"
    )
    out = bench.pass_time(1.0)
    start = only(out, cmd.StartDecode)
    assert (start.attempt, start.handle) == (4, None)
    assert ("local_prefill", "transfer_failed") in notes(out)


def test_a_handle_that_one_decode_worker_cannot_pull_twice_is_given_back() -> None:
    bench = Bench()
    bench.pd()
    start = bench.to_transfer()[1]
    bench.feed(failed(2, "transfer_failed"))
    assert only(bench.pass_time(0.5), cmd.StartDecode).handle == start.handle
    bench.feed(failed(3, "transfer_failed"))
    assert only(bench.pass_time(1.0), cmd.StartDecode).handle is None


def test_a_handle_that_waits_for_workers_that_failed_it_is_not_pulled_again() -> None:
    """Its choice has lost two pulls before, of another source."""
    bench = Bench()
    bench.list_workers(info("q", "prefill"))
    bench.pd(3)
    bench.to_transfer()
    bench.feed(failed(2, "transfer_failed"))
    again = only(bench.feed(failed(3, "transfer_failed")), cmd.StartPrefill)
    given = handle(again.worker, "h2")
    pull = only(bench.feed(ev.Prefilled(again.attempt, given, ended=False)), cmd.StartDecode)
    bench.feed(failed(pull.attempt, "transfer_failed"))
    out = bench.pass_time(2.0)
    assert cmd.ReleaseHandle(again.worker, again.incarnation, "h2") in out
    assert only(out, cmd.StartDecode).handle is None


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


def refused_for_ever(bench: Bench, out: list[cmd.Command]) -> list[float]:
    """Until the client is told: when each of the workers was asked."""
    asked: list[float] = []
    while not ends(out):
        starts = [c for c in out if isinstance(c, cmd.StartDecode)]
        asked += [bench.now] * len(starts)
        out = [o for start in starts for o in bench.feed(ev.Refused(start.attempt, "full"))]
        out = out or bench.pass_time(0.1)
    assert len(ends(out)) == 1
    asked.append(bench.now)
    return asked


def test_whom_all_refuse_waits_as_long_as_in_the_queue_and_asks_at_a_bounded_pace() -> None:
    bench = Bench(Limits(queue_timeout_s=30.0))
    bench.list_workers(*(info(f"w{n}") for n in range(30)))
    asked = refused_for_ever(bench, bench.feed(submitted()))
    assert 29.9 < asked[-1] - asked[0] < 30.5
    assert 10 < len(asked) < 50
    assert bench.scheduler.past("c/0").story[-1][1:] == ("end", "queue_timeout")


def test_a_handle_that_all_refuse_to_pull_waits_no_longer_than_one_that_finds_no_place() -> None:
    bench = Bench(Limits(decode_wait_timeout_s=12.0))
    bench.pd(2)
    pull = bench.to_transfer()[1]
    asked = refused_for_ever(bench, [pull])
    assert 11.9 < asked[-1] - asked[0] < 12.5
    assert bench.scheduler.past("c/0").story[-1][1:] == ("end", "decode_wait_timeout")


def test_whom_all_have_refused_for_a_while_is_taken_by_the_first_that_does() -> None:
    bench = Bench()
    bench.list_workers(info("a"))
    out = bench.feed(submitted())
    for number in range(8):
        start = only(out, cmd.StartDecode)
        tries = bench.scheduler._t.choices["c/0"].tries
        assert (tries.charged, tries.refusals) == (0, number)
        bench.feed(ev.Refused(start.attempt, "full"))
        out = []
        while not any(isinstance(c, cmd.StartDecode) for c in out):
            out = bench.pass_time(0.1)
    bench.feed(ev.Accepted(only(out, cmd.StartDecode).attempt))
    assert tries.refusals == 0


def test_refused_pulls_of_handles_that_are_good_for_one_pull_are_bounded() -> None:
    """Each of them costs a prefill."""
    bench = Bench()
    once = EngineTraits(release="timeout")
    bench.list_workers(info("p", "prefill", traits=once), info("d", "decode"))
    out = bench.feed(submitted())
    num_prefills = 0
    while not ends(out):
        said: list[cmd.Command] = []
        for start in out:
            if isinstance(start, cmd.StartPrefill):
                num_prefills += 1
                bench.feed(ev.Accepted(start.attempt))
                name = f"h{num_prefills}"
                said += bench.feed(ev.Prefilled(start.attempt, handle("p", name), ended=False))
            elif isinstance(start, cmd.StartDecode):
                said += bench.feed(ev.Refused(start.attempt, "full"))
        out = said or bench.pass_time(0.1)
    assert ends(out) == [("failed", "transfer", "attempts_exhausted")]
    assert num_prefills <= (FREE_SHARE + 1) * bench.scheduler._t.limits.max_attempts


def test_a_refusal_after_a_while_of_work_waits_as_long_as_any() -> None:
    bench = Bench(Limits(queue_timeout_s=30.0))
    bench.list_workers(info("a"))
    start = only(bench.feed(submitted()), cmd.StartDecode)
    bench.feed(ev.Refused(start.attempt, "full"))
    start = only(bench.pass_time(0.3), cmd.StartDecode)
    bench.feed(ev.DecodingStarted(start.attempt))
    bench.heard[start.attempt] = bench.now + 1000.0
    bench.pass_time(60.0)
    bench.feed(ev.Refused(start.attempt, "full"))
    assert ends(bench.pass_time(25.0, "a")) == []


def test_who_takes_a_job_and_refuses_it_then_has_failed() -> None:
    bench = Bench()
    bench.list_workers(info("a"), info("b"))
    start = only(bench.feed(submitted()), cmd.StartDecode)
    bench.feed(ev.Accepted(start.attempt))
    again = only(bench.feed(ev.Refused(start.attempt, "full")), cmd.StartDecode)
    assert again.worker != start.worker
    tries = bench.scheduler._t.choices["c/0"].tries
    assert (tries.charged, tries.excluded) == (1, {start.incarnation})


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
    out = bench.feed(failed(1, "lease_lost"))
    assert only(out, cmd.StartDecode).choice == "c/0"
    bench.feed(ev.Accepted(4))
    assert len(bench.feed(failed(2, "lease_lost"))) == 2
    assert only(bench.feed(submitted("c/3")), cmd.StartDecode).choice == "c/3"
    bench.feed(ev.Accepted(5))
    bench.feed(submitted("c/4"))
    assert without_notes(bench.pass_time(9)) == []
    bench.feed(ev.Ended(4))
    assert [c.choice for c in bench.pass_time(2) if isinstance(c, cmd.StartDecode)] == ["c/1"]


def starts(out: list[cmd.Command]) -> list[str]:
    return sorted(command.choice for command in out if isinstance(command, cmd.StartDecode))


def test_a_full_batch_of_a_lost_worker_starts_again_at_once_whatever_the_budget() -> None:
    bench = Bench(Limits(retry_floor=1, retry_share=0.0))
    bench.list_workers(info("a", running=64), info("b", running=64))
    lost = []
    for n in range(12):
        start = only(bench.feed(submitted(f"c/{n}")), cmd.StartDecode)
        bench.feed(ev.Accepted(start.attempt))
        bench.feed(ev.DecodingStarted(start.attempt))
        lost += [start.choice] if start.worker == "a" else []
    assert len(lost) > 3
    assert starts(bench.feed(ev.WorkerListed(info("a", incarnation="a-2")))) == sorted(lost)


def test_messages_that_the_bus_lost_take_nothing_of_the_budget() -> None:
    bench = Bench(Limits(retry_floor=1, retry_share=0.0))
    bench.list_workers(info("a", running=64))
    for n in range(6):
        bench.feed(submitted(f"c/{n}"))
    again = [starts(bench.feed(failed(n + 1, "unknown_attempt"))) for n in range(6)]
    assert again == [[f"c/{n}"] for n in range(6)]


def test_pulls_over_a_wire_that_is_cut_take_nothing_of_the_budget() -> None:
    """Everybody who pulls from one source loses it at once, from every decode worker in turn."""
    bench = Bench(Limits(retry_floor=1, retry_share=0.0))
    bench.pd(2)
    pulls = [bench.to_transfer(f"c/{n}")[1] for n in range(6)]
    again = [
        only(bench.feed(failed(pull.attempt, "transfer_failed")), cmd.StartDecode) for pull in pulls
    ]
    for pull in again:
        bench.feed(failed(pull.attempt, "transfer_failed"))
    started = bench.pass_time(0.9)
    local = [c.choice for c in started if isinstance(c, cmd.StartDecode) and c.handle is None]
    assert sorted(local) == [f"c/{n}" for n in range(6)]


def test_a_worker_that_refuses_takes_from_the_budget() -> None:
    bench = Bench(Limits(retry_floor=1, retry_share=0.0))
    bench.list_workers(info("a"))
    for n in range(3):
        bench.feed(submitted(f"c/{n}"))
    for n in range(3):
        bench.feed(ev.Refused(n + 1, "full"))
    assert starts(bench.pass_time(1)) == ["c/0"]
