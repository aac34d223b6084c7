"""A queue that moves at a known pace: whose turn would come too late is told at once."""

from router.scheduling import commands as cmd
from router.scheduling import events as ev
from router.scheduling.limits import Limits
from tests.unit.router.scheduling.bench import Bench, ends, info, submitted

QUEUE_S = 10.0


class Crowd:
    """One worker with a queue before it that never ends; `serve` ends the oldest of what runs."""

    def __init__(self, waiting: int) -> None:
        self.bench = Bench(Limits(queue_timeout_s=QUEUE_S, retry_share=1.0))
        self.bench.list_workers(info("a", running=1))
        self._asked = 0
        self.running: list[int] = []
        for _ in range(waiting + 1):
            assert self.ask() == []

    def ask(self) -> list[tuple[str, str, str]]:
        self._asked += 1
        return self._ends(self.bench.feed(submitted(f"c/{self._asked}", tokens=20)))

    def serve(self, number: int, every_s: float) -> None:
        """So many, each followed in the queue by a new one."""
        for _ in range(number):
            self._ends(self.bench.pass_time(every_s))
            attempt = self.running.pop(0)
            self._ends(self.bench.feed(ev.Accepted(attempt)))
            self._ends(self.bench.feed(ev.DecodingStarted(attempt)))
            self._ends(self.bench.feed(ev.Ended(attempt)))
            self.ask()

    def _ends(self, out: list[cmd.Command]) -> list[tuple[str, str, str]]:
        self.running += [c.attempt for c in out if isinstance(c, cmd.StartDecode)]
        return ends(out)


REJECTED = [("rejected", "queue", "queue_full")]


def test_who_would_expire_at_this_pace_is_rejected_and_who_would_not_waits() -> None:
    crowd = Crowd(waiting=18)
    crowd.serve(20, every_s=0.5)
    assert crowd.bench.scheduler.num_queued == 18, "9 s of work, 10 are allowed"
    answers = [crowd.ask() for _ in range(6)]
    assert answers[:2] == [[], []]
    assert answers[-2:] == [REJECTED, REJECTED]


def test_a_pace_that_is_not_known_yet_rejects_nobody() -> None:
    crowd = Crowd(waiting=60)
    crowd.serve(12, every_s=0.25)
    assert crowd.ask() == [], "too few starts"
    crowd = Crowd(waiting=600)
    crowd.serve(30, every_s=0.05)
    assert crowd.ask() == [], "too short a time"


def test_an_outage_of_the_bus_does_not_slow_the_pace() -> None:
    crowd = Crowd(waiting=15)
    crowd.serve(20, every_s=0.5)
    crowd.bench.feed(ev.BusDown())
    crowd.bench.now += 4.0
    assert crowd.ask() == []
    crowd.bench.feed(ev.BusUp())
    assert crowd.ask() == []


def test_the_pace_of_long_ago_is_forgotten() -> None:
    """A worker that was slow is quick now."""
    crowd = Crowd(waiting=18)
    crowd.serve(40, every_s=0.5)
    crowd.serve(150, every_s=0.1)
    assert [crowd.ask() for _ in range(60)] == [[]] * 60


def test_an_empty_queue_begins_anew() -> None:
    crowd = Crowd(waiting=18)
    crowd.serve(20, every_s=0.5)
    bench = crowd.bench
    while crowd.running:
        out = bench.feed(ev.Ended(crowd.running.pop(0)))
        crowd.running += [c.attempt for c in out if isinstance(c, cmd.StartDecode)]
    assert bench.scheduler.num_queued == 0
    assert [crowd.ask() for _ in range(40)] == [[]] * 40
