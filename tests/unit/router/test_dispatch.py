"""The driver over a bus in memory: it runs commands, feeds back facts, and decides nothing."""

import asyncio

import pytest
import uvloop

from protocol.bus import BusEvent
from protocol.errors import LocalError
from protocol.events import Beat
from protocol.jobs import Cancel, Decode, Done, Prefill, Release, Replay
from protocol.out import Decoding, Prefilled, StepFrame
from router import dispatch
from router.scheduling.limits import Limits
from tests.unit.router.dispatch_world import (
    SUBJECTS,
    delta,
    dispatching,
    handle,
)


async def test_one_choice_from_submit_to_done() -> None:
    async with dispatching() as world:
        p, d = await world.worker("p", "prefill"), await world.worker("d", "decode")
        client = world.submit()
        prefill = await p.job(Prefill)
        assert isinstance(prefill, Prefill)
        p.say(Prefilled(prefill.attempt, 16, 0, delta(prefill.attempt, 0), handle()))
        decode = await d.job(Decode)
        assert isinstance(decode, Decode)
        assert (decode.handle, decode.output, decode.chars_sent) == (handle(), b"\0\0\0\0", 1)
        d.say(Decoding(decode.attempt), StepFrame([delta(decode.attempt, 1)]))
        assert await p.job(Release) == Release(["h"])
        d.say(StepFrame([delta(decode.attempt, 2, finish=True)]))
        await client.end()
        assert client.error is None
        assert client.ids == [0, 1, 2]
        assert await p.job(Done) == Done([prefill.attempt])
        assert await d.job(Done) == Done([decode.attempt])
        assert world.dispatch.num_attempts == world.dispatch.num_inflight == 0


async def test_what_one_turn_says_to_one_worker_is_one_envelope() -> None:
    async with dispatching() as world:
        p = await world.worker("p", "prefill")
        await world.worker("d", "decode")
        for number in range(3):
            world.submit(f"q{number}/0")
        await p.job(Prefill, 2)
        assert len(p.envelopes) == 1


def test_a_deadline_that_is_due_at_once_is_no_trouble(monkeypatch: pytest.MonkeyPatch) -> None:
    """uvloop's handle of such a timer knows no time; a process that stands still for a moment
    between looking at the clock and arming gets one."""
    monkeypatch.setattr(dispatch, "_TICK_S", 0.0)

    async def submit_two() -> None:
        async with dispatching(Limits(accept_timeout_s=0.0)) as world:
            p = await world.worker("p", "prefill")
            await world.worker("d", "decode")
            world.submit("q0/0")
            world.submit("q1/0")
            await p.job(Prefill, 1)

    uvloop.run(submit_two())


async def test_nobody_listening_moves_the_job_at_once() -> None:
    async with dispatching() as world:
        dead = await world.worker("p0", "prefill", "dead")
        await dead.subscription.close()
        await world.worker("d", "decode")
        world.submit()
        live = await world.worker("p1", "prefill", "alive")
        await live.job(Prefill)
        assert dead.jobs == []
        assert world.metrics.registry.get_sample_value(
            "baton_events_total", {"kind": "gone", "cause": "unreachable"}
        )


async def test_nobody_listening_for_a_dead_incarnation_does_not_harm_its_successor() -> None:
    async with dispatching() as world:
        await world.worker("d", "decode")
        p = await world.worker("p", "prefill", "second")
        world.submit()
        await p.job(Prefill)
        world.bus.publish(
            SUBJECTS.jobs("p", "first"), b"", reply=SUBJECTS.gone("router", "p", "first")
        )
        await world.settle()
        assert world.dispatch.num_attempts == 1
        assert [v.suspected for v in world.dispatch.scheduler.workers()] == [False, False]


async def test_when_the_bus_comes_back_every_attempt_is_asked_for() -> None:
    async with dispatching(Limits(accept_timeout_s=30.0)) as world:
        p = await world.worker("p", "prefill")
        await world.worker("d", "decode")
        world.submit()
        prefill = await p.job(Prefill)
        world.hub.down()
        world.hub.up()
        assert await p.job(Replay) == Replay(prefill.attempt, 0)  # type: ignore[union-attr]


