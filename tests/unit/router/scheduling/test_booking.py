"""Who is prefilled has a place where it can decode, and takes nobody else's."""

from router.scheduling import commands as cmd
from router.scheduling import events as ev
from tests.unit.router.scheduling.bench import (
    Bench,
    ends,
    failed,
    handle,
    info,
    only,
    report,
    submitted,
)


def prefills(commands: list[cmd.Command]) -> list[str]:
    return [c.choice for c in commands if isinstance(c, cmd.StartPrefill)]


def test_short_ones_do_not_take_the_room_of_one_that_is_prefilled() -> None:
    bench = Bench()
    bench.list_workers(info("p", "prefill", blocks=5000, running=64))
    decoders = [info(f"d{n}", "decode", blocks=500, running=64) for n in range(2)]
    bench.list_workers(*decoders)
    start = only(bench.feed(submitted("giant", tokens=7000)), cmd.StartPrefill)
    bench.feed(ev.Accepted(start.attempt))
    booked = bench.scheduler._t.choices["giant"].booked
    assert booked is not None
    assert (booked.worker.blocks, booked.worker.running) == (442, 1)
    for number in range(60):
        for prefill in bench.feed(submitted(f"s/{number}")):
            if isinstance(prefill, cmd.StartPrefill):
                bench.feed(ev.Accepted(prefill.attempt))
                name = f"h-{prefill.choice}"
                bench.feed(ev.Prefilled(prefill.attempt, handle("p", name), ended=False))
    assert bench.scheduler.num_queued > 0, "the fleet is full"
    out = bench.feed(ev.Prefilled(start.attempt, handle("p", "h-giant"), ended=False))
    assert [(c.choice, c.worker) for c in out if isinstance(c, cmd.StartDecode)] == [
        ("giant", booked.worker.id)
    ]


def test_long_ones_are_not_prefilled_against_the_places_of_small_workers() -> None:
    bench = Bench()
    size: dict[str, int] = {"context": 100_000, "blocks": 10_000}
    bench.list_workers(info("p", "prefill", context=100_000, blocks=100_000, running=500))
    bench.list_workers(info("large", "decode", **size, running=4))
    bench.list_workers(*(info(f"d{n}", "decode", running=30) for n in range(9)))
    started = [c for n in range(50) for c in prefills(bench.feed(submitted(f"l/{n}", tokens=9000)))]
    assert started == ["l/0", "l/1", "l/2", "l/3"]
    for number in range(40):
        assert bench.to_transfer(f"s/{number}", tokens=200)[1].worker != "large"


def test_long_handles_that_find_no_room_any_more_hold_up_no_short_one() -> None:
    """What they were to have is used by others."""
    bench = Bench()
    size: dict[str, int] = {"context": 100_000, "blocks": 100_000}
    bench.list_workers(info("p", "prefill", **size, running=500))
    bench.list_workers(info("large", "decode", **size, running=60))
    bench.list_workers(*(info(f"d{n}", "decode", running=30) for n in range(9)))
    starts = [
        only(bench.feed(submitted(f"l/{n}", tokens=9000 - n)), cmd.StartPrefill) for n in range(50)
    ]
    for start in starts:
        bench.feed(ev.Accepted(start.attempt))
    full = report(running=60, num_blocks=100_000, free_blocks=100)
    bench.feed(ev.WorkerReported("large", "large-1", full))
    for number, start in enumerate(starts):
        bench.feed(ev.Prefilled(start.attempt, handle("p", f"h-{number}"), ended=False))
    [group] = bench.scheduler._t.fleet.models["m"].groups.values()
    assert len(group.waiters) == 49, "one fits where nothing of ours is, whatever others use"
    for number in range(40):
        assert bench.to_transfer(f"s/{number}", tokens=200)[1].worker != "large"
    out = bench.feed(
        ev.WorkerReported("large", "large-1", report(num_blocks=100_000, free_blocks=100_000))
    )
    assert len([c for c in out if isinstance(c, cmd.StartDecode)]) == 32
    assert len([c for c in bench.pass_time(0.0) if isinstance(c, cmd.StartDecode)]) == 17


