"""What a client is told at once, what waits in the queue, and who gets what is admitted."""

from router.scheduling import commands as cmd
from router.scheduling import events as ev
from router.scheduling.limits import Limits
from tests.unit.router.scheduling.bench import (
    Bench,
    ends,
    handle,
    info,
    only,
    report,
    submitted,
    without_notes,
)


def test_an_unknown_model_is_rejected() -> None:
    bench = Bench()
    bench.pd()
    end = only(bench.feed(submitted(model="other")), cmd.EndChoice)
    assert (end.outcome, end.leg, end.code) == ("rejected", "queue", "model_not_found")
    assert "other" in end.message
    assert [what for _, what in bench.scheduler.story("c/0")] == ["rejected model_not_found"]


def test_without_a_decode_worker_nothing_is_admitted() -> None:
    bench = Bench()
    bench.list_workers(info("p", "prefill"))
    end = only(bench.feed(submitted()), cmd.EndChoice)
    assert (end.outcome, end.code, end.retry_after_s) == ("rejected", "no_decode_worker", 3)


def test_a_prompt_of_another_digest_is_rejected() -> None:
    bench = Bench()
    bench.pd()
    out = bench.feed(submitted(model_digest="new"))
    assert ends(out) == [("rejected", "queue", "no_decode_worker")]
    out = bench.feed(submitted("c/1", model_digest="d"))
    assert out == [cmd.StartPrefill(1, "c/1", "p", "p-1")]


def test_a_model_that_went_away_is_unavailable_and_later_unknown() -> None:
    bench = Bench()
    bench.list_workers(info("a"))
    bench.feed(ev.WorkerLeaving("a", "a-1"))
    bench.feed(ev.WorkerUnlisted("a", "a-1"))
    bench.incarnations.clear()
    bench.pass_time(30)
    assert ends(bench.feed(submitted())) == [("rejected", "queue", "no_decode_worker")]
    assert "m" in bench.scheduler.models()
    bench.pass_time(300)
    assert ends(bench.feed(submitted("c/1"))) == [("rejected", "queue", "model_not_found")]
    assert bench.scheduler.models() == {}


def test_work_waits_for_a_worker_that_is_only_momentarily_away() -> None:
    bench = Bench()
    bench.feed(ev.WorkerListed(info("a")))
    assert bench.feed(submitted()) == []
    assert bench.scheduler.num_queued == 1
    assert bench.scheduler.choices_waiting == ["c/0"]
    out = bench.feed(ev.WorkerReported("a", "a-1", report()))
    assert without_notes(out) == [cmd.StartDecode(1, "c/0", "a", "a-1", None)]


def test_a_prompt_that_no_worker_can_hold_is_rejected_at_once() -> None:
    bench = Bench()
    bench.list_workers(info("a", context=256), info("b", context=128))
    out = bench.feed(submitted(tokens=256))
    assert ends(out) == [("rejected", "queue", "context_length_exceeded")]
    assert only(bench.feed(submitted("c/1", tokens=255)), cmd.StartDecode).worker == "a"
    estimated = submitted("c/2", tokens=256, packed_prompt=b"")
    assert bench.feed(estimated) == []


def test_a_full_queue_rejects_and_says_when_to_come_back() -> None:
    bench = Bench(Limits(max_queue=1))
    bench.list_workers(info("a", running=1))
    bench.feed(submitted("c/0"))
    assert bench.feed(submitted("c/1")) == []
    end = only(bench.feed(submitted("c/2")), cmd.EndChoice)
    assert (end.outcome, end.code, end.retry_after_s) == ("rejected", "queue_full", 3)


def test_the_queue_is_first_come_first_served_and_drains_when_capacity_is_free() -> None:
    bench = Bench()
    bench.list_workers(info("a", running=1))
    bench.feed(submitted("c/0"))
    for n in (1, 2):
        assert bench.feed(submitted(f"c/{n}")) == []
    assert bench.feed(ev.Ended(1))[-1] == cmd.StartDecode(2, "c/1", "a", "a-1", None)
    assert bench.feed(ev.Ended(2))[-1] == cmd.StartDecode(3, "c/2", "a", "a-1", None)


