"""Equal prompts that arrive together are computed once: the others wait for the blocks."""

import random
from dataclasses import replace

import msgspec
import pytest

from protocol.ids import JobKey
from protocol.sampling import Sampling
from tests.unit.worker.engine_world import (
    RANDOM,
    SMALL,
    Attempt,
    World,
    expected_of,
    prompt_of,
    running,
)

ROOMY = replace(SMALL, num_blocks=600, block_size=16)
SHORT = Sampling(max_tokens=6, temperature=0.8)


def seeded(seed: int, sampling: Sampling = SHORT) -> Sampling:
    return msgspec.structs.replace(sampling, seed=seed)


def num_computed(world: World) -> int:
    """Tokens of given prompts and outputs that went through the model."""
    return world.stepper.stats().prefilled_tokens


async def whole(world: World, keys: list[JobKey]) -> list[Attempt]:
    attempts = [await world.over(key) for key in keys]
    assert all(attempt.failed is None for attempt in attempts)
    return attempts


@pytest.mark.parametrize("leg", ["prefill", "decode"])
@pytest.mark.parametrize("max_step_tokens", [64, 512, 4096])
async def test_eight_equal_prompts_are_computed_once(leg: str, max_step_tokens: int) -> None:
    async with running(ROOMY, max_step_tokens=max_step_tokens) as world:
        prompt = prompt_of(1000)
        start = world.prefill if leg == "prefill" else world.decode
        world.runner.shut()
        keys = [start(prompt, seeded(seed)) for seed in range(8)]
        world.runner.open()
        attempts = await whole(world, keys)
        assert num_computed(world) <= 1000 + 8 * ROOMY.block_size
        for seed, attempt in enumerate(attempts):
            wanted = expected_of(prompt, seeded(seed), ROOMY)
            if attempt.prefilled is None:
                assert attempt.ids == wanted
                continue
            assert attempt.prefilled.first is not None
            assert attempt.prefilled.first.ids == wanted[:1]
            assert attempt.prefilled.handle is not None
            world.stepper.release([attempt.prefilled.handle.handle_id])


async def test_prefix_is_shared_as_far_as_it_goes() -> None:
    """Three prompts branch off one another; each common block is computed once."""
    async with running(ROOMY, max_step_tokens=64) as world:
        trunk = prompt_of(320)
        prompts = [
            trunk,
            trunk[:160] + prompt_of(160, salt=1),
            trunk[:240] + prompt_of(80, salt=2),
            trunk[:160] + prompt_of(160, salt=1)[:80] + prompt_of(64, salt=3),
        ]
        world.runner.shut()
        keys = [world.decode(prompt, seeded(7)) for prompt in prompts]
        world.runner.open()
        attempts = await whole(world, keys)
        assert num_computed(world) == 320 + 160 + 80 + 64
        for prompt, attempt in zip(prompts, attempts, strict=True):
            assert attempt.ids == expected_of(prompt, seeded(7), ROOMY)


async def test_other_salt_shares_nothing() -> None:
    async with running(ROOMY) as world:
        world.runner.shut()
        keys = [world.decode(prompt_of(160), SHORT, cache_salt=salt) for salt in ("a", "b", "a")]
        world.runner.open()
        await whole(world, keys)
        assert num_computed(world) == 2 * 160 + 16


async def test_later_ones_pass_those_that_follow() -> None:
    """A long prompt is being computed in chunks: a stranger behind its follower begins at once."""
    async with running(ROOMY, max_step_tokens=32) as world:
        world.runner.shut()
        first = world.decode(prompt_of(1000), SHORT)
        follower = world.decode(prompt_of(1000), seeded(1))
        stranger = world.decode([5], SHORT)
        world.runner.open()
        await whole(world, [first, follower, stranger])
        steps = world.runner.steps
        begun = next(number for number, step in enumerate(steps) if (0, 1, True) in step)
        ends = [{start + length for start, length, _ in step} for step in steps]
        assert begun < next(number for number, at in enumerate(ends) if 1000 in at)


async def test_follower_computes_itself_when_its_leader_is_cancelled() -> None:
    async with running(ROOMY, max_step_tokens=32) as world:
        prompt = prompt_of(800)
        world.runner.shut()
        leader = world.decode(prompt, SHORT)
        followers = [world.decode(prompt, seeded(seed)) for seed in range(3)]
        await world.runner.entered.wait()
        world.stepper.cancel(leader)
        world.runner.open()
        for seed, attempt in enumerate(await whole(world, followers)):
            assert attempt.ids == expected_of(prompt, seeded(seed), ROOMY)
        assert num_computed(world) <= 32 + 800 + 3 * 16


async def test_follower_begins_when_the_blocks_are_there_not_when_its_leader_ends() -> None:
    async with running(ROOMY, max_step_tokens=64) as world:
        world.runner.shut()
        leader = world.decode(prompt_of(320), seeded(0, Sampling(max_tokens=8000)))
        follower = world.decode(prompt_of(320), SHORT)
        world.runner.open()
        await whole(world, [follower])
        assert not world.recorder.of(leader).over
        world.stepper.cancel(leader)


async def test_follower_can_be_cancelled() -> None:
    async with running(ROOMY, max_step_tokens=32) as world:
        world.runner.shut()
        leader = world.decode(prompt_of(400), SHORT)
        follower = world.decode(prompt_of(400), seeded(1))
        await world.runner.entered.wait()
        world.stepper.cancel(follower)
        world.runner.open()
        await whole(world, [leader])


async def test_scored_prompts_neither_follow_nor_stop_others_from_following() -> None:
    async with running(ROOMY, max_step_tokens=64) as world:
        scoring = msgspec.structs.replace(SHORT, prompt_logprobs=0)
        world.runner.shut()
        keys = [world.decode(prompt_of(320), one) for one in (scoring, SHORT, scoring, SHORT)]
        world.runner.open()
        await whole(world, keys)
        assert num_computed(world) == 2 * 320 + 2 * 16


async def test_bursts_in_a_tight_pool_all_end_with_their_own_tokens() -> None:
    """Preemption, cancels and sharing at once: nobody is stuck, nobody gets another's tokens."""
    chance = random.Random(5)
    async with running(SMALL, max_step_tokens=12, max_running=6) as world:
        trunks = [prompt_of(60, salt) for salt in range(3)]
        wanted: dict[JobKey, list[int]] = {}
        for number in range(60):
            prompt = chance.choice(trunks)[: chance.randrange(1, 61)]
            sampling = msgspec.structs.replace(RANDOM, seed=number)
            key = world.decode(prompt, sampling)
            wanted[key] = expected_of(prompt, sampling, SMALL)
            if chance.random() < 0.2:
                gone = chance.choice(list(wanted))
                world.stepper.cancel(gone)
                del wanted[gone]
            if chance.random() < 0.2:
                await world.recorder.until(lambda: world.recorder.attempts)
        for key, tokens in wanted.items():
            assert (await world.over(key)).ids == tokens
        assert world.stepper.stats().preemptions > 0
