"""The engine over the stand-in: legs, handles, endings, faults. Real sockets, a real process."""

import asyncio
import signal
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace

import msgspec
import pytest

from protocol.errors import ConfigError
from protocol.handoff import KvHandle
from protocol.ids import JobKey
from protocol.out import Delta
from protocol.sampling import Sampling
from tests.contract.nats_server import free_port
from tests.unit.worker.vllm.standin import next_token
from tests.unit.worker.vllm.vllm_world import GREEDY, Standin, World, standin, started, world_of
from text.tokenizer import Tokenizer
from worker.engine.base import DecodeJob
from worker.engine.vllm.engine import VllmEngine

PROMPT = list(range(300, 370))


def continuation(ids: list[int], count: int) -> list[int]:
    """What the stand-in says after `ids`."""
    ids = list(ids)
    for _ in range(count):
        ids.append(next_token(ids))
    return ids[-count:]


@pytest.fixture(scope="module")
def shared() -> Iterator[Standin]:
    with standin() as process:
        yield process


@pytest.fixture
async def world(shared: Standin) -> AsyncIterator[World]:
    async with world_of(shared) as world:
        yield world


@pytest.fixture
async def engine(world: World) -> AsyncIterator[VllmEngine]:
    async with started(world) as engine:
        yield engine


async def lent(world: World, engine: VllmEngine, prompt: list[int] = PROMPT) -> KvHandle:
    key = await world.run(engine, world.prefill(prompt))
    handle = world.heard.results[key].handle
    assert handle is not None
    return handle


# --- legs ---


async def test_a_prefill_leg_lends_and_says_no_first_token(
    world: World, engine: VllmEngine
) -> None:
    key = await world.run(engine, world.prefill(PROMPT, cache_salt="s"))
    result = world.heard.results[key]
    assert (result.first, result.prompt_tokens, result.cached_tokens) == (None, 70, 32)
    assert result.handle is not None
    assert (result.handle.num_tokens, result.handle.ranks) == (70, [])
    [body] = await world.seen()
    assert (body["max_tokens"], body["stream"], body["prompt"]) == (1, False, PROMPT)
    assert body["kv_transfer_params"] == {"do_remote_decode": True, "do_remote_prefill": False}
    assert body["cache_salt"] == "s"
    assert engine.load().lent_blocks == 3


async def test_a_decode_leg_sends_vllms_own_object_and_streams(
    world: World, engine: VllmEngine
) -> None:
    handle = await lent(world, engine)
    key = await world.run(engine, world.decode(PROMPT, handle=handle))
    body = (await world.seen())[-1]
    assert body["kv_transfer_params"]["remote_request_id"] == "cmpl-x"
    assert body["kv_transfer_params"]["do_remote_prefill"] is True
    assert world.heard.ids(key) == continuation(PROMPT, 8)
    assert world.heard.last(key).finish == "length"
    assert world.heard.infos[key].transport == "vllm"
    assert world.heard.infos[key].source == "w"
    assert [delta.index for delta in world.heard.deltas[key]] == sorted(
        {delta.index for delta in world.heard.deltas[key]}
    )


@pytest.mark.parametrize(
    "change", ["prompt", "length", "output", "salt", "model", "block", "opaque"]
)
async def test_a_handle_never_reaches_vllm_with_anything_it_was_not_made_for(
    world: World, engine: VllmEngine, change: str
) -> None:
    handle = await lent(world, engine)
    before = len(await world.seen())
    prompt, output, salt = list(PROMPT), [], ""
    match change:
        case "prompt":
            prompt[3] += 1
        case "length":
            prompt = prompt[:-1]
        case "output":
            output = [7]
        case "salt":
            salt = "other"
        case "model":
            handle = msgspec.structs.replace(handle, content_hash=b"x" * 16)
        case "block":
            handle = msgspec.structs.replace(handle, block_size=16)
        case _:
            handle = msgspec.structs.replace(handle, opaque=msgspec.Raw(b"\xc0"))
    job = world.decode(prompt, handle=handle, output_ids=output, cache_salt=salt)
    key = await world.run(engine, job)
    assert world.heard.errors[key].code == "handle_mismatch"
    assert len(await world.seen()) == before


async def test_a_handle_near_the_end_of_its_lease_is_not_used(
    world: World, engine: VllmEngine
) -> None:
    handle = await lent(world, engine)
    world.wall_s = 25.0
    key = await world.run(engine, world.decode(PROMPT, handle=handle))
    assert world.heard.errors[key].code == "lease_lost"
    assert len(await world.seen()) == 1


