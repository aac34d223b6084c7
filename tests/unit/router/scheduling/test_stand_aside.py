"""A choice that only itself keeps from starting holds up neither the others nor itself for long."""

from router.scheduling import commands as cmd
from router.scheduling import events as ev
from router.scheduling.attempts import FREE_SHARE, LOOKS
from router.scheduling.limits import Limits
from router.scheduling.policy import Want, others
from router.scheduling.scheduler import Scheduler
from tests.unit.router.scheduling.bench import (
    Bench,
    ends,
    failed,
    handle,
    info,
    notes,
    only,
    report,
    submitted,
)

LONGEST_S = 2.0 * 1.5
"""A pause with the worst of luck."""


def starts(commands: list[cmd.Command]) -> dict[str, str]:
    """Choice -> worker, of those that decode."""
    return {c.choice: c.worker for c in commands if isinstance(c, cmd.StartDecode)}


def settled(bench: Bench, commands: list[cmd.Command]) -> list[cmd.Command]:
    """What was started decodes from now on, without trouble."""
    for start in [c for c in commands if isinstance(c, cmd.StartDecode)]:
        bench.feed(ev.DecodingStarted(start.attempt))
        bench.heard[start.attempt] = bench.now + 1000
    return commands


def full_beside_empty(bench: Bench, *, places: int = 2) -> tuple[str, str]:
    """c/0 has been failed by the worker named first, which is empty now; the other one is full."""
    bench.list_workers(info("d1", running=places), info("d2", running=places))
    start = bench.to_decoding_local("c/0")
    other = {"d1": "d2", "d2": "d1"}[start.worker]
    for number in range(2 * places - 1):
        bench.to_decoding_local(f"f/{number}")
    out = bench.feed(failed(start.attempt, "engine"))
    assert starts(out) == {}
    for number, attempt in [(c.id, c.decode) for c in bench.scheduler._t.choices.values()]:
        if attempt is not None and attempt.worker.id == start.worker:
            bench.feed(ev.Ended(attempt.id))
            assert number != "c/0"
    return start.worker, other


def test_who_has_failed_it_is_passed_over_while_others_may_get_room() -> None:
    bench = Bench()
    _, other = full_beside_empty(bench)
    [busy] = [c.decode for c in bench.scheduler._t.choices.values() if c.id == "f/0"]
    assert busy is not None
    done = next(
        c.decode
        for c in bench.scheduler._t.choices.values()
        if c.decode is not None and c.decode.worker.id == other
    )
    bench.feed(ev.Ended(done.id))
    assert starts(bench.pass_time(LONGEST_S)) == {"c/0": other}


def test_an_idle_worker_gets_it_back_before_it_would_wait_for_ever() -> None:
    bench = Bench()
    failing, _ = full_beside_empty(bench)
    assert starts(bench.pass_time(0.2)) == {}, "not at once: the worker may be broken"
    assert starts(bench.pass_time(LOOKS * LONGEST_S)) == {"c/0": failing}


def test_it_does_not_hold_up_those_behind_it() -> None:
    bench = Bench()
    failing, _ = full_beside_empty(bench)
    assert starts(bench.feed(submitted("new"))) == {"new": failing}


def test_who_was_only_silent_takes_back_at_once_what_it_had() -> None:
    """Two workers with eight places, six streams each: one is away for three seconds."""
    bench = Bench()
    bench.list_workers(info("d1", "decode"), info("d2", "decode"))
    for number in range(12):
        bench.to_decoding_local(f"c/{number}")
        bench.output[f"c/{number}"] = 5
    moved = starts(settled(bench, bench.pass_time(2.6, "d1")))
    assert set(moved.values()) == {"d2"}
    assert len(moved) == 2
    out = settled(bench, bench.feed(ev.WorkerReported("d1", "d1-1", report())))
    out += bench.pass_time(0.9)
    assert list(starts(out).values()) == ["d1"] * 4
    assert starts(bench.feed(submitted("new"))) == {"new": "d1"}
    assert ends(out) == []


def test_who_failed_it_and_was_silent_later_is_passed_over_still() -> None:
    bench = Bench()
    bench.list_workers(info("d1"), info("d2"), info("d3"))
    start = bench.to_decoding_local("c/0")
    settled(bench, bench.feed(failed(start.attempt, "engine")))
    out = bench.pass_time(3.0, start.worker) + bench.report_all()
    assert ("silent", "silent") in notes(out)
    assert ("live", "reported") in notes(out)
    assert bench.scheduler._t.choices["c/0"].tries.excluded == {start.incarnation}


