"""A router and real engines in one process, over a bus that breaks on purpose.

What a client gets is what an undisturbed run gives, and when all is over nothing is held anywhere.
"""

import asyncio
from dataclasses import replace

import pytest

from protocol.codec import decode_jobs, encode
from protocol.jobs import Decode, JobEnvelope
from protocol.sampling import Sampling
from tests.integration.path_world import PATIENCE_S, SMALL, Client, PathWorld, WorkerSide, path
from tests.unit.worker.engine_world import HeldTransfer
from worker.engine.simulated import expected_tokens

PROMPT = [(7 * index) % 250 for index in range(21)]
SLOW = replace(SMALL, step_s=0.003)
GREEDY = Sampling(24, 0.0)
SEEDED = Sampling(24, 0.9, seed=11)
OUT = "baton.test.out.router.*"


def expected(prompt: list[int], sampling: Sampling) -> list[int]:
    return expected_tokens(prompt, sampling, sampling.max_tokens, SMALL)


async def answered(world: PathWorld, sampling: Sampling, num: int = 1) -> None:
    """`num` different prompts at once, all of them right."""
    prompts = [[number, *PROMPT] for number in range(num)]
    clients = [world.submit(prompt, sampling) for prompt in prompts]
    for prompt, client in zip(prompts, clients, strict=True):
        await client.end()
        assert client.error is None
        assert client.ids == expected(prompt, sampling)
        assert client.finish == "length"


@pytest.mark.parametrize("sampling", [GREEDY, SEEDED], ids=["greedy", "seeded"])
async def test_streams_are_what_the_model_says(sampling: Sampling) -> None:
    async with path(prefill=2, decode=2) as world:
        await answered(world, sampling, 20)
        assert world.router.sample("baton_handle_age_seconds_count", model="m") == 20
        assert world.router.sample("baton_queue_seconds_count", model="m") == 20
        assert world.router.events("replay") == 0
        await world.clean()


async def test_a_stop_string_ends_the_stream_and_is_not_in_it() -> None:
    text = bytes(expected(PROMPT, GREEDY)).decode()
    stop = text[9:12]
    async with path() as world:
        client = world.submit(PROMPT, Sampling(24, 0.0, stop=[stop]))
        await client.end()
        assert client.finish == "stop"
        assert client.text == text[: text.index(stop)]
        await world.clean()


async def test_one_token_needs_no_decode_worker() -> None:
    async with path() as world:
        client = world.submit(PROMPT, Sampling(1, 0.0))
        await client.end()
        assert client.ids == expected(PROMPT, Sampling(1, 0.0))
        assert world.by_role("decode")[0].engine.stats().decoded_tokens == 0
        await world.clean()


# -- the bus loses messages


@pytest.mark.parametrize("lost", [1, 2, 3, 5])
async def test_lost_answers_are_asked_for_again(lost: int) -> None:
    async with path() as world:
        world.hub.drop_next(lost, OUT)
        await answered(world, SEEDED, 3)
        assert world.router.events("resume") == 0
        await world.clean()


async def test_a_lost_tail_shows_in_the_load_reports() -> None:
    """All that the decode worker says is lost: nothing follows it that could show the gap."""
    async with path() as world:
        client = await _waiting_for_decode(world, GREEDY)
        worker = world.by_role("decode")[0]
        world.hub.drop_next(1000, OUT)
        await _run_dry(worker)
        await worker.bus.flush(timeout_s=PATIENCE_S)
        world.hub._drops.clear()
        assert not client.over
        await client.end()
        assert client.ids == expected(PROMPT, GREEDY)
        assert world.router.events("resume") == world.router.events("retry") == 0
        await world.clean()


async def test_a_lost_handle_is_told_again_though_it_is_lent() -> None:
    """`Prefilled` is lost: the replay brings the same handle, and no block is computed twice."""
    async with path() as world:
        world.hub.drop_next(1, "baton.test.out.router.p0")
        await answered(world, GREEDY)
        assert world.by_role("prefill")[0].engine.stats().prefilled_tokens == len(PROMPT) + 1
        assert world.router.events("retry") == 0
        await world.clean()


