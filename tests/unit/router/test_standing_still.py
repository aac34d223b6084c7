"""The driver on a loop that stands still while workers report: nobody is silent for that.

What they say waits in a socket, as it does for a router, and the callback that holds up the loop is
one that reads it: after such a one uvloop runs what is due before it reads again."""

import asyncio
import socket
import threading
import time
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
import uvloop

from router.loop_lag import LOOK_S, LoopLag
from router.pauses import PAUSE_S, Pauses
from router.scheduling import events as ev
from router.scheduling.limits import Limits
from tests.unit.router.dispatch_world import DispatchWorld, dispatching

SILENCE_S = 0.7
PAUSED_S = 1.2
REPORT = b"."
REPORTS_S = 0.1
LIMITS = Limits(silence_timeout_s=SILENCE_S)
RUNNERS = [asyncio.run, uvloop.run]


def events(world: DispatchWorld, kind: str) -> float:
    """How many of them were counted, whatever the cause."""
    return sum(
        sample.value
        for family in world.metrics.notes.collect()
        for sample in family.samples
        if sample.name.endswith("_total") and sample.labels["kind"] == kind
    )


class Reporter:
    """A worker that reports from a thread, as another process does: it does not stand still."""

    def __init__(self) -> None:
        self.ours, self._theirs = socket.socketpair()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._report)

    def __enter__(self) -> "Reporter":
        self.ours.setblocking(False)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self.ours.close()
        self._theirs.close()

    def _report(self) -> None:
        while not self._stop.wait(REPORTS_S):
            self._theirs.send(REPORT)


async def stand_still(*, beats: bool) -> tuple[float, float]:
    """For longer than a silence: how many pauses and silences were counted in the end."""
    loop = asyncio.get_running_loop()
    async with dispatching(LIMITS) as world:
        d = await world.worker("d", "decode")
        lag = LoopLag(lambda _late_s: world.dispatch.pauses.awake())
        stands_still = asyncio.Event()
        with Reporter() as reporter:

            def read() -> None:
                reporter.ours.recv(1000)
                world.report(d)
                if stands_still.is_set():
                    stands_still.clear()
                    time.sleep(PAUSED_S)

            loop.add_reader(reporter.ours, read)
            if beats:
                lag.start()
            await asyncio.sleep(3 * LOOK_S)
            stands_still.set()
            await asyncio.sleep(PAUSED_S + SILENCE_S)
            lag.stop()
            loop.remove_reader(reporter.ours)
            assert all(view.live for view in world.dispatch.scheduler.workers())
        return events(world, "paused"), events(world, "silent")


@pytest.mark.parametrize("run", RUNNERS)
def test_who_reports_while_we_stand_still_is_not_silent(
    run: Callable[[Coroutine[Any, Any, Any]], Any],
) -> None:
    num_paused, num_silent = run(stand_still(beats=True))
    assert num_paused >= 1
    assert num_silent == 0


def test_this_is_what_beats_are_for() -> None:
    """Without them nothing is noticed, and uvloop makes a silence of it."""
    num_paused, num_silent = uvloop.run(stand_still(beats=False))
    assert num_paused == 0
    assert num_silent >= 1


async def test_who_falls_silent_while_we_stand_still_is_found_out_afterwards() -> None:
    async with dispatching(LIMITS) as world:
        await world.worker("d", "decode")
        lag = LoopLag(lambda _late_s: world.dispatch.pauses.awake())
        lag.start()
        await asyncio.sleep(2 * LOOK_S)
        time.sleep(PAUSED_S)  # noqa: ASYNC251  on purpose
        await asyncio.sleep(2 * LOOK_S)
        assert events(world, "silent") == 0
        await asyncio.sleep(SILENCE_S)
        assert events(world, "silent") == 1
        lag.stop()


# --- what is told of a pause ---


class Told:
    def __init__(self) -> None:
        self.now = 100.0
        self.seconds: list[float] = []
        self.pauses = Pauses(lambda: self.now, lambda paused: self.seconds.append(paused.seconds))

    def pass_time(self, seconds: float) -> None:
        """With a beat at each end."""
        self.now += seconds
        self.pauses.awake()


def test_a_pause_is_told_once_without_the_time_between_two_beats() -> None:
    told = Told()
    told.pass_time(0.0)
    told.pass_time(LOOK_S)
    told.pass_time(PAUSE_S)
    assert told.seconds == []
    told.pass_time(4.0)
    told.pass_time(LOOK_S)
    assert told.seconds == [pytest.approx(4.0 - LOOK_S)]


def test_without_beats_there_is_no_pause() -> None:
    told = Told()
    told.now += 1000.0
    assert told.now < told.pauses.late_at
    told.pass_time(0.0)
    assert told.seconds == []
    told.pauses.stop()
    told.now += 1000.0
    assert told.now < told.pauses.late_at


async def test_the_first_event_after_a_pause_tells_of_it() -> None:
    async with dispatching() as world:
        handled: list[type[object]] = []
        handle = world.dispatch.scheduler.handle

        def listen(event: ev.Event, now: float) -> object:
            handled.append(type(event))
            return handle(event, now)

        world.dispatch.scheduler.handle = listen  # type: ignore[method-assign, assignment]
        world.dispatch.pauses.awake()
        time.sleep(PAUSE_S + 0.05)  # noqa: ASYNC251  on purpose
        world.dispatch.feed(ev.Ticked())
        world.dispatch.feed(ev.Ticked())
        world.dispatch.pauses.awake()
        assert handled == [ev.Paused, ev.Ticked, ev.Ticked]
