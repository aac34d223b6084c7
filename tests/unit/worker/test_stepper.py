"""Engines with nothing imitated: their tokens wherever they are computed, and what they tell."""

import asyncio
from collections.abc import Callable
from dataclasses import replace

import pytest

from protocol.sampling import Sampling
from tests.unit.worker.engine_world import (
    GREEDY,
    RANDOM,
    SMALL,
    hand_over,
    prompt_of,
    running,
    text_of,
)
from worker.engine.simulated import expected_tokens
from worker.transfer.base import Transfer
from worker.transfer.shm import ShmTransfer
from worker.transfer.tcp import TcpTransfer

MAKERS: list[Callable[[], Transfer]] = [ShmTransfer, lambda: TcpTransfer(host="127.0.0.1")]


@pytest.mark.parametrize("maker", MAKERS, ids=["shm", "tcp"])
@pytest.mark.parametrize("sampling", [GREEDY, RANDOM], ids=["greedy", "random"])
async def test_handed_over_choice_equals_the_expected_one(
    maker: Callable[[], Transfer], sampling: Sampling
) -> None:
    async with (
        running(transfers=[maker()], worker="p") as p,
        running(transfers=[maker()], worker="d") as d,
    ):
        for num_tokens in (1, 3, 4, 5, 8, 33):
            prompt = prompt_of(num_tokens, salt=num_tokens)
            result, attempt = await hand_over(p, d, prompt, sampling)
            wanted = expected_tokens(prompt, sampling, 24, SMALL)
            assert result.first is not None
            assert result.handle is not None
            assert result.prompt_tokens == num_tokens
            assert result.handle.num_tokens == num_tokens
            assert result.first.index == 0
            assert attempt.deltas[0].index == 1
            assert result.first.ids + attempt.ids == wanted
            assert result.first.text + attempt.text == text_of(wanted)
            assert attempt.finish == "length"
            assert attempt.decoding is not None
            assert attempt.decoding.transport == d.info.transports[0]
            num_blocks = -(-num_tokens // SMALL.block_size)
            assert attempt.decoding.transfer_bytes == num_blocks * 4 * 16
        stats = d.stepper.stats()
        assert stats.transfers == {(d.info.transports[0], "ok"): 6}
        assert stats.decoded_tokens == 6 * 23
        await p.idle()
        assert p.stepper.stats().leases_ended == {"released": 6, "revoked": 0, "expired": 0}


async def test_first_transport_that_fits_is_used_and_none_that_fits_fails() -> None:
    async with (
        running(transfers=[TcpTransfer(host="127.0.0.1")]) as p,
        running(transfers=[ShmTransfer(), TcpTransfer(host="127.0.0.1")]) as d,
        running(transfers=[ShmTransfer()]) as other,
    ):
        _, attempt = await hand_over(p, d, prompt_of(9))
        assert attempt.decoding is not None
        assert attempt.decoding.transport == "tcp"
        _, attempt = await hand_over(p, other, prompt_of(9))
        assert attempt.failed is not None
        assert (attempt.failed.leg, attempt.failed.code) == ("transfer", "transfer_failed")
        assert "shm" in attempt.failed.message


async def test_many_choices_at_once_on_both_paths() -> None:
    config = replace(SMALL, num_blocks=256)
    async with running(config, worker="p") as p, running(config, worker="d") as d:
        prompts = [prompt_of(3 + index, salt=index) for index in range(20)]
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(hand_over(p, d, prompt, RANDOM)) for prompt in prompts]
            keys = [d.decode(prompt, RANDOM) for prompt in prompts]
        for prompt, task, key in zip(prompts, tasks, keys, strict=True):
            wanted = expected_tokens(prompt, RANDOM, 24, config)
            result, attempt = task.result()
            assert result.first is not None
            assert result.first.ids + attempt.ids == wanted
            alone = await d.over(key)
            assert (alone.ids, alone.text) == (wanted, text_of(wanted))


async def test_choice_goes_on_from_any_token_with_equal_tokens_and_text() -> None:
    sampling = Sampling(max_tokens=20, temperature=1.0, seed=3, stop=["zzz", "qqq"])
    prompt = prompt_of(10)
    wanted = expected_tokens(prompt, sampling, 20, SMALL)
    async with running(worker="p") as p, running(worker="d") as d:
        whole = await d.over(d.decode(prompt, sampling))
        assert whole.ids == wanted
        for number in range(1, 20):
            sent = "".join(delta.text for delta in whole.deltas[:number])
            given = {"output_ids": wanted[:number], "chars_sent": len(sent)}
            rest = await d.over(d.decode(prompt, sampling, **given))
            assert rest.deltas[0].index == number
            assert (rest.ids, rest.text) == (wanted[number:], whole.text[len(sent) :])
            first = (await p.over(p.prefill(prompt, sampling, **given))).prefilled
            assert first is not None
            assert first.first is not None
            assert first.first.index == number
            assert first.first.ids == wanted[number : number + 1]
            if first.handle is not None:
                p.stepper.release([first.handle.handle_id])