def test_a_place_is_booked_no_longer_than_it_is_wanted() -> None:
    def begun() -> tuple[Bench, cmd.StartPrefill]:
        bench = Bench()
        bench.list_workers(info("p", "prefill"), info("p2", "prefill"), info("d", "decode"))
        start = only(bench.feed(submitted()), cmd.StartPrefill)
        bench.feed(ev.Accepted(start.attempt))
        assert bench.scheduler._t.fleet.workers["d"].booked == 17
        return bench, start

    bench, start = begun()
    bench.feed(ev.ClientGone("c/0"))
    assert bench.scheduler._t.fleet.workers["d"].blocks == 0
    bench, start = begun()
    again = only(bench.feed(failed(start.attempt, "engine")), cmd.StartPrefill)
    assert (again.worker, bench.scheduler._t.fleet.workers["d"].booked) != (start.worker, 0)
    bench, start = begun()
    bench.feed(ev.Prefilled(start.attempt, handle(start.worker), ended=True))
    assert bench.scheduler._t.fleet.workers["d"].blocks == 0
    bench, start = begun()
    bench.feed(ev.Prefilled(start.attempt, handle(start.worker), ended=False))
    worker = bench.scheduler._t.fleet.workers["d"]
    assert (worker.booked, worker.blocks, worker.running) == (0, 17, 1)


def test_who_finds_its_booked_worker_gone_goes_elsewhere() -> None:
    bench = Bench()
    bench.list_workers(info("p", "prefill"), info("d1", "decode"), info("d2", "decode"))
    start = only(bench.feed(submitted()), cmd.StartPrefill)
    bench.feed(ev.Accepted(start.attempt))
    booked = bench.scheduler._t.choices["c/0"].booked
    assert booked is not None
    bench.list_workers(info(booked.worker.id, "prefill", incarnation="other"))
    assert bench.scheduler._t.choices["c/0"].booked is booked
    out = bench.feed(ev.Prefilled(start.attempt, handle("p"), ended=False))
    assert only(out, cmd.StartDecode).worker == ({"d1", "d2"} - {booked.worker.id}).pop()
    assert not booked.worker.reservations


def test_what_is_booked_is_not_taken_for_used() -> None:
    """Half of the worker is in use by others, though we have booked as much."""
    bench = Bench()
    bench.list_workers(info("p", "prefill", blocks=5000), info("d", "decode", blocks=500))
    bench.feed(submitted(tokens=3000))
    bench.feed(ev.WorkerReported("d", "d-1", report(num_blocks=500, free_blocks=300)))
    assert bench.scheduler._t.fleet.workers["d"].foreign_blocks == 200


def test_one_that_needs_more_blocks_than_any_worker_has_starts_beside_an_idle_one() -> None:
    """Prompt and expected output: 512 blocks and some; a worker has 512."""
    bench = Bench()
    bench.list_workers(info("p", "prefill", blocks=5000))
    bench.list_workers(*(info(f"d{n}", "decode", blocks=512, running=8) for n in range(2)))
    bench.to_decoding("f/0", tokens=8000)
    assert bench.to_decoding("c/0", tokens=8000).handle is not None


def test_those_behind_one_that_leaves_the_queue_are_looked_at_at_once() -> None:
    bench = Bench()
    bench.list_workers(info("d", "decode", blocks=500))
    bench.to_decoding_local("f/0")
    assert bench.feed(submitted("giant", tokens=7900)) == []
    assert bench.feed(submitted("short")) == []
    out = bench.feed(ev.ClientGone("giant"))
    assert ends(out) == [("cancelled", "queue", "cancelled")]
    assert only(out, cmd.StartDecode).choice == "short"


def both_prefilled(bench: Bench) -> tuple[cmd.StartPrefill, cmd.StartPrefill]:
    first = only(bench.feed(submitted("a")), cmd.StartPrefill)
    second = only(bench.feed(submitted("b")), cmd.StartPrefill)
    for start in (first, second):
        bench.feed(ev.Accepted(start.attempt))
    return first, second