async def test_losses_on_our_side_are_asked_for_together() -> None:
    async with dispatching(Limits(accept_timeout_s=30.0)) as world:
        p = await world.worker("p", "prefill")
        await world.worker("d", "decode")
        world.submit()
        prefill = await p.job(Prefill)
        p.say(Prefilled(99, 1, 0))  # it has said something to us
        await p.job(Cancel)
        out = SUBJECTS.out_all("router")
        for subject in (out, out, out, SUBJECTS.all_events):
            world.dispatch._on_bus_event(BusEvent("lost", subject, 1))
        await p.job(Replay)
        await world.settle()
        assert p.of(Replay) == [Replay(prefill.attempt, 0)]  # type: ignore[union-attr]
        assert world.metrics.registry.get_sample_value("baton_bus_lost_messages_total") == 4


async def test_a_full_bus_is_counted_and_the_deadlines_go_on() -> None:
    async with dispatching(Limits(accept_timeout_s=0.2)) as world:
        p = await world.worker("p", "prefill")
        d = await world.worker("d", "decode", "inc2")
        world.bus._pending_bytes = 10
        client = world.submit()
        for _ in range(3):
            await asyncio.sleep(0)
        assert world.metrics.registry.get_sample_value("baton_bus_lost_messages_total") == 1
        world.bus._pending_bytes = 1 << 20
        await d.job(Decode)
        assert p.of(Prefill) == []
        assert not client.over


async def test_a_choice_is_submitted_once() -> None:
    async with dispatching() as world:
        p = await world.worker("p", "prefill")
        await world.worker("d", "decode")
        client = world.submit()
        with pytest.raises(LocalError):
            world.submit()
        prefill = await p.job(Prefill)
        p.say(Prefilled(prefill.attempt, 1, 0, delta(prefill.attempt, 0, finish=True)))  # type: ignore[union-attr]
        await client.end()
        assert client.error is None


async def test_a_defect_of_one_command_does_not_stop_the_others(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with dispatching() as world:
        client = world.submit()  # no model: it ends at once
        assert client.over
        assert client.error is not None
        assert client.error.status == 404
        with pytest.raises(AssertionError):
            client.ended(None, None)  # type: ignore[arg-type]
        await world.worker("p", "prefill")
        await world.worker("d", "decode")
        second = world.submit("q2/0")
        second.over = True  # its sink will raise
        world.dispatch.cancel("q2/0")
        assert "command failed command=EndChoice" in caplog.text
        assert world.dispatch.num_inflight == world.dispatch.num_attempts == 0


async def test_a_defect_of_the_scheduler_ends_the_submitted_choice(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async with dispatching() as world:

        def broken(*_: object) -> None:
            raise LocalError("a rule was broken")

        monkeypatch.setattr(world.dispatch.scheduler, "handle", broken)
        client = world.submit()
        assert client.error is not None
        assert (client.error.status, client.error.code) == (500, "internal_error")
        assert "event failed event=Submitted" in caplog.text


async def test_leaving_says_cancel_and_goodbye() -> None:
    async with dispatching() as world:
        p = await world.worker("p", "prefill")
        await world.worker("d", "decode")
        world.submit()
        prefill = await p.job(Prefill)
        world.dispatch.cancel("q/0")
        world.dispatch.leave()
        await world.settle()
        assert p.of(Cancel) == [Cancel(prefill.attempt)]  # type: ignore[union-attr]
        assert world.beats[0] == Beat("router")
        assert world.beats[-1] == Beat("router", leaving=True)


async def test_queue_time_is_observed_once_per_choice() -> None:
    async with dispatching(Limits(accept_timeout_s=0.05)) as world:
        for name in ("p", "q"):
            await world.worker(name, "prefill", f"inc-{name}")
        await world.worker("d", "decode")
        world.submit()
        p, q, _ = world.workers
        await p.job(Prefill)
        await q.job(Prefill)
        value = world.metrics.registry.get_sample_value("baton_queue_seconds_count", {"model": "m"})
        assert value == 1


async def test_a_router_whose_bus_is_away_at_the_start_waits_with_its_clocks() -> None:
    async with dispatching() as world:
        world.hub.down()
        assert world.dispatch.scheduler._t.frozen_at is not None
        world.hub.up()
        assert world.dispatch.scheduler._t.frozen_at is None
