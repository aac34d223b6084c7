"""The engine over the stand-in: what legs ask and tell, handles, endings. Real sockets."""

import asyncio
import gc

import msgspec
import pytest
from msgspec.structs import replace

from protocol.ids import JobKey
from protocol.out import Delta
from tests.unit.worker.vllm.vllm_world import (
    PROMPT,
    World,
    continuation,
    lent,
    replace_sampling,
    started,
)
from text.tokenizer import Tokenizer
from worker.engine.vllm.engine import VllmEngine

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
    assert body["ignore_eos"] is True
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


async def test_a_stream_that_vllm_ends_leaves_its_connection_to_the_next(
    world: World, engine: VllmEngine
) -> None:
    await world.behave(pause_before_done=0.05)
    for _ in range(3):
        await world.run(engine, world.decode(PROMPT))
        await world.until_running(0)
    assert len(set(await world.peers())) == 1


async def test_stop_ends_a_leg_that_reads_on_behind_its_last_token(world: World) -> None:
    await world.behave(pause_before_done=60.0)
    async with started(world) as engine:
        await world.run(engine, world.decode(PROMPT))
    assert not [task for task in asyncio.all_tasks() if task.get_name().startswith("leg ")]


async def test_what_fails_behind_the_last_token_is_no_error(
    world: World, engine: VllmEngine, caplog: pytest.LogCaptureFixture
) -> None:
    for how in ({"late_error": True}, {"break_after": 8}):
        await world.behave(**how)
        key = await world.run(engine, world.decode(PROMPT))
        await world.until_running(0)
        assert (world.heard.ids(key), world.heard.errors) == (continuation(PROMPT, 8), {})
    gc.collect()  # a leg that ended in an exception would be told of now
    assert "never retrieved" not in caplog.text


async def test_ids_of_a_chunk_behind_the_stop_string_are_not_said(
    world: World, engine: VllmEngine
) -> None:
    await world.behave(per_chunk=8)
    ids = continuation(PROMPT, 8)
    whole = engine._tokenizer.decode(ids)
    before = engine._tokenizer.decode(ids[:3])
    stop = whole[len(before) : len(before) + 2]
    sampling = replace_sampling(max_tokens=20, stop=[stop])
    key = await world.run(engine, world.decode(PROMPT, sampling=sampling))
    assert world.heard.text(key) == whole[: whole.index(stop)]
    said = world.heard.ids(key)
    assert len(said) < 8
    assert said == ids[: len(said)]
    assert world.heard.last(key).stop == stop


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


async def test_two_clients_may_name_their_requests_alike(world: World, engine: VllmEngine) -> None:
    for router in ("r", "s"):
        job = replace(world.decode(PROMPT), key=JobKey(router, 7), choice="same name/0")
        await world.run(engine, job)
    assert await world.request_ids() == ["same-name-0-r-7", "same-name-0-s-7"]


@pytest.mark.parametrize("phase", ["prefill", "pull", "local", "scores"])
async def test_cancel_before_the_first_token_closes_the_request(
    world: World, engine: VllmEngine, phase: str
) -> None:
    handle = await lent(world, engine)
    await world.behave(hang_before=True, hang_whole=True)
    scored = replace_sampling(prompt_logprobs=1)
    job = {
        "prefill": world.prefill(PROMPT),
        "pull": world.decode(PROMPT, handle=handle),
        "local": world.decode(PROMPT),
        "scores": world.decode(PROMPT, sampling=scored),
    }[phase]
    engine.submit(job)
    await world.until_running(1)
    engine.cancel(job.key)
    await world.until_running(0)
    assert not world.heard.is_over(job.key)
    assert engine.load().waiting == 0


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