async def test_handle_of_an_older_prefill_serves_a_longer_output() -> None:
    prompt, wanted = prompt_of(10), expected_tokens(prompt_of(10), GREEDY, 24, SMALL)
    async with running(worker="p") as p, running(worker="d") as d:
        result = (await p.over(p.prefill(prompt))).prefilled
        assert result is not None
        assert result.handle is not None
        for number in (0, 1, 7, 20):
            output = wanted[:number]
            key = d.decode(prompt, handle=result.handle, output_ids=output, chars_sent=number)
            assert (await d.over(key)).ids == wanted[number:]
        p.stepper.release([result.handle.handle_id])


async def test_cached_prefix_is_not_computed_again_and_the_tokens_are_equal() -> None:
    async with running() as w:
        for num_tokens, cached in ((13, 12), (12, 8), (4, 0), (1, 0)):
            prompt = prompt_of(num_tokens, salt=num_tokens)
            first = await w.over(w.decode(prompt))
            again = await w.over(w.decode(prompt))
            assert first.decoding is not None
            assert again.decoding is not None
            assert (first.decoding.cached_tokens, again.decoding.cached_tokens) == (0, cached)
            assert first.ids == again.ids == expected_tokens(prompt, GREEDY, 24, SMALL)


async def test_output_is_cached_too_and_salt_keeps_caches_apart() -> None:
    async with running() as w:
        prompt = prompt_of(9)
        first = await w.over(w.decode(prompt))
        longer = prompt + first.ids[:16]
        assert (await w.over(w.decode(longer))).decoding is not None
        assert w.stepper.stats().cached_tokens == 24
        await w.over(w.decode(longer, cache_salt="mine"))
        assert w.stepper.stats().cached_tokens == 24


async def test_only_missing_blocks_are_pulled() -> None:
    async with running(worker="p") as p, running(worker="d") as d:
        prompt = prompt_of(14)
        await d.over(d.decode(prompt[:9]))
        _, attempt = await hand_over(p, d, prompt)
        assert attempt.decoding is not None
        assert attempt.decoding.transfer_bytes == 2 * 4 * 16
        assert attempt.ids == expected_tokens(prompt, GREEDY, 24, SMALL)[1:]
        again = (await hand_over(p, d, prompt))[1]
        assert again.decoding is not None
        assert again.decoding.transfer_bytes == 4 * 16
        boundary = prompt_of(16)
        await d.over(d.decode(boundary))
        local = (await hand_over(p, d, boundary))[1]
        assert local.decoding is not None
        assert (local.decoding.transport, local.decoding.transfer_bytes) == ("cache", 0)
        assert local.ids == expected_tokens(boundary, GREEDY, 24, SMALL)[1:]