def test_prefill_is_admitted_against_projected_decode_capacity() -> None:
    bench = Bench()
    bench.pd(running=2)
    assert len([bench.feed(submitted(f"c/{n}")) for n in range(2)]) == 2
    assert bench.feed(submitted("c/2")) == []
    bench.feed(ev.Prefilled(1, handle("p"), ended=False))
    bench.feed(ev.DecodingStarted(3))
    assert bench.feed(ev.Ended(3))[-1] == cmd.StartPrefill(4, "c/2", "p", "p-1")


def test_blocks_bound_what_a_decode_worker_takes() -> None:
    bench = Bench()
    bench.list_workers(info("d", "decode", blocks=40))
    for n in range(2):
        bench.feed(submitted(f"c/{n}", tokens=208, max_tokens=48))
    assert bench.scheduler.workers()[0].blocks == 32
    assert bench.feed(submitted("c/2", tokens=208, max_tokens=48)) == []
    assert bench.scheduler.num_queued == 1


def test_prefill_workers_queue_no_more_than_twice_what_they_run() -> None:
    bench = Bench()
    bench.list_workers(info("p", "prefill", running=1), info("d", "decode"))
    for n in range(2):
        bench.feed(submitted(f"c/{n}"))
    assert bench.feed(submitted("c/2")) == []
    out = bench.feed(ev.Prefilled(1, handle("p"), ended=False))
    assert out[-1] == cmd.StartPrefill(4, "c/2", "p", "p-1")


def test_what_others_use_is_not_ours_to_give() -> None:
    bench = Bench()
    bench.list_workers(info("d", "decode", blocks=40))
    bench.feed(submitted("c/0", tokens=64, max_tokens=16))
    bench.feed(ev.WorkerReported("d", "d-1", report(num_blocks=40, free_blocks=2)))
    assert bench.feed(submitted("c/1", tokens=64, max_tokens=16)) == []
    out = bench.feed(ev.WorkerReported("d", "d-1", report(num_blocks=40, free_blocks=30)))
    assert out == [cmd.StartDecode(2, "c/1", "d", "d-1", None)]


def test_a_handle_goes_only_to_workers_of_its_model_and_layout() -> None:
    bench = Bench()
    bench.list_workers(
        info("p1", "prefill", digest="old"),
        info("p2", "prefill", digest="new"),
        info("d1", "decode", digest="old"),
        info("d2", "decode", digest="new"),
    )
    for n in range(8):
        start = only(bench.feed(submitted(f"c/{n}")), cmd.StartPrefill)
        out = bench.feed(ev.Prefilled(start.attempt, handle(start.worker, f"h{n}"), ended=False))
        assert only(out, cmd.StartDecode).worker == start.worker.replace("p", "d")


def test_the_decode_worker_is_chosen_on_the_load_of_the_moment() -> None:
    bench = Bench()
    bench.pd(2)
    bench.feed(submitted("c/0"))
    bench.feed(submitted("c/1", tokens=32))  # lands on d1 while c/0 prefills
    busy = bench.scheduler.workers()[1:]
    idle = next(view.info.worker_id for view in busy if not view.running)
    out = bench.feed(ev.Prefilled(1, handle("p"), ended=False))
    assert only(out, cmd.StartDecode).worker == idle


def test_one_event_starts_a_bounded_number_and_the_rest_follows_at_once() -> None:
    bench = Bench()
    bench.feed(ev.WorkerListed(info("d", "decode", running=100, blocks=100_000)))
    for n in range(40):
        bench.feed(submitted(f"c/{n}", tokens=16))
    out = bench.feed(ev.WorkerReported("d", "d-1", report()))
    assert len(without_notes(out)) == 32
    assert bench.scheduler.next_deadline() == bench.now
    assert len(without_notes(bench.feed(ev.Ticked()))) == 8