async def test_a_resume_goes_on_behind_the_output(world: World, engine: VllmEngine) -> None:
    whole = continuation(PROMPT, 8)
    sampling = replace_sampling(seed=5, min_tokens=6, temperature=0.7)
    job = world.decode(PROMPT, sampling=sampling, output_ids=whole[:3])
    key = await world.run(engine, job)
    assert world.heard.ids(key) == whole[3:]
    assert world.heard.deltas[key][0].index == 3
    body = (await world.seen())[-1]
    assert (body["prompt"], body["max_tokens"], body["min_tokens"]) == (PROMPT + whole[:3], 5, 3)
    assert body["seed"] != 5
    assert "kv_transfer_params" not in body


async def test_a_resumed_prefill_lends_prompt_and_output(world: World, engine: VllmEngine) -> None:
    whole = continuation(PROMPT, 8)
    key = await world.run(engine, world.prefill(PROMPT, output_ids=whole[:3]))
    handle = world.heard.results[key].handle
    assert handle is not None
    assert handle.num_tokens == 73
    key = await world.run(engine, world.decode(PROMPT, handle=handle, output_ids=whole[:3]))
    assert world.heard.ids(key) == whole[3:]


def replace_sampling(**changes: object) -> Sampling:
    return msgspec.structs.replace(GREEDY, **changes)


async def test_one_token_only_still_needs_a_decode_leg(world: World, engine: VllmEngine) -> None:
    sampling = replace_sampling(max_tokens=1)
    key = await world.run(engine, world.prefill(PROMPT, sampling=sampling))
    handle = world.heard.results[key].handle
    assert handle is not None
    key = await world.run(engine, world.decode(PROMPT, sampling=sampling, handle=handle))
    assert world.heard.ids(key) == continuation(PROMPT, 1)


# --- endings ---


async def test_a_stop_string_ends_it_here_and_at_vllm(world: World, engine: VllmEngine) -> None:
    await world.behave(hang_after=8)
    tokenizer: Tokenizer = engine._tokenizer
    text = tokenizer.decode(continuation(PROMPT, 8))
    stop = text[len(text) // 2 :][:2]
    sampling = replace_sampling(max_tokens=20, stop=[stop])
    key = await world.run(engine, world.decode(PROMPT, sampling=sampling))
    assert world.heard.last(key).stop == stop
    assert world.heard.text(key) == text[: text.index(stop)]
    await world.until_running(0)
    assert "stop" not in (await world.seen())[-1]


async def test_chunks_of_several_tokens_are_one_delta(world: World, engine: VllmEngine) -> None:
    await world.behave(per_chunk=3)
    key = await world.run(engine, world.decode(PROMPT, sampling=replace_sampling(logprobs=1)))
    assert world.heard.ids(key) == continuation(PROMPT, 8)
    first = world.heard.deltas[key][0]
    assert len(first.ids) == 3
    assert first.logprobs is not None
    assert [entry.top for entry in first.logprobs] == [[(token, -0.25)] for token in first.ids]


async def test_an_end_that_only_vllm_knows_is_an_end(world: World, engine: VllmEngine) -> None:
    await world.behave(stop_after=4)
    key = await world.run(engine, world.decode(PROMPT))
    assert world.heard.ids(key) == continuation(PROMPT, 4)
    assert (world.heard.last(key).finish, world.heard.last(key).stop) == ("stop", None)
    assert world.heard.text(key) == engine._tokenizer.decode(continuation(PROMPT, 4))


async def test_prompt_logprobs_come_on_either_leg(world: World, engine: VllmEngine) -> None:
    sampling = replace_sampling(prompt_logprobs=1, logprobs=1)
    key = await world.run(engine, world.prefill(PROMPT, sampling=sampling))
    scores = world.heard.results[key].prompt_logprobs
    assert scores is not None
    assert (scores[0], len(scores)) == (None, 70)
    assert scores[1] is not None
    assert (scores[1].logprob, scores[1].top) == (-2.5, [(7, -0.5)])
    key = await world.run(engine, world.decode(PROMPT, sampling=sampling))
    assert world.heard.infos[key].prompt_logprobs == scores


async def test_cancel_closes_the_stream_and_nothing_more_is_heard(
    world: World, engine: VllmEngine
) -> None:
    await world.behave(hang_after=2)
    job = world.decode(PROMPT)
    engine.submit(job)
    await world.heard.until(lambda: len(world.heard.ids(job.key)) == 2)
    assert engine.load().running == 1
    engine.delta(job.key, Delta(job.key.attempt, 2, [9], "read, and not said yet"))
    engine.cancel(job.key)
    heard = len(world.heard.deltas[job.key])
    await world.until_running(0)
    assert len(world.heard.deltas[job.key]) == heard
    assert job.key not in world.heard.errors
    engine.cancel(JobKey("r", 999))


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