@pytest.mark.parametrize("worker", ["p0", "d0"])
async def test_lost_jobs_are_sent_elsewhere_or_again(worker: str) -> None:
    async with path(prefill=2, decode=2) as world:
        world.hub.drop_next(1, f"baton.test.jobs.{worker}.{worker}-1")
        await answered(world, GREEDY, 4)
        await world.clean()


async def test_an_outage_of_the_bus_is_a_hiccup() -> None:
    async with path() as world:
        client = await _waiting_for_decode(world, SEEDED)
        world.hub.down()
        await _run_dry(world.by_role("decode")[0])
        world.hub.up()
        await client.end()
        assert client.ids == expected(PROMPT, SEEDED)
        assert world.router.events("resume") == world.router.events("retry") == 0
        await world.clean()


async def test_a_frozen_bus_is_a_hiccup() -> None:
    async with path() as world:
        clients = [world.submit([n, *PROMPT], SEEDED) for n in range(4)]
        await clients[0].until(lambda: clients[0].ids)
        down = asyncio.Event()
        world.router.bus.on_event(lambda event: down.set() if event.kind == "down" else None)
        world.hub.freeze()
        async with asyncio.timeout(PATIENCE_S):
            await down.wait()
        world.hub.up()
        for number, client in enumerate(clients):
            await client.end()
            assert client.ids == expected([number, *PROMPT], SEEDED)
        await world.clean()


async def test_random_losses_leave_no_gap_no_repeat_and_nothing_behind() -> None:
    async with path(prefill=2, decode=2) as world:
        for number in range(12):
            world.hub.drop_next(1 + number % 3, OUT)
            if number % 4 == 3:
                world.hub.drop_next(1, "baton.test.jobs.>")
            await answered(world, SEEDED if number % 2 else GREEDY, 3)
        await world.clean()


async def test_a_decode_job_that_is_repeated_while_it_pulls_changes_nothing() -> None:
    async with path(hold=True) as world:
        worker = world.by_role("decode")[0]
        jobs: list[JobEnvelope] = []
        await worker.bus.subscribe(
            "baton.test.jobs.d0.d0-1", lambda message: jobs.append(decode_jobs(message.payload))
        )
        client = world.submit(PROMPT, GREEDY)
        await worker.transfer.arrived.wait()
        (envelope,) = [e for e in jobs if isinstance(e.jobs[0], Decode)]
        world.router.bus.publish("baton.test.jobs.d0.d0-1", encode(envelope))
        await world.router.bus.flush(timeout_s=PATIENCE_S)
        await _let_go(worker.transfer, client)
        assert client.ids == expected(PROMPT, GREEDY)
        await world.clean()


# -- cancel


async def test_cancel_before_the_job_is_taken() -> None:
    async with path() as world:
        client = world.submit(PROMPT, GREEDY)
        world.router.dispatch.cancel(client.spec.choice)
        await client.end()
        assert client.error is not None
        await world.clean()


async def test_cancel_while_it_is_prefilled() -> None:
    async with path() as world:
        runner = world.by_role("prefill")[0].runner
        runner.shut()
        client = world.submit(PROMPT, GREEDY)
        await runner.entered.wait()
        world.router.dispatch.cancel(client.spec.choice)
        runner.open()
        await client.end()
        await world.clean()


async def test_cancel_while_a_handle_waits_for_a_place() -> None:
    """The first token is here; no decode worker has been asked yet."""
    async with path() as world:
        client = world.submit(PROMPT, GREEDY)
        client.on_delta = lambda _delta: world.router.dispatch.cancel(client.spec.choice)
        await client.end()
        assert len(client.ids) == 1
        await world.clean()