def test_a_handle_goes_back_to_a_puller_that_failed_if_the_others_have_no_room() -> None:
    bench = Bench()
    bench.list_workers(info("p", "prefill"))
    bench.list_workers(info("d1", "decode", running=1), info("d2", "decode", running=1))
    start = bench.to_decoding("f/0")
    pull = bench.to_transfer("c/0")[1]
    assert pull.worker != start.worker
    assert starts(bench.feed(failed(pull.attempt, "engine"))) == {}
    again = next(c for c in bench.pass_time(LOOKS * LONGEST_S) if isinstance(c, cmd.StartDecode))
    assert (again.worker, again.handle) == (pull.worker, pull.handle)


def test_what_no_prefill_worker_can_take_is_prefilled_where_it_decodes() -> None:
    bench = Bench()
    bench.list_workers(info("p", "prefill", context=4096), info("d", "decode"))
    out = bench.feed(submitted("long", tokens=5000))
    assert starts(out) == {"long": "d"}
    assert ("local_prefill", "no_prefill_worker") in notes(out)
    assert only(bench.feed(submitted("short")), cmd.StartPrefill).worker == "p"


def test_what_is_too_large_for_all_who_are_here_waits_for_who_is_away() -> None:
    """The only large worker has died under a long stream: two small ones serve the others."""
    bench = Bench(Limits(queue_timeout_s=30.0))
    bench.list_workers(info("large", context=100_000))
    start = only(bench.feed(submitted("long", tokens=20_000)), cmd.StartDecode)
    bench.feed(ev.DecodingStarted(start.attempt))
    bench.output["long"] = 9
    bench.list_workers(info("d1"), info("d2"))
    out = bench.pass_time(4.0, "large")
    assert ("resume", "silent") in notes(out)
    assert "short" in starts(settled(bench, bench.feed(submitted("short"))))
    assert bench.scheduler.num_queued == 1
    bench.feed(ev.WorkerReported("large", "large-1", report()))
    assert starts(bench.pass_time(LONGEST_S)) == {"long": "large"}


def test_it_ends_with_its_deadline_if_nobody_large_comes() -> None:
    bench = Bench(Limits(queue_timeout_s=30.0))
    bench.list_workers(info("large", context=100_000), info("d1"))
    start = only(bench.feed(submitted("long", tokens=20_000)), cmd.StartDecode)
    bench.feed(ev.DecodingStarted(start.attempt))
    out = bench.pass_time(40.0, "large")
    assert ends(out) == [("expired", "queue", "queue_timeout")]


def test_a_handle_that_is_too_large_for_all_who_are_here_holds_up_no_other() -> None:
    bench = Bench()
    size: dict[str, int] = {"context": 100_000, "blocks": 100_000, "running": 50}
    bench.list_workers(info("p", "prefill", **size), info("large", "decode", **size))
    bench.list_workers(info("d1", "decode"))
    for number in range(40):
        assert bench.to_transfer(f"long/{number}", tokens=9000)[1].worker == "large"
    out = bench.pass_time(2.7, "large")
    assert bench.scheduler._t.fleet.workers["p"].handles, "it may be back in a moment"
    out += bench.pass_time(LOOKS * LONGEST_S, "large")
    assert ("resume", "too_large") not in notes(out)
    assert notes(out).count(("retry", "too_large")) == 40
    assert bench.scheduler.num_queued == 40, "they wait without blocks"
    assert bench.to_transfer("short")[1].worker == "d1"


def test_a_handle_is_kept_while_the_only_large_worker_is_suspected() -> None:
    bench = Bench()
    size: dict[str, int] = {"context": 100_000, "blocks": 100_000, "running": 50}
    bench.list_workers(info("p", "prefill", **size), info("large", "decode", **size))
    bench.list_workers(info("d1", "decode"))
    pulls = [bench.to_transfer(f"long/{n}", tokens=9000)[1] for n in range(4)]
    for pull in pulls[2:]:
        bench.feed(ev.Accepted(pull.attempt))
        bench.heard[pull.attempt] = bench.now + 1000
    out = bench.pass_time(1.1)
    assert ("suspected", "accept_timeout") in notes(out)
    for _ in range(40):
        out += settled(bench, bench.pass_time(0.1))
    again = [c for c in out if isinstance(c, cmd.StartDecode)]
    assert {c.choice for c in again} == {"long/0", "long/1"}
    assert all(c.worker == "large" and c.handle is not None for c in again)
    assert not any(isinstance(c, cmd.StartPrefill | cmd.ReleaseHandle) for c in out)


