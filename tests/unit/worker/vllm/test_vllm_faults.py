"""What goes wrong at vLLM or on the way to it, its start, and its numbers."""

import asyncio
import signal

import pytest
from msgspec.structs import replace

from protocol.errors import ConfigError
from protocol.sampling import Sampling
from tests.contract.nats_server import free_port
from tests.unit.worker.vllm.vllm_world import (
    PROMPT,
    World,
    continuation,
    lent,
    standin,
    started,
    world_of,
)
from worker.engine.base import DecodeJob
from worker.engine.vllm.engine import VllmEngine

# --- failures ---


@pytest.mark.parametrize(
    ("status", "param", "code"),
    [
        (400, None, "invalid_request"),
        (400, "input_tokens", "context_length"),
        (500, None, "engine"),
        (503, None, "engine"),
        (404, "model", "engine"),
    ],
)
async def test_refusals_of_vllm(
    world: World, engine: VllmEngine, status: int, param: str | None, code: str
) -> None:
    await world.behave(status=status, param=param, message="because")
    key = await world.run(engine, world.decode(PROMPT))
    assert world.heard.errors[key].code == code
    assert f"{status}: because" in world.heard.errors[key].message


async def test_a_pull_that_fails_is_the_transfers_fault(world: World, engine: VllmEngine) -> None:
    handle = await lent(world, engine)
    await world.behave(stream_error="Internal server error")
    key = await world.run(engine, world.decode(PROMPT, handle=handle))
    error = world.heard.errors[key]
    assert (error.code, error.leg) == ("transfer_failed", "transfer")
    key = await world.run(engine, world.decode(PROMPT))
    assert world.heard.errors[key].code == "engine"


async def test_a_stream_that_breaks_is_no_end(world: World, engine: VllmEngine) -> None:
    await world.behave(break_after=3)
    key = await world.run(engine, world.decode(PROMPT))
    assert world.heard.ids(key) == continuation(PROMPT, 3)
    error = world.heard.errors[key]
    assert (error.code, error.leg) == ("engine", "decode")


async def test_a_server_without_connector_is_named(world: World, engine: VllmEngine) -> None:
    await world.behave(no_connector=True)
    key = await world.run(engine, world.prefill(PROMPT))
    assert "KV connector" in world.heard.errors[key].message


async def test_a_version_that_sends_no_ids_is_named(world: World, engine: VllmEngine) -> None:
    await world.behave(no_ids=True)
    key = await world.run(engine, world.decode(PROMPT))
    assert "return_token_ids" in world.heard.errors[key].message


@pytest.mark.parametrize(
    ("job", "code"),
    [
        ({"prompt": []}, "invalid_request"),
        ({"prompt": [5] * 600}, "context_length"),
        ({"prompt": [1 << 20]}, "invalid_request"),
        ({"output_ids": [7], "sampling": Sampling(4, grammar="{}")}, "invalid_request"),
    ],
)
async def test_bad_jobs_never_reach_vllm(
    world: World, engine: VllmEngine, job: dict[str, object], code: str
) -> None:
    given = world.decode(PROMPT)
    key = await world.run(engine, replace(given, **job))  # type: ignore[arg-type]
    assert world.heard.errors[key].code == code
    assert await world.seen() == []


async def test_a_frozen_server_is_silent_and_then_alive_again(world: World) -> None:
    async with started(world, silent_s=1.5) as engine:
        await world.behave(hang_after=2)
        job: DecodeJob = world.decode(PROMPT)
        engine.submit(job)
        await world.heard.until(lambda: len(world.heard.ids(job.key)) == 2)
        world.signal(signal.SIGSTOP)
        await world.heard.until(lambda: job.key in world.heard.errors)
        steps = engine.load().steps
        assert world.heard.errors[job.key].code == "engine"
        assert "silent" in world.heard.errors[job.key].message
        late = await world.run(engine, world.decode(PROMPT))
        assert "silent" in world.heard.errors[late].message
        assert engine.load().waiting == 1
        assert engine.load().steps == steps
        world.signal(signal.SIGCONT)
        await world.behave()
        # new jobs are taken as soon as it has answered once
        await asyncio.wait_for(engine._watch.look(), 5.0)
        assert engine.load().steps > steps
        key = await world.run(engine, world.decode(PROMPT))
        assert world.heard.ids(key) == continuation(PROMPT, 8)
        assert world.heard.unwell == []


async def test_a_front_that_answers_for_a_frozen_engine_does_not_count_as_steps(
    world: World, engine: VllmEngine
) -> None:
    await engine._watch.look()
    steps = engine.load().steps
    await engine._watch.look()
    assert engine.load().steps > steps, "an idle server is well"
    await world.behave(hang_after=2)
    job = world.decode(PROMPT)
    engine.submit(job)
    await world.heard.until(lambda: len(world.heard.ids(job.key)) == 2)
    await engine._watch.look()  # which sees the two iterations
    steps = engine.load().steps
    for _ in range(3):
        await engine._watch.look()
    assert (engine.load().running, engine.load().steps) == (1, steps)


