"""Log-probabilities of output and prompt, on every leg of a whole engine."""

import math
from dataclasses import replace

import msgspec

from protocol.out import TokenLogprob
from protocol.sampling import Sampling
from tests.unit.worker.engine_world import (
    RANDOM,
    SMALL,
    Attempt,
    hand_over,
    prompt_of,
    running,
    text_of,
)
from worker.engine.runner import Chunk, Scores
from worker.engine.simulated import expected_logprobs, expected_tokens

ASKING = msgspec.structs.replace(RANDOM, logprobs=3)
SCORING = msgspec.structs.replace(RANDOM, prompt_logprobs=2)


def logprobs_of(attempt: Attempt) -> list[TokenLogprob]:
    found = []
    for delta in attempt.deltas:
        assert delta.logprobs is not None
        assert len(delta.logprobs) == len(delta.ids)
        found += delta.logprobs
    return found


def test_simulated_probabilities_are_some() -> None:
    """They sum up to one, and the greedy token is the likeliest."""
    prompt = prompt_of(9)
    greedy = expected_tokens(prompt, Sampling(max_tokens=12, temperature=0.0), 12, SMALL)
    for one in expected_logprobs(prompt, greedy, 262, SMALL)[9:]:
        assert one is not None
        assert one.logprob == one.top[0][1] == -math.log(2)
        assert len({token for token, _ in one.top}) == 262
        assert [value for _, value in one.top] == sorted((v for _, v in one.top), reverse=True)
        assert math.isclose(sum(math.exp(value) for _, value in one.top), 1)


def test_chunk_scores_what_it_can_tell_and_nobody_knows() -> None:
    """The position behind its last one too, nothing known, nothing of the output."""

    def scored(start: int, count: int, known: int, num_prompt: int = 20) -> list[int]:
        scores = Scores(prompt_num_top=0, prompt_from=known)
        chunk = Chunk([0], [1] * count, start, True, SCORING, 0, 0, (), num_prompt, None, scores)
        return list(chunk.scored)

    assert scored(0, 4, 1) == [1, 2, 3, 4]
    assert scored(4, 4, 5) == [5, 6, 7, 8]
    assert scored(0, 8, 5) == [5, 6, 7, 8]
    assert scored(0, 4, 5) == []
    assert scored(16, 4, 17) == [17, 18, 19]
    assert scored(19, 1, 20) == scored(0, 1, 1, 1) == []
    plain = Chunk([0], [1, 2], 0, True, RANDOM, 0, num_prompt=9, scores=Scores(num_top=2))
    assert not plain.scored


async def test_every_sampled_token_has_one_and_only_if_asked() -> None:
    async with running() as world:
        prompt = prompt_of(30)
        plain = await world.over(world.decode(prompt, RANDOM))
        asked = await world.over(world.decode(prompt, ASKING))
        assert asked.ids == plain.ids
        assert all(delta.logprobs is None for delta in plain.deltas)
        wanted = expected_logprobs(prompt, asked.ids, 3, world.config)[30:]
        assert logprobs_of(asked) == wanted
        own = await world.over(world.decode(prompt, msgspec.structs.replace(ASKING, logprobs=0)))
        assert all(one.top == [] for one in logprobs_of(own))


async def test_the_end_has_one_too() -> None:
    async with running(replace(SMALL, eos_every=2)) as world:
        ended = await world.over(world.decode(prompt_of(9), ASKING))
        assert ended.finish == "stop"
        assert ended.ids[-1] in world.runner.eos_ids
        assert len(logprobs_of(ended)) == len(ended.ids)


async def test_legs_and_resumes_give_the_same_ones() -> None:
    async with running() as source, running(worker="d") as target:
        prompt = prompt_of(30)
        alone = await target.over(target.decode(prompt, ASKING))
        result, ended = await hand_over(source, target, prompt, ASKING)
        assert result.first is not None
        assert result.first.logprobs is not None
        assert result.first.logprobs + logprobs_of(ended) == logprobs_of(alone)
        given = alone.ids[:11]
        key = target.decode(prompt, ASKING, output_ids=given, chars_sent=len(text_of(given)))
        assert logprobs_of(await target.over(key)) == logprobs_of(alone)[11:]


async def test_prompt_is_scored_by_whoever_prefills() -> None:
    async with running() as source, running(worker="d") as target:
        prompt = prompt_of(30)
        wanted = expected_logprobs(prompt, [], 2, SMALL)
        assert len(wanted) == 30
        result, ended = await hand_over(source, target, prompt, SCORING)
        assert result.prompt_logprobs == wanted
        assert ended.decoding is not None
        assert ended.decoding.prompt_logprobs is None
        local = await target.over(target.decode(prompt, SCORING))
        assert local.decoding is not None
        assert local.decoding.prompt_logprobs == wanted
        assert local.ids[1:] == ended.ids
        given = {"output_ids": local.ids[:3], "chars_sent": len(text_of(local.ids[:3]))}
        resumed = await target.over(target.decode(prompt, SCORING, **given))
        assert resumed.decoding is not None
        assert resumed.decoding.prompt_logprobs is None