def test_a_large_worker_that_comes_and_goes_is_not_prefilled_for_without_end() -> None:
    bench = Bench()
    size: dict[str, int] = {"context": 100_000, "blocks": 100_000}
    bench.list_workers(info("p", "prefill", **size), info("d1", "decode"))
    started: list[int] = []

    def pass_time(seconds: float) -> list[cmd.Command]:
        """Prefills are accepted, and take their time."""
        out: list[cmd.Command] = []
        for _ in range(int(seconds / 0.25)):
            out += bench.pass_time(0.25)
            for start in [c for c in said + out if isinstance(c, cmd.StartPrefill)]:
                if start.attempt not in started:
                    started.append(start.attempt)
                    bench.feed(ev.Accepted(start.attempt))
        return out

    said: list[cmd.Command] = []
    for life in range(60):
        incarnation = f"large-{life}"
        bench.list_workers(info("large", "decode", incarnation=incarnation, **size))
        said += bench.feed(submitted("long", tokens=9000)) if life == 0 else []
        said += pass_time(3.5)
        bench.feed(ev.WorkerUnlisted("large", incarnation))
        bench.feed(ev.WorkerLeaving("large", incarnation))
        del bench.incarnations["large"]
        for number in set(started) & bench.scheduler._t.attempts.keys():
            said += bench.feed(ev.Prefilled(number, handle("p", f"h{life}"), ended=False))
        said += pass_time(8.0)
        if ends(said):
            break
    assert ends(said) == [("failed", "transfer", "attempts_exhausted")]
    limits = bench.scheduler._t.limits
    most = (FREE_SHARE + 1) * limits.max_attempts
    assert notes(said).count(("retry", "too_large")) == most - 1
    assert len(started) == most


def test_one_that_waits_for_ever_to_look_again_does_so_at_a_bounded_pace() -> None:
    bench = Bench(Limits(queue_timeout_s=100_000.0))
    bench.list_workers(info("large", context=100_000), info("d1"))
    bench.pass_time(3.0, "large")
    bench.feed(submitted("long", tokens=20_000))
    bench.scheduler._t.choices["long"].tries.looks = 5000
    bench.pass_time(30.0, "large")
    assert "short" in starts(settled(bench, bench.feed(submitted("short"))))


def test_one_that_waits_for_the_large_worker_lets_others_pass_for_a_while() -> None:
    """For a while: what is short could otherwise always be faster than what is long."""
    bench = Bench()
    bench.list_workers(info("large", "decode", context=100_000, running=1))
    bench.list_workers(info("d1", "decode", running=20))
    first = only(bench.feed(submitted("first", tokens=20_000)), cmd.StartDecode)
    settled(bench, [first])
    assert starts(bench.feed(submitted("long", tokens=20_000))) == {}
    assert starts(settled(bench, bench.feed(submitted("short")))) == {"short": "d1"}
    bench.pass_time(LOOKS * LONGEST_S)
    assert starts(bench.feed(submitted("late"))) == {}, "now it is the long one's turn"
    out = bench.feed(ev.Ended(first.attempt))
    assert starts(out) == {"long": "large", "late": "d1"}


def test_the_one_large_worker_is_found_among_many_small_ones() -> None:
    bench = Bench()
    bench.list_workers(*(info(f"s{n}") for n in range(40)), info("large", context=100_000))
    out = bench.feed(submitted("long", tokens=20_000))
    assert only(out, cmd.StartDecode).worker == "large"


def test_a_handle_is_pulled_by_the_one_large_worker_among_many() -> None:
    bench = Bench()
    size: dict[str, int] = {"context": 100_000, "blocks": 100_000}
    bench.list_workers(*(info(f"s{n}", "decode") for n in range(40)), info("p", "prefill", **size))
    bench.list_workers(info("large", "decode", **size))
    assert bench.to_transfer("long", tokens=20_000)[1].worker == "large"


def test_what_fits_a_decode_worker_only_without_a_first_token_is_prefilled_there() -> None:
    bench = Bench()
    bench.list_workers(info("p", "prefill", context=100_000), info("d", "decode", context=4096))
    assert starts(bench.feed(submitted("whole", tokens=4095))) == {"whole": "d"}
    assert only(bench.feed(submitted("less", tokens=4094)), cmd.StartPrefill).worker == "p"


