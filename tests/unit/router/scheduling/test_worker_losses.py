"""Every way a worker can be lost, doubted and heard again."""

from router.scheduling import commands as cmd
from router.scheduling import events as ev
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


def test_streams_of_an_engine_that_stands_still_move_though_its_process_answers() -> None:
    """What it answers is no token: whoever believes it waits for ever."""
    bench = Bench()
    bench.pd(2)
    start = bench.to_decoding()
    bench.output["c/0"] = 3
    stands = report(running=1, steps=5)
    out: list[cmd.Command] = []
    began = bench.now
    while not any(isinstance(one, cmd.StartPrefill) for one in out):
        assert bench.now < began + 12
        bench.now += 0.5
        for worker, incarnation in bench.incarnations.items():
            load = stands if worker == start.worker else report()
            out += bench.feed(ev.WorkerReported(worker, incarnation, load))
        due = bench.scheduler.next_deadline()
        if due is not None and due <= bench.now:
            out += bench.feed(ev.Ticked())
        if any(isinstance(one, cmd.AskReplay) for one in out):
            bench.feed(ev.DecodingStarted(start.attempt))
    assert ("resume", "no_steps") in notes(out)
    assert cmd.CancelAttempt(start.attempt, start.worker, start.incarnation) in out


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