async def test_cancel_during_the_pull() -> None:
    async with path(hold=True) as world:
        worker = world.by_role("decode")[0]
        client = world.submit(PROMPT, GREEDY)
        await worker.transfer.arrived.wait()
        world.router.dispatch.cancel(client.spec.choice)
        await client.end()
        await world.router.bus.flush(timeout_s=PATIENCE_S)
        worker.transfer.let_one_go()
        await world.clean()


async def test_cancel_while_it_decodes() -> None:
    async with path(config=SLOW) as world:
        client = world.submit(PROMPT, Sampling(2000, 0.0))
        await client.until(lambda: len(client.ids) > 5)
        world.router.dispatch.cancel(client.spec.choice)
        num_tokens = len(client.ids)
        await client.end()
        await world.clean()
        assert len(client.ids) == num_tokens


async def test_a_lost_cancel_is_said_again_to_whoever_still_talks() -> None:
    async with path(config=SLOW) as world:
        client = world.submit(PROMPT, Sampling(100_000, 0.0, ignore_eos=True))
        await client.until(lambda: len(client.ids) > 2)
        world.hub.drop_next(1, "baton.test.jobs.d0.>")
        world.router.dispatch.cancel(client.spec.choice)
        await world.clean()
        assert world.router.events("late") >= 1


# -- routers


async def test_a_router_that_restarts_under_its_name_starts_afresh() -> None:
    """The old one's jobs end with it; the new one's attempts have the same numbers."""
    async with path(config=SLOW) as world:
        first = world.router
        old = world.submit(PROMPT, Sampling(100_000, 0.0, ignore_eos=True))
        await old.until(lambda: len(old.ids) > 2)
        second = await world.add_router("router-again")
        await world.live()
        client = world.submit(PROMPT, GREEDY, second)
        await client.end()
        assert client.ids == expected(PROMPT, GREEDY)
        first.dispatch.leave()
        world.routers.remove(first)
        await world.clean()


async def test_a_sink_that_raises_harms_no_other_stream(caplog: pytest.LogCaptureFixture) -> None:
    def broken(_: object) -> None:
        raise ValueError("a broken client")

    async with path() as world:
        bad = world.submit([1, *PROMPT], GREEDY)
        bad.on_delta = broken
        good = world.submit([2, *PROMPT], GREEDY)
        await good.end()
        await bad.end()
        assert good.ids == expected([2, *PROMPT], GREEDY)
        assert bad.error is not None
        assert "a stream failed" in caplog.text
        await world.clean()


async def test_a_worker_that_leaves_at_once_hands_its_streams_over() -> None:
    async with path(decode=2, config=SLOW) as world:
        client = world.submit(PROMPT, Sampling(400, 0.8, seed=3, ignore_eos=True))
        await client.until(lambda: len(client.ids) > 5)
        busy = next(w for w in world.by_role("decode") if w.engine.load().running)
        busy.service.close()
        await client.end()
        assert client.ids == expected(PROMPT, Sampling(400, 0.8, seed=3, ignore_eos=True))
        assert world.router.events("resume") == 1
        await world.clean()


async def _waiting_for_decode(world: PathWorld, sampling: Sampling) -> Client:
    """The first token is here, and the decode worker stands before its first step."""
    runner = world.by_role("decode")[0].runner
    runner.shut()
    client = world.submit(PROMPT, sampling)
    async with asyncio.timeout(PATIENCE_S):
        await runner.entered.wait()
    await world.router.bus.flush(timeout_s=PATIENCE_S)
    assert len(client.ids) == 1
    return client


async def _run_dry(worker: WorkerSide) -> None:
    worker.runner.open()
    async with asyncio.timeout(PATIENCE_S):
        await worker.engine.drain()


async def _let_go(transfer: HeldTransfer, client: Client) -> None:
    for _ in range(2):  # the data, then the word
        async with asyncio.timeout(PATIENCE_S):
            while not transfer.num_held:
                transfer.arrived.clear()
                await transfer.arrived.wait()
        transfer.let_one_go()
    await client.end()