async def test_cached_prompt_is_computed_again_to_be_scored() -> None:
    """It takes nothing from the cache, and gives what it computed to it."""
    async with running() as world:
        prompt = prompt_of(41)
        for _ in range(2):
            ended = await world.over(world.decode(prompt, SCORING))
            assert ended.decoding is not None
            assert ended.decoding.cached_tokens == 0
            assert ended.decoding.prompt_logprobs == expected_logprobs(prompt, [], 2, world.config)
        plain = await world.over(world.decode(prompt, RANDOM))
        assert plain.decoding is not None
        assert plain.decoding.cached_tokens == 40
        assert plain.ids == ended.ids


async def test_chunks_do_not_show() -> None:
    for max_step_tokens in (1, 3, 4, 7, 100):
        async with running(max_step_tokens=max_step_tokens) as world:
            for length in (1, 2, 8, 23):
                prompt = prompt_of(length, salt=length)
                ended = await world.over(world.decode(prompt, SCORING))
                assert ended.decoding is not None
                wanted = expected_logprobs(prompt, [], 2, world.config)
                assert ended.decoding.prompt_logprobs == wanted


async def test_prompt_that_is_put_back_half_way_is_scored_once() -> None:
    """Three answers grow into the blocks of the one whose prompt is being scored."""
    tight = replace(SMALL, block_size=16, num_blocks=13)
    async with running(tight, max_step_tokens=4) as world:
        sampling = msgspec.structs.replace(SCORING, max_tokens=40)
        # All three need another block when the long prompt is about half done.
        prompts = [prompt_of(24), prompt_of(26, 1), prompt_of(28, 2), prompt_of(93, 3)]
        world.runner.shut()
        keys = [world.decode(prompt, sampling) for prompt in prompts]
        world.runner.open()
        for prompt, key in zip(prompts, keys, strict=True):
            ended = await world.over(key)
            assert ended.decoding is not None
            wanted = expected_logprobs(prompt, [], 2, world.config)
            assert ended.decoding.prompt_logprobs == wanted
            assert len(ended.ids) == 40
        assert world.stepper.stats().preemptions > 0


async def test_handle_without_a_token_is_not_scored_again() -> None:
    async with running() as source, running(worker="d") as target:
        prompt = prompt_of(32)
        await target.over(target.decode(prompt, RANDOM))
        prefilled = (await source.over(source.prefill(prompt, SCORING))).prefilled
        assert prefilled is not None
        assert prefilled.handle is not None
        ended = await target.over(target.decode(prompt, SCORING, handle=prefilled.handle))
        assert ended.decoding is not None
        assert ended.decoding.prompt_logprobs is None
        # All but the last block, which is never taken: its last token gives the next one.
        assert ended.decoding.transfer_bytes == target.arena.block_bytes
        source.stepper.release([prefilled.handle.handle_id])


async def test_scoring_alone_gives_no_token() -> None:
    async with running() as world:
        prompt = prompt_of(20)
        sampling = Sampling(max_tokens=0, prompt_logprobs=0, logprobs=0)
        ended = await world.over(world.decode(prompt, sampling))
        assert ended.decoding is not None
        assert ended.decoding.prompt_logprobs == expected_logprobs(prompt, [], 0, world.config)
        assert (ended.ids, ended.text, ended.finish) == ([], "", "length")
        prefilled = (await world.over(world.prefill(prompt, sampling))).prefilled
        assert prefilled is not None
        assert prefilled.first is not None
        assert (prefilled.first.ids, prefilled.first.finish) == ([], "length")
        assert prefilled.prompt_logprobs == ended.decoding.prompt_logprobs
        assert prefilled.handle is None


async def test_senseless_numbers_are_refused() -> None:
    async with running() as world:
        for changes, part in (
            ({"temperature": math.nan}, "temperature"),
            ({"repetition_penalty": 0.0}, "above 0"),
            ({"frequency_penalty": math.inf}, "frequency_penalty"),
            ({"logit_bias": {262: 1.0}}, "id 262"),
            ({"logit_bias": {3: math.inf}}, "id 3"),
        ):
            sampling = msgspec.structs.replace(RANDOM, **changes)
            attempt = await world.over(world.decode(prompt_of(9), sampling))
            assert attempt.failed is not None
            assert attempt.failed.code == "invalid_request"
            assert part in attempt.failed.message