@pytest.mark.parametrize("at", [0, 30, 64 * 4 - 1])
async def test_one_wrong_byte_in_lent_blocks_changes_the_tokens(at: int) -> None:
    prompt = prompt_of(16)
    async with running(worker="p") as p, running(worker="d") as d:
        result = (await p.over(p.prefill(prompt))).prefilled
        assert result is not None
        assert result.handle is not None
        assert result.first is not None
        used = [i for i in range(64) if any(p.arena.block(i))]
        p.arena.block(used[at // 64])[at % 64] ^= 1
        key = d.decode(prompt, handle=result.handle, output_ids=result.first.ids)
        wanted = expected_tokens(prompt, GREEDY, 24, SMALL)
        assert (await d.over(key)).ids != wanted[1:]
        p.stepper.release([result.handle.handle_id])


async def test_wrong_byte_in_the_prefix_cache_changes_the_tokens() -> None:
    async with running() as w:
        prompt = prompt_of(16)
        right = await w.over(w.decode(prompt))
        w.arena.block(0)[5] ^= 1
        assert (await w.over(w.decode(prompt))).ids != right.ids


async def test_too_small_a_pool_preempts_the_youngest_and_all_tokens_are_right() -> None:
    config = replace(SMALL, num_blocks=12)
    sampling = Sampling(max_tokens=30, temperature=1.0, seed=5)
    async with running(config) as w:
        prompts = [prompt_of(6, salt=index) for index in range(6)]
        keys = [w.decode(prompt, sampling) for prompt in prompts]
        for prompt, key in zip(prompts, keys, strict=True):
            attempt = await w.over(key)
            assert attempt.ids == expected_tokens(prompt, sampling, 30, config)
            assert attempt.text == text_of(attempt.ids)
        assert w.stepper.stats().preemptions > 0


async def test_pulled_choice_that_is_preempted_is_computed_again_here() -> None:
    config = replace(SMALL, num_blocks=12)
    async with running(SMALL, worker="p") as p, running(config, worker="d") as d:
        prompts = [prompt_of(8, salt=index) for index in range(4)]
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(hand_over(p, d, prompt)) for prompt in prompts]
        for prompt, task in zip(prompts, tasks, strict=True):
            assert task.result()[1].ids == expected_tokens(prompt, GREEDY, 24, config)[1:]
        assert d.stepper.stats().preemptions > 0


async def test_long_prompt_is_computed_in_chunks_beside_a_decoding_choice() -> None:
    async with running(max_step_tokens=16) as w:
        w.runner.shut()
        short = w.decode(prompt_of(3), Sampling(max_tokens=60))
        await w.runner.entered.wait()
        long = w.prefill(prompt_of(100, salt=1), Sampling(max_tokens=1))
        w.runner.open()
        await w.over(short)
        await w.over(long)
        beside = [step for step in w.runner.steps if len(step) == 2]
        assert [chunk for _, chunk in beside] == [
            (start, min(15, 100 - start), start + 15 >= 100) for start in range(0, 100, 15)
        ]
        assert {chunk[1:] for chunk, _ in beside} == {(1, True)}


async def test_progress_is_told_twice_a_second_at_most() -> None:
    async with running(max_step_tokens=4) as w:
        key = w.prefill(prompt_of(40), Sampling(max_tokens=1))
        assert (await w.over(key)).progress == []
        w.runner.shut()
        key = w.prefill(prompt_of(40, salt=1), Sampling(max_tokens=1))
        await w.runner.entered.wait()
        w.clock.ahead_s += 0.6
        w.runner.open()
        assert (await w.over(key)).progress == [("prefill", 4, 40)]


async def test_accepted_is_said_only_if_nothing_else_is() -> None:
    async with running(max_step_tokens=4) as w:
        w.runner.shut()
        blocker = w.decode(prompt_of(3))
        await w.runner.entered.wait()
        w.runner.open()
        long = await w.over(w.decode(prompt_of(40)))
        await w.over(blocker)
        assert long.accepted == 1
        assert (await w.over(w.decode(prompt_of(3, salt=2)))).accepted == 0


async def test_steps_move_while_there_is_work_and_rest_when_there_is_none() -> None:
    async with running() as w:
        await w.over(w.decode(prompt_of(10)))
        await w.idle()
        before = w.stepper.load().steps
        assert before >= 24
        await w.idle()
        assert w.stepper.load().steps == before


async def test_kv_events_and_snapshot_agree_over_evictions() -> None:
    async with running(replace(SMALL, num_blocks=16)) as w:
        for salt in range(10):
            await w.over(w.decode(prompt_of(14, salt=salt)))
            snapshot = w.stepper.kv_snapshot()
            assert snapshot.last_id == w.recorder.last_event
            assert set(snapshot.hashes) == w.recorder.cached
        assert w.recorder.cached


async def test_jobs_that_wait_for_a_place_are_told_of_while_the_engine_turns() -> None:
    """Twice a second; while a step hangs, nobody is said to be alive."""
    many = Sampling(max_tokens=4000, temperature=0.0, ignore_eos=True)
    async with running(replace(SMALL, num_blocks=1100), max_running=1) as world:
        first = world.decode(prompt_of(9), many)
        waiting = world.prefill(prompt_of(9, salt=1))
        told = world.recorder.of(waiting).progress
        await world.recorder.until(lambda: world.stepper.load().waiting)
        world.runner.shut()
        await world.runner.entered.wait()
        world.clock.ahead_s += 1.0
        assert told == []
        world.runner.open()
        await world.recorder.until(lambda: told)
        assert told[0] == ("prefill", 0, 0)
        world.stepper.cancel(first)
        result = (await world.over(waiting)).prefilled
        assert result is not None
        assert result.handle is not None
        world.stepper.release([result.handle.handle_id])


class Panic(BaseException):
    """As the panics of a library in Rust: not an `Exception`."""


@pytest.mark.parametrize("crash", [Panic("at some line"), None], ids=["panic", "a rule is broken"])
async def test_crash_of_the_thread_ends_the_engine_aloud(crash: BaseException | None) -> None:
    async with running() as world:
        world.healthy = False
        world.runner.crash = crash
        world.runner.forgets_a_token = crash is None
        attempt = await world.over(world.decode(prompt_of(9)))
        assert attempt.failed is not None
        assert attempt.failed.code == "engine"
        await world.recorder.until(lambda: world.recorder.reasons)
        assert world.recorder.reasons == [attempt.failed.message]
        assert attempt.failed.message.startswith("the engine failed: ")
        late = await world.over(world.decode(prompt_of(9)))
        assert late.failed == attempt.failed
