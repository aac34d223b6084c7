"""Who holds a handle and waits for a decode worker, and who stands behind another."""

from router.scheduling import commands as cmd
from router.scheduling import events as ev
from tests.unit.router.scheduling.bench import Bench, ends, handle, info, only, report, submitted


def pulls(bench: Bench, start: cmd.StartPrefill) -> dict[str, str]:
    """Its handle has come: choice -> worker."""
    name = f"h-{start.choice}"
    out = bench.feed(ev.Prefilled(start.attempt, handle(start.worker, name), ended=False))
    return {c.choice: c.worker for c in out if isinstance(c, cmd.StartDecode)}


def test_many_long_handles_that_wait_for_one_worker_hold_up_no_short_one() -> None:
    bench = Bench()
    size: dict[str, int] = {"context": 100_000, "blocks": 100_000}
    bench.list_workers(info("p", "prefill", **size, running=500))
    bench.list_workers(info("large", "decode", **size, running=60))
    bench.list_workers(*(info(f"d{n}", "decode", running=30) for n in range(9)))
    assert bench.to_decoding("first", tokens=9000).worker == "large"
    longs = [
        only(bench.feed(submitted(f"l/{n}", tokens=9000 - n)), cmd.StartPrefill) for n in range(100)
    ]
    shorts = [only(bench.feed(submitted(f"s/{n}")), cmd.StartPrefill) for n in range(5)]
    for start in longs + shorts:
        bench.feed(ev.Accepted(start.attempt))
    full = report(running=60, num_blocks=100_000, free_blocks=100)
    bench.feed(ev.WorkerReported("large", "large-1", full))
    for start in longs:
        assert pulls(bench, start) == {}
    for start in shorts:
        assert pulls(bench, start)[start.choice] != "large"
    out = bench.feed(
        ev.WorkerReported("large", "large-1", report(num_blocks=100_000, free_blocks=100_000))
    )
    first = [c.choice for c in out if isinstance(c, cmd.StartDecode)]
    assert first == [f"l/{n}" for n in range(32)], "the oldest first"


def test_one_that_needs_more_blocks_than_any_worker_has_starts_beside_an_idle_one() -> None:
    """Prompt and expected output: 512 blocks and some; a worker has 512."""
    bench = Bench()
    bench.list_workers(info("p", "prefill", blocks=5000))
    bench.list_workers(*(info(f"d{n}", "decode", blocks=512, running=8) for n in range(2)))
    bench.to_decoding("f/0", tokens=8000, max_tokens=1000)
    assert bench.to_decoding("c/0", tokens=8000, max_tokens=1000).handle is not None


def test_those_behind_one_that_leaves_the_queue_are_looked_at_at_once() -> None:
    bench = Bench()
    bench.list_workers(info("d", "decode", blocks=500))
    bench.to_decoding_local("f/0")
    assert bench.feed(submitted("giant", tokens=7900)) == []
    assert bench.feed(submitted("short")) == []
    out = bench.feed(ev.ClientGone("giant"))
    assert ends(out) == [("cancelled", "queue", "cancelled")]
    assert only(out, cmd.StartDecode).choice == "short"
