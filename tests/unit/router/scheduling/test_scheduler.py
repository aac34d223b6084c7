"""The way of a choice when nothing breaks, and what may come late or out of turn."""

import pytest

from protocol.errors import LocalError
from protocol.handoff import KvHandle
from protocol.worker_info import EngineTraits
from router.scheduling import commands as cmd
from router.scheduling import events as ev
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


def test_a_long_prompt_is_prefilled_handed_over_and_decoded() -> None:
    bench = Bench()
    bench.pd()
    assert bench.feed(submitted()) == [cmd.StartPrefill(1, "c/0", "p", "p-1")]
    assert bench.feed(ev.Accepted(1)) == []
    lent = handle("p")
    assert bench.feed(ev.Prefilled(1, lent, ended=False)) == [
        cmd.ForgetAttempt(1, "p", "p-1"),
        cmd.StartDecode(2, "c/0", "d1", "d1-1", lent),
    ]
    assert bench.feed(ev.Accepted(2)) == []
    assert bench.feed(ev.DecodingStarted(2)) == [cmd.ReleaseHandle("p", "p-1", "h1")]
    assert bench.feed(ev.Ended(2)) == [
        cmd.ForgetAttempt(2, "d1", "d1-1"),
        cmd.EndChoice("c/0", "completed", "decode", ""),
    ]
    assert [view.num_reservations for view in bench.scheduler.workers()] == [0, 0]
    assert bench.scheduler.num_inflight == 0


def test_two_workers_are_charged_while_the_blocks_are_lent() -> None:
    bench = Bench()
    bench.pd()
    bench.feed(submitted(tokens=200, max_tokens=56))
    p, d = bench.scheduler.workers()
    assert (p.tokens, p.blocks, p.prefills) == (200, 13, 1)
    assert (d.blocks, d.running) == (0, 0)
    bench.feed(ev.Prefilled(1, handle("p"), ended=False))
    p, d = bench.scheduler.workers()
    assert (p.tokens, p.blocks, p.prefills) == (0, 13, 0)
    assert (d.tokens, d.blocks, d.running) == (0, 16, 1)
    bench.feed(ev.DecodingStarted(2))
    p, d = bench.scheduler.workers()
    assert (p.blocks, d.blocks) == (0, 16)


def test_a_choice_that_ends_with_its_first_token_needs_no_decode() -> None:
    bench = Bench()
    bench.pd()
    bench.feed(submitted())
    assert bench.feed(ev.Prefilled(1, handle("p"), ended=True)) == [
        cmd.ForgetAttempt(1, "p", "p-1"),
        cmd.EndChoice("c/0", "completed", "prefill", ""),
    ]


def test_a_short_prompt_is_prefilled_where_it_is_decoded() -> None:
    bench = Bench()
    bench.pd()
    assert bench.feed(submitted(tokens=64)) == [cmd.StartDecode(1, "c/0", "d1", "d1-1", None)]
    bench.feed(ev.Accepted(1))
    assert bench.scheduler.workers()[1].tokens == 64
    assert bench.feed(ev.DecodingStarted(1)) == []
    assert bench.scheduler.workers()[1].tokens == 0
    assert ends(bench.feed(ev.Ended(1))) == [("completed", "decode", "")]


def test_without_a_prefill_worker_the_decode_worker_prefills_and_it_is_counted() -> None:
    bench = Bench()
    bench.list_workers(info("d1", "decode"))
    assert bench.feed(submitted()) == [
        cmd.StartDecode(1, "c/0", "d1", "d1-1", None),
        cmd.Note("local_prefill", "no_prefill_worker", "d1", "c/0"),
    ]


def test_a_worker_of_both_roles_does_it_alone() -> None:
    bench = Bench()
    bench.list_workers(info("a"))
    assert bench.feed(submitted()) == [cmd.StartDecode(1, "c/0", "a", "a-1", None)]


def test_two_workers_of_both_roles_share_the_work() -> None:
    bench = Bench()
    bench.list_workers(info("a"), info("b"))
    starts = [only(bench.feed(submitted(f"c/{n}")), cmd.StartDecode) for n in range(6)]
    assert [s.worker for s in starts].count("a") == 3


def test_a_handle_that_comes_with_accepted_starts_the_decode_leg_at_once() -> None:
    traits = EngineTraits(handle="accepted")
    bench = Bench()
    bench.list_workers(info("p", "prefill", traits=traits), info("d", "decode", traits=traits))
    bench.feed(submitted())
    lent = handle("p")
    assert bench.feed(ev.Accepted(1, lent)) == [cmd.StartDecode(2, "c/0", "d", "d-1", lent)]
    assert bench.feed(ev.Prefilled(1, lent, ended=False)) == [cmd.ForgetAttempt(1, "p", "p-1")]
    assert bench.feed(ev.DecodingStarted(2)) == [cmd.ReleaseHandle("p", "p-1", "h1")]
    assert ends(bench.feed(ev.Ended(2))) == [("completed", "decode", "")]