@pytest.mark.parametrize("phase", ["prefill", "before", "after"])
async def test_an_answer_that_never_comes_ends_though_the_server_is_lively(
    world: World, phase: str
) -> None:
    async with started(world, quiet_s=1.0) as engine:
        how = {"hang_whole": True} if phase == "prefill" else {f"hang_{phase}": 2}
        await world.behave(tick=1, **how)
        job = world.prefill(PROMPT) if phase == "prefill" else world.decode(PROMPT)
        key = await world.run(engine, job)
        assert world.heard.errors[key].code == "engine"
        assert "no answer in time" in world.heard.errors[key].message
        assert len(world.heard.ids(key)) == (2 if phase == "after" else 0)
        await world.until_running(0)


async def test_an_engine_that_froze_while_it_was_idle_makes_no_steps(
    world: World, engine: VllmEngine
) -> None:
    """Its front still says that nothing runs, of before the jobs came."""
    entry = engine._jobs
    handle = await lent(world, engine)
    await world.behave(hang_before=True, frozen=True)
    pull, local = world.decode(PROMPT, handle=handle), world.decode(PROMPT)
    engine.submit(pull)
    await world.until_running(1)
    await engine._watch.look()
    steps = engine.load().steps
    await engine._watch.look()
    assert engine.load().steps > steps, "a pull waits for the other side"
    entry[pull.key].since -= 16.0
    steps = engine.load().steps
    await engine._watch.look()
    assert engine.load().steps == steps, "but not for so long"
    engine.cancel(pull.key)
    engine.submit(local)
    await world.until_running(1)
    await engine._watch.look()
    assert engine.load().steps == steps
    assert engine.load().waiting == 1


async def test_a_long_prefill_shows_progress_and_a_pull_does_not(
    world: World, engine: VllmEngine
) -> None:
    handle = await lent(world, engine)
    await world.behave(hang_before=True, tick=1)
    pull, local = world.decode(PROMPT, handle=handle), world.decode(PROMPT)
    engine.submit(pull)
    engine.submit(local)
    await world.heard.until(lambda: world.heard.progressed.count(local.key) == 2)
    assert pull.key not in world.heard.progressed
    engine.cancel(pull.key)
    engine.cancel(local.key)
    await world.until_running(0)


async def test_a_dead_server_ends_the_worker() -> None:
    with standin() as process:
        async with world_of(process) as world, started(world) as engine:
            await world.behave(hang_after=2)
            job = world.decode(PROMPT)
            engine.submit(job)
            await world.heard.until(lambda: len(world.heard.ids(job.key)) == 2)
            world.signal(signal.SIGKILL)
            await world.heard.until(lambda: world.heard.unwell)
            assert world.heard.errors[job.key].code == "engine"
            assert len(world.heard.unwell) == 1


async def test_a_restarted_server_ends_the_worker(world: World, engine: VllmEngine) -> None:
    await world.behave(started_at=1.0)
    await world.heard.until(lambda: world.heard.unwell)
    assert "anew" in world.heard.unwell[0]


async def test_no_vllm_at_start_is_one_clear_line(world: World) -> None:
    url = f"http://127.0.0.1:{free_port()}"
    engine = world.engine(url=url, start_timeout_s=0.2)
    with pytest.raises(ConfigError, match=f"no vLLM at {url} after 0.2 s"):
        await engine.start(world.heard)
    await engine.stop()


async def test_a_model_that_is_not_here_needs_a_folder(world: World) -> None:
    engine = world.engine(model_folder="/nowhere")
    with pytest.raises(ConfigError, match="/nowhere does not exist"):
        await engine.start(world.heard)
    await engine.stop()


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({"models_status": 404}, "/v1/models answered 404"),
        ({"models_status": 401}, "/v1/models answered 401"),
        ({"metrics": "other"}, "/metrics is not vLLM's"),
        ({"root": "somebody/some-model"}, "somebody/some-model, which is no folder here"),
        ({"root": None}, "a model without a root, which is no folder here"),
    ],
)
async def test_what_cannot_be_driven_is_one_clear_line_at_once(
    world: World, how: dict[str, object], said: str
) -> None:
    await world.behave(**how)
    engine = world.engine(start_timeout_s=60.0)
    async with asyncio.timeout(10.0):
        with pytest.raises(ConfigError, match=said):
            await engine.start(world.heard)
    await engine.stop()


async def test_the_key_is_sent(world: World) -> None:
    await world.behave(key="secret")
    async with started(world, api_key="secret"):
        pass


# --- leases and numbers ---


async def test_drain_waits_for_leases_and_not_for_ever(world: World) -> None:
    async with started(world, lease_s=1.0) as engine:
        await lent(world, engine)
        fetched = await lent(world, engine)
        engine.release([fetched.handle_id])
        engine.renew([fetched.handle_id])
        async with asyncio.timeout(5.0):
            await engine.drain()
        assert engine.stats().leases_ended == {"released": 1, "expired": 1}


async def test_load_speaks_vllms_numbers(world: World, engine: VllmEngine) -> None:
    load = engine.load()
    assert (load.num_blocks, load.free_blocks, load.running, load.waiting) == (1000, 750, 0, 0)


async def test_what_it_is(world: World) -> None:
    engine = world.engine()
    info = await engine.start(world.heard)
    assert (info.model_name, info.engine) == ("demo", "vllm")
    assert (info.layout.block_size, info.capacity.max_context) == (32, 512)
    assert (info.traits.first_token, info.traits.release) == ("recomputed", "timeout")
    other = world.engine()
    assert (await other.start(world.heard)).model_digest == info.model_digest
    await engine.stop()
    await other.stop()