def pulls(bench: Bench, start: cmd.StartPrefill) -> dict[str, str]:
    """Its handle has come: choice -> worker."""
    name = f"h-{start.choice}"
    out = bench.feed(ev.Prefilled(start.attempt, handle(start.worker, name), ended=False))
    return {c.choice: c.worker for c in out if isinstance(c, cmd.StartDecode)}


def test_an_older_one_that_lost_its_place_does_not_keep_a_younger_one_from_its_own() -> None:
    bench = Bench()
    bench.list_workers(info("p", "prefill"))
    bench.list_workers(*(info(f"d{n}", "decode", running=1) for n in (1, 2)))
    first, second = both_prefilled(bench)
    booked = bench.scheduler._t.choices["a"].booked
    assert booked is not None
    bench.feed(ev.WorkerLeaving(booked.worker.id, booked.worker.incarnation))
    other = {"d1": "d2", "d2": "d1"}[booked.worker.id]
    assert pulls(bench, first) == {}
    assert pulls(bench, second) == {"a": other}, "the older one takes it"


def test_two_that_hold_handles_do_not_wait_for_each_other() -> None:
    """Somebody else uses one block: there is room for one of them."""
    bench = Bench()
    bench.list_workers(info("p", "prefill"), info("d", "decode", blocks=34))
    first, second = both_prefilled(bench)
    bench.feed(ev.WorkerReported("d", "d-1", report(num_blocks=34, free_blocks=33)))
    started = pulls(bench, first) | pulls(bench, second)
    assert started == {"a": "d"}


def test_one_that_lost_its_place_gets_another_that_new_work_cannot_take() -> None:
    bench = Bench()
    bench.list_workers(info("p", "prefill", blocks=5000))
    bench.list_workers(*(info(f"d{n}", "decode", blocks=100, running=64) for n in (1, 2)))
    large = only(bench.feed(submitted("large", tokens=1100)), cmd.StartPrefill)
    bench.feed(ev.Accepted(large.attempt))
    booked = bench.scheduler._t.choices["large"].booked
    assert booked is not None
    others = [bench.to_decoding(f"s/{n}", tokens=200) for n in range(3)]
    bench.feed(ev.WorkerLeaving(booked.worker.id, booked.worker.incarnation))
    assert pulls(bench, large) == {}
    assert bench.feed(submitted("new")) == [], "it would never have room"
    started = [
        c.choice
        for start in others
        for c in bench.feed(ev.Ended(start.attempt))
        if isinstance(c, cmd.StartDecode)
    ]
    assert started == ["large"]


def test_a_place_at_a_worker_that_serves_another_model_now_is_given_up() -> None:
    bench = Bench()
    bench.list_workers(info("p", "prefill"))
    bench.list_workers(*(info(f"d{n}", "decode", running=1) for n in (1, 2)))
    first, _ = both_prefilled(bench)
    booked = bench.scheduler._t.choices["a"].booked
    assert booked is not None
    name = booked.worker.id
    bench.feed(ev.WorkerListed(info(name, "decode", running=1, model="m2")))
    assert pulls(bench, first) == {}
    out = bench.feed(submitted("c/2", model="m2"))
    out += bench.feed(ev.ClientGone("a"))
    assert {c.choice: c.worker for c in out if isinstance(c, cmd.StartDecode)} == {"c/2": name}


def test_its_place_is_found_among_many_workers() -> None:
    """It is at the one large worker, which is not among those that seem freest."""
    bench = Bench()
    bench.list_workers(info("p", "prefill", blocks=9000, running=64))
    bench.list_workers(info("big", "decode", blocks=2000))
    start = only(bench.feed(submitted("c/0", tokens=1000)), cmd.StartPrefill)
    bench.feed(ev.Accepted(start.attempt))
    bench.feed(ev.WorkerReported("big", "big-1", report(num_blocks=2000, free_blocks=900)))
    bench.list_workers(*(info(f"s{n}", "decode", blocks=60) for n in range(12)))
    for number in range(12):
        bench.to_decoding(f"s/{number}", tokens=200)
    assert pulls(bench, start) == {"c/0": "big"}