def test_two_lost_pulls_of_before_do_not_throw_a_good_handle_away() -> None:
    """Only whom all have failed does without the wire."""
    bench = Bench()
    bench.list_workers(info("p", "prefill"))
    bench.list_workers(info("d1", "decode", running=1), info("d2", "decode", running=1))
    settled(bench, [bench.to_transfer("f/0")[1]])
    pull = bench.to_transfer("c/0")[1]
    bench.scheduler._t.choices["c/0"].tries.lost_pulls = 2
    bench.feed(failed(pull.attempt, "engine"))
    out = bench.pass_time(LOOKS * LONGEST_S)
    again = next(c for c in out if isinstance(c, cmd.StartDecode))
    assert (again.worker, again.handle) == (pull.worker, pull.handle)


def test_those_who_stand_aside_count_as_waiting() -> None:
    bench = Bench(Limits(max_queue=3))
    bench.list_workers(info("large", context=100_000), info("d1", running=1))
    bench.pass_time(3.0, "large")
    bench.to_decoding_local("f/0")
    codes = [ends(bench.feed(submitted(f"long/{n}", tokens=20_000))) for n in range(5)]
    assert codes == [[]] * 3 + [[("rejected", "queue", "queue_full")]] * 2


def test_what_runs_ends_when_the_bus_stays_away() -> None:
    bench = Bench(Limits(outage_timeout_s=60.0))
    bench.pd(3)
    bench.to_decoding("c/0")
    prefill = only(bench.feed(submitted("c/1")), cmd.StartPrefill)
    bench.feed(ev.Accepted(prefill.attempt, handle("p", "h2")))
    bench.feed(ev.BusDown())
    assert ends(bench.pass_time(59.0, "*")) == []
    out = bench.pass_time(2.0, "*")
    assert sorted(ends(out)) == [
        ("expired", "decode", "outage_timeout"),
        ("expired", "transfer", "outage_timeout"),
    ]
    assert bench.scheduler.num_inflight == 0
    assert bench.scheduler.next_deadline() is None
    bench.feed(ev.BusUp())
    bench.report_all()
    assert only(bench.feed(submitted("c/2")), cmd.StartPrefill).worker == "p"


def test_a_bus_that_comes_back_in_time_ends_nothing() -> None:
    bench = Bench(Limits(outage_timeout_s=60.0))
    bench.pd(1)
    bench.to_decoding("c/0")
    for _ in range(3):
        bench.feed(ev.BusDown())
        assert ends(bench.pass_time(59.0, "*")) == []
        bench.feed(ev.BusUp())
        bench.report_all()
        bench.heard.update(dict.fromkeys(bench.heard, bench.now))
    assert bench.scheduler.num_inflight == 1


def test_a_scheduler_has_no_timer_of_an_outage_before_one() -> None:
    bench = Bench()
    assert isinstance(bench.scheduler, Scheduler)
    assert bench.scheduler.next_deadline() is None


def test_who_stood_aside_is_in_front_again() -> None:
    """Those who came meanwhile have passed; the whole queue must not."""
    bench = Bench()
    bench.list_workers(info("large", "decode", context=100_000, running=1))
    bench.list_workers(info("d1", "decode", running=1))
    settled(bench, bench.feed(submitted("first", tokens=20_000)))
    bench.feed(submitted("long", tokens=20_000))
    settled(bench, bench.feed(submitted("passes")))
    for number in range(3):
        bench.feed(submitted(f"late/{number}"))
    bench.pass_time(LONGEST_S)
    [lane] = bench.scheduler._t.admission.lanes("m")
    assert list(lane.fresh) == ["long", "late/0", "late/1", "late/2"]


def test_nobody_looks_at_all_workers_where_all_are_of_a_size() -> None:
    bench = Bench()
    bench.list_workers(*(info(f"d{n}", "decode") for n in range(40)))
    [group] = bench.scheduler._t.fleet.models["m"].groups.values()
    for tokens, expected in ((10, 0), (8191, 0), (9000, 0)):
        want = Want(tokens, 0, 0, 16, set(), [], 4)
        assert len(others(group.decode, want, {})) == expected
    bench.list_workers(info("large", "decode", context=10_000))
    for tokens, expected in ((10, 0), (8191, 0), (8192, 41), (9999, 41), (10_000, 0)):
        want = Want(tokens, 0, 0, 16, set(), [], 4)
        assert len(others(group.decode, want, {})) == expected
