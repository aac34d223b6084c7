"""The look-out for choices that wait beside idle workers sees one, and sees none where none is."""

from unittest import mock

import pytest

from router.scheduling import starting
from router.scheduling.limits import Limits
from tests.sim.idleness import IdleWatch
from tests.unit.router.scheduling.bench import Bench, failed, info


def wait_with_a_failure(bench: Bench) -> IdleWatch:
    """c/0 has failed on a worker that is empty from then on; the other one is full."""
    watch = IdleWatch(bench.scheduler)
    bench.list_workers(info("d1", "decode", running=1), info("d2", "decode", running=1))
    start = bench.to_decoding_local("c/0")
    bench.to_decoding_local("f/0")
    bench.feed(failed(start.attempt, "engine"))
    bench.pass_time(25.0)
    return watch


def test_a_choice_that_waits_beside_an_idle_worker_is_seen() -> None:
    with mock.patch.object(starting, "LOOKS", 1 << 30):
        watch = wait_with_a_failure(Bench(Limits(queue_timeout_s=20.0)))
    assert len(watch.problems) == 1
    assert "c/0 waited beside ['d1-1']" in watch.problems[0]


@pytest.mark.parametrize("queue_timeout_s", [5.0, 20.0])
def test_who_stands_aside_for_a_moment_is_not(queue_timeout_s: float) -> None:
    watch = wait_with_a_failure(Bench(Limits(queue_timeout_s=queue_timeout_s)))
    assert watch.problems == []