@pytest.mark.parametrize("prefill_ends", [ev.Prefilled(1, None, ended=False), None])
def test_the_decode_leg_may_be_first_to_start(prefill_ends: ev.Prefilled | None) -> None:
    bench = Bench()
    bench.pd()
    bench.feed(submitted())
    bench.feed(ev.Accepted(1, handle("p")))
    assert bench.feed(ev.DecodingStarted(2)) == [cmd.ReleaseHandle("p", "p-1", "h1")]
    if prefill_ends is not None:
        assert bench.feed(prefill_ends) == [cmd.ForgetAttempt(1, "p", "p-1")]
    out = bench.feed(ev.Ended(2))
    cancels = [] if prefill_ends else [cmd.CancelAttempt(1, "p", "p-1")]
    assert out == [
        cmd.ForgetAttempt(2, "d1", "d1-1"),
        *cancels,
        cmd.EndChoice("c/0", "completed", "decode", ""),
    ]


def test_a_first_token_that_ends_the_choice_stops_the_decode_leg_that_started_early() -> None:
    bench = Bench()
    bench.pd()
    bench.feed(submitted())
    bench.feed(ev.Accepted(1, handle("p")))
    assert bench.feed(ev.Prefilled(1, None, ended=True)) == [
        cmd.ForgetAttempt(1, "p", "p-1"),
        cmd.CancelAttempt(2, "d1", "d1-1"),
        cmd.ReleaseHandle("p", "p-1", "h1"),
        cmd.EndChoice("c/0", "completed", "prefill", ""),
    ]


def test_an_early_decode_leg_outlives_the_end_of_its_prefill_attempt() -> None:
    bench = Bench()
    bench.pd()
    bench.feed(submitted())
    bench.feed(ev.Accepted(1, handle("p")))
    bench.feed(ev.DecodingStarted(2))
    failed = ev.AttemptFailed(1, "prefill", "invalid_request", "no")
    assert bench.feed(failed) == [cmd.ForgetAttempt(1, "p", "p-1")]
    assert ends(bench.feed(ev.Ended(2))) == [("completed", "decode", "")]


def test_an_early_decode_leg_dies_with_its_prefill_attempt() -> None:
    bench = Bench()
    bench.pd(2)
    bench.feed(submitted())
    bench.feed(ev.Accepted(1, handle("p")))
    out = bench.feed(ev.AttemptFailed(1, "prefill", "engine", "boom"))
    assert without_notes(out)[:3] == [
        cmd.ForgetAttempt(1, "p", "p-1"),
        cmd.CancelAttempt(2, "d1", "d1-1"),
        cmd.ReleaseHandle("p", "p-1", "h1"),
    ]
    assert only(out, cmd.StartDecode).handle is None


def test_an_end_without_a_start_of_decoding_is_an_end() -> None:
    bench = Bench()
    bench.pd()
    bench.to_transfer()
    assert bench.feed(ev.Ended(2)) == [
        cmd.ForgetAttempt(2, "d1", "d1-1"),
        cmd.ReleaseHandle("p", "p-1", "h-c/0"),
        cmd.EndChoice("c/0", "completed", "decode", ""),
    ]


@pytest.mark.parametrize(
    ("phase", "expected", "leg"),
    [
        (0, [cmd.CancelAttempt(1, "p", "p-1")], "prefill"),
        (
            1,
            [cmd.CancelAttempt(2, "d1", "d1-1"), cmd.ReleaseHandle("p", "p-1", "h1")],
            "transfer",
        ),
        (2, [cmd.CancelAttempt(2, "d1", "d1-1")], "decode"),
    ],
)
def test_a_client_that_goes_frees_everything_in_every_phase(
    phase: int, expected: list[cmd.Command], leg: cmd.EndLeg
) -> None:
    bench = Bench()
    bench.pd()
    steps: list[ev.Event] = [
        submitted(),
        ev.Prefilled(1, handle("p"), ended=False),
        ev.DecodingStarted(2),
    ]
    for step in steps[: phase + 1]:
        bench.feed(step)
    out = bench.feed(ev.ClientGone("c/0"))
    assert out == [*expected, cmd.EndChoice("c/0", "cancelled", leg, "cancelled")]
    assert bench.feed(ev.ClientGone("c/0")) == []
    assert all(view.num_reservations == 0 for view in bench.scheduler.workers())


