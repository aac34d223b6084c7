"""Who needs much of a worker gets it, and holds up nobody meanwhile."""

from router.scheduling import commands as cmd
from router.scheduling import events as ev
from router.scheduling.limits import Limits
from tests.unit.router.scheduling.bench import Bench, ends, handle, info, only, report, submitted


class Busy:
    """A bench on which short choices come and go all the time; each runs two seconds."""

    def __init__(self, bench: Bench, tokens: int, every_s: float) -> None:
        self.bench = bench
        self.tokens = tokens
        self.every_s = every_s
        self.started: dict[str, tuple[str, float]] = {}
        """Choice -> worker and time, of all that decode or did."""
        self.ends_at: dict[int, float] = {}
        self.numbers = 0
        self.next_at = bench.now

    def take(self, commands: list[cmd.Command]) -> None:
        bench = self.bench
        assert ends(commands) == [] or all(end[0] == "completed" for end in ends(commands))
        for start in commands:
            if isinstance(start, cmd.StartDecode):
                self.started[start.choice] = (start.worker, bench.now)
                self.ends_at[start.attempt] = bench.now + 2.0
                bench.heard[start.attempt] = bench.now + 1000.0
                self.take(bench.feed(ev.DecodingStarted(start.attempt)))
            elif isinstance(start, cmd.StartPrefill):
                name = f"h-{start.choice}-{start.attempt}"
                prefilled = ev.Prefilled(start.attempt, handle(start.worker, name), ended=False)
                self.take(bench.feed(prefilled))

    def go_on(self, seconds: float) -> None:
        bench = self.bench
        until = bench.now + seconds
        while bench.now < until:
            self.take(bench.pass_time(0.05))
            for attempt in [a for a, at in self.ends_at.items() if at <= bench.now]:
                del self.ends_at[attempt]
                self.take(bench.feed(ev.Ended(attempt)))
            while self.next_at <= bench.now:
                self.next_at += self.every_s
                self.numbers += 1
                self.take(bench.feed(submitted(f"s/{self.numbers}", tokens=self.tokens)))

    def slowest(self) -> float:
        """How long the slowest of the short ones that began now waited."""
        waited = [
            at - self.bench.scheduler.past(choice).story[0][0]
            for choice, (_, at) in self.started.items()
            if choice.startswith("s/")
        ]
        return max(waited)


def half_full(*, roles: bool = False, workers: int = 2) -> Busy:
    """Each worker has half or more of its 500 blocks in use, all the time."""
    bench = Bench()
    if roles:
        bench.list_workers(info("p", "prefill", blocks=5000, running=64))
    decoders = [info(f"d{n}", "decode", blocks=500, running=64) for n in range(workers)]
    bench.list_workers(*decoders)
    busy = Busy(bench, 512 - 64, 2.0 / (workers * 8))
    busy.go_on(4.0)
    return busy


def test_one_that_needs_a_whole_worker_starts_in_a_busy_fleet_and_holds_up_nobody() -> None:
    busy = half_full(workers=4)
    asked_at = busy.bench.now
    busy.take(busy.bench.feed(submitted("giant", tokens=7000)))
    assert "giant" not in busy.started
    busy.go_on(4.0)
    assert busy.started["giant"][1] - asked_at < 3.0
    assert busy.slowest() < 0.1
    assert not busy.bench.scheduler._t.kept


def test_so_does_one_that_is_prefilled_elsewhere() -> None:
    """And nobody takes its room while that lasts."""
    busy = half_full(roles=True)
    bench = busy.bench
    bench.feed(submitted("giant", tokens=7000))
    for _ in range(60):
        busy.go_on(0.05)
        if bench.scheduler._t.choices["giant"].state != "queued":
            break
    assert "giant" in busy.started


def test_its_room_is_kept_during_its_prefill() -> None:
    bench = Bench()
    bench.list_workers(info("p", "prefill", blocks=5000, running=64))
    bench.list_workers(info("d", "decode", blocks=500, running=64))
    first = bench.to_decoding("first", tokens=3000)
    assert not any(isinstance(c, cmd.StartPrefill) for c in bench.feed(submitted("g", tokens=7000)))
    assert list(bench.scheduler._t.kept) == ["g"]
    start = only(bench.feed(ev.Ended(first.attempt)), cmd.StartPrefill)
    bench.feed(ev.Accepted(start.attempt))
    assert start.choice == "g"
    for number in range(20):
        out = bench.feed(submitted(f"s/{number}"))
        assert not any(isinstance(c, cmd.StartPrefill) and number > 2 for c in out)
    out = bench.feed(ev.Prefilled(start.attempt, handle("p", "h-g"), ended=False))
    assert [c.choice for c in out if isinstance(c, cmd.StartDecode)] == ["g"]
    assert not bench.scheduler._t.kept