def test_a_client_that_goes_while_it_waits_leaves_the_queues() -> None:
    bench = Bench()
    bench.pd(running=1)
    bench.feed(submitted("c/0"))
    bench.feed(submitted("c/1"))
    assert ends(bench.feed(ev.ClientGone("c/1"))) == [("cancelled", "queue", "cancelled")]
    bench.feed(ev.WorkerLeaving("d1", "d1-1"))
    assert without_notes(bench.feed(ev.Prefilled(1, handle("p"), ended=False))) == [
        cmd.ForgetAttempt(1, "p", "p-1")
    ]
    assert bench.feed(ev.ClientGone("c/0")) == [
        cmd.ReleaseHandle("p", "p-1", "h1"),
        cmd.EndChoice("c/0", "cancelled", "transfer", "cancelled"),
    ]


@pytest.mark.parametrize(
    "event",
    [
        ev.Accepted(1),
        ev.Accepted(1, handle("p")),
        ev.Refused(1, ""),
        ev.Progressed(1),
        ev.Prefilled(1, handle("p"), ended=False),
        ev.DecodingStarted(1),
        ev.Ended(1),
        ev.AttemptFailed(1, "prefill", "engine", ""),
        ev.GapSeen("p", "p-0"),
    ],
)
def test_what_is_late_changes_nothing(event: ev.Event) -> None:
    bench = Bench()
    bench.pd()
    bench.to_transfer()
    before = bench.scheduler.story("c/0"), bench.scheduler.workers()
    assert [kind for kind, _ in notes(bench.feed(event))] == ["late"]
    assert before == (bench.scheduler.story("c/0"), bench.scheduler.workers())


def test_events_of_the_wrong_leg_are_ignored() -> None:
    bench = Bench()
    bench.pd()
    bench.feed(submitted("c/0"))
    assert notes(bench.feed(ev.DecodingStarted(1))) == [("late", "decoding_started")]
    bench.feed(submitted("c/1", tokens=16))
    assert notes(bench.feed(ev.Prefilled(2, None, ended=False))) == [("late", "prefilled")]
    assert ends(bench.feed(ev.Ended(1))) == [("completed", "prefill", "")]


def test_a_choice_submitted_twice_is_our_own_bug() -> None:
    bench = Bench()
    bench.pd()
    bench.feed(submitted())
    with pytest.raises(LocalError, match="twice"):
        bench.feed(submitted())


def test_the_story_tells_what_happened_also_when_it_is_over() -> None:
    bench = Bench()
    bench.pd()
    bench.to_decoding()
    bench.feed(ev.Ended(2))
    assert [what for _, what in bench.scheduler.story("c/0")] == [
        "submitted", "start_prefill p", "accepted p", "prefilled p", "lend p", "start_pull d1",
        "accepted d1", "decode d1", "end completed",
    ]  # fmt: skip
    assert bench.scheduler.story("never") == []


def test_the_past_is_bounded() -> None:
    bench = Bench()
    for n in range(1030):
        bench.feed(submitted(f"c/{n}"))
    assert bench.scheduler.story("c/0") == []
    assert bench.scheduler.story("c/1029") != []


def test_models_say_who_could_serve_them() -> None:
    bench = Bench()
    bench.pd(2)
    bench.feed(ev.WorkerLeaving("d1", "d1-1"))
    view = bench.scheduler.models()["m"]
    assert (view.prefill, view.decode, view.listed) == (1, 1, 3)
    assert [v.draining for v in bench.scheduler.workers()] == [False, True, False]


def test_handles_are_renewed_every_third_of_a_lease_in_one_command_per_worker() -> None:
    bench = Bench()
    bench.pd()
    for choice in ("c/0", "c/1"):
        bench.feed(ev.Accepted(bench.to_transfer(choice)[1].attempt))
    out = [c for c in bench.pass_time(21) if isinstance(c, cmd.RenewHandles)]
    assert out == [cmd.RenewHandles("p", "p-1", ["h-c/0", "h-c/1"])] * 2
    bench.feed(ev.ClientGone("c/0"))
    bench.feed(ev.ClientGone("c/1"))
    assert not [c for c in bench.pass_time(21) if isinstance(c, cmd.RenewHandles)]


def test_a_shorter_lease_is_renewed_sooner() -> None:
    bench = Bench()
    bench.pd()
    bench.to_transfer("c/0")
    bench.feed(submitted("c/1"))
    short: KvHandle = handle("p", "short", lease_s=3.0)
    bench.feed(ev.Prefilled(3, short, ended=False))
    out = [c for c in bench.pass_time(1.5) if isinstance(c, cmd.RenewHandles)]
    assert out == [cmd.RenewHandles("p", "p-1", ["h-c/0", "short"])]