def test_a_handle_that_waits_for_much_room_gets_it() -> None:
    """Its room was there when it was prefilled, and is not any more."""
    busy = half_full()
    bench = busy.bench
    bench.list_workers(info("p", "prefill", blocks=5000, running=64))
    bench.list_workers(info("d9", "decode", blocks=500, running=64))
    start = only(bench.feed(submitted("giant", tokens=7000)), cmd.StartPrefill)
    bench.feed(ev.Accepted(start.attempt))
    bench.feed(ev.WorkerLeaving("d9", "d9-1"))
    busy.go_on(1.0)
    at = bench.now
    busy.take(bench.feed(ev.Prefilled(start.attempt, handle("p", "h-giant"), ended=False)))
    assert "giant" not in busy.started
    busy.go_on(4.0)
    assert busy.started["giant"][1] - at < 3.0


def test_many_long_handles_that_wait_for_one_worker_hold_up_no_short_one() -> None:
    bench = Bench()
    size: dict[str, int] = {"context": 100_000, "blocks": 100_000}
    bench.list_workers(info("p", "prefill", **size, running=500))
    bench.list_workers(info("large", "decode", **size, running=60))
    bench.list_workers(*(info(f"d{n}", "decode", running=30) for n in range(9)))
    prefills = [
        only(bench.feed(submitted(f"l/{n}", tokens=9000 - n)), cmd.StartPrefill) for n in range(50)
    ]
    for start in prefills:
        bench.feed(ev.Accepted(start.attempt))
    fillers = [bench.to_decoding(f"f/{n}", tokens=9500) for n in range(10)]
    assert {start.worker for start in fillers} == {"large"}
    t = bench.scheduler._t
    large = t.fleet.workers["large"]
    bench.feed(
        ev.WorkerReported(
            "large", "large-1", report(running=60, num_blocks=100_000, free_blocks=100)
        )
    )
    for number, start in enumerate(prefills):
        bench.feed(ev.Prefilled(start.attempt, handle("p", f"h-{number}"), ended=False))
    assert sum(len(g.waiters) for g in t.fleet.models["m"].groups.values()) == 50
    assert large.running <= 11
    for number in range(40):
        assert bench.to_transfer(f"s/{number}", tokens=200)[1].worker != "large"


def test_no_more_than_half_of_the_workers_keep_room() -> None:
    bench = Bench()
    bench.list_workers(*(info(f"d{n}", "decode", blocks=100, running=8) for n in range(4)))
    for number in range(4):
        bench.to_decoding_local(f"f/{number}")
    for number in range(4):
        bench.feed(submitted(f"g/{number}", tokens=1500))
    kept = bench.scheduler._t.kept
    assert len(kept) == 2
    assert len({reservation.worker for reservation in kept.values()}) == 2


def test_room_is_kept_no_longer_when_its_choice_or_its_worker_has_gone() -> None:
    bench = Bench()
    bench.list_workers(*(info(f"d{n}", "decode", blocks=100, running=8) for n in range(2)))
    for number in range(2):
        bench.to_decoding_local(f"f/{number}")
    kept = bench.scheduler._t.kept
    bench.feed(submitted("g", tokens=1500))
    keeper = kept["g"].worker
    bench.feed(ev.WorkerLeaving(keeper.id, keeper.incarnation))
    bench.pass_time(3.0)
    assert kept["g"].worker is not keeper
    bench.feed(ev.ClientGone("g"))
    assert not kept
    assert {w.blocks for w in bench.scheduler._t.fleet.workers.values()} == {17}


def test_those_who_are_all_large_keep_their_order() -> None:
    """Nobody is shorter, so nobody passes."""
    bench = Bench()
    bench.list_workers(*(info(f"d{n}", "decode", blocks=100, running=8) for n in range(4)))
    running = [
        only(bench.feed(submitted(f"a/{n}", tokens=1300)), cmd.StartDecode) for n in range(4)
    ]
    for start in running:
        bench.feed(ev.DecodingStarted(start.attempt))
        bench.heard[start.attempt] = bench.now + 1000.0
    for number in range(8):
        bench.feed(submitted(f"b/{number}", tokens=1300))
    assert not bench.scheduler._t.kept
    assert bench.scheduler.num_queued == 8
    started = [only(bench.feed(ev.Ended(s.attempt)), cmd.StartDecode).choice for s in running]
    assert started == ["b/0", "b/1", "b/2", "b/3"]


def test_one_that_needs_more_blocks_than_any_worker_has_starts_beside_an_idle_one() -> None:
    """Prompt and expected output: 512 blocks and some; a worker has 512."""
    bench = Bench()
    bench.list_workers(info("p", "prefill", blocks=5000))
    bench.list_workers(*(info(f"d{n}", "decode", blocks=512, running=8) for n in range(2)))
    bench.to_decoding("f/0", tokens=7000)
    start = bench.to_decoding("c/0", tokens=8000)
    assert start.handle is not None


def test_it_ends_with_its_deadline_if_its_room_never_comes() -> None:
    bench = Bench(Limits(queue_timeout_s=5.0))
    bench.list_workers(info("d", "decode", blocks=100, running=8))
    bench.to_decoding_local("f/0")
    bench.feed(submitted("g", tokens=1500))
    out = bench.pass_time(6.0)
    assert ends(out) == [("expired", "queue", "queue_timeout")]
    assert not bench.scheduler._t.kept
