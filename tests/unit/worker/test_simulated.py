import json
import string
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from baton.demo import demo_model_folder
from protocol.errors import ConfigError
from protocol.sampling import Sampling
from tests.unit.worker.engine_world import GREEDY, RANDOM, SMALL, prompt_of, running, text_of
from text.assets import byte_assets, load_assets, make_assets
from worker.engine.runner import Chunk
from worker.engine.simulated import SimulatedConfig, SimulatedRunner, expected_tokens
from worker.kv.arena import Arena


class Bench:
    """A runner over an arena, one sequence at a time."""

    def __init__(self, config: SimulatedConfig = SMALL) -> None:
        self.waited: list[float] = []
        self.runner = SimulatedRunner(config, byte_assets(config.name), wait=self.waited.append)
        self.arena = Arena(config.num_blocks, self.runner.layout.block_bytes)
        self.runner.bind(self.arena)

    def compute(self, blocks: list[int], ids: list[int], start: int, index: int = -1) -> int | None:
        chunk = Chunk(blocks, ids, start, index >= 0, GREEDY, max(index, 0))
        (token,) = self.runner.step([chunk])
        return token

    def generate(self, blocks: list[int], prompt: list[int], num_tokens: int) -> list[int]:
        output: list[int] = []
        ids, start = prompt, 0
        for index in range(num_tokens):
            token = self.compute(blocks, ids, start, index)
            assert token is not None
            start += len(ids)
            ids = [token]
            output.append(token)
        return output


@pytest.fixture
def bench() -> "Iterator[Bench]":
    made = Bench()
    yield made
    made.arena.close()


def test_tokens_are_the_expected_ones(bench: Bench) -> None:
    prompt = prompt_of(11)
    assert bench.generate([5, 2, 9, 7, 1, 3, 0], prompt, 12) == expected_tokens(
        prompt, GREEDY, 12, SMALL
    )


def test_chunks_and_block_numbers_change_nothing(bench: Bench) -> None:
    prompt = prompt_of(11)
    blocks = [60, 3, 20]
    assert bench.compute(blocks, prompt[:5], 0) is None
    assert bench.compute(blocks, prompt[5:6], 5) is None
    assert bench.compute(blocks, prompt[6:], 6, 0) == expected_tokens(prompt, GREEDY, 1, SMALL)[0]


def test_any_changed_byte_of_earlier_kv_shows_on_the_first_step_of_a_stay(bench: Bench) -> None:
    prompt = prompt_of(8)
    right = bench.generate([0, 1, 2, 3, 4, 5], prompt, 12)
    for at in range(8 * SMALL.kv_bytes_per_token):
        bench.generate([0, 1, 2, 3, 4, 5], prompt, 1)
        bench.arena.memory[at] ^= 1
        output = [right[0]]
        blocks = [0, 1, 2, 3, 4, 5]
        for index in range(1, 12):
            token = bench.compute(blocks, output[-1:], 7 + index, index)
            assert token is not None
            output.append(token)
        assert output != right, f"byte {at}"


def test_table_that_is_computed_again_from_the_start_is_folded_afresh(bench: Bench) -> None:
    blocks = [0, 1, 2, 3, 4, 5]
    for salt in range(2):
        prompt = prompt_of(8, salt)
        wanted = expected_tokens(prompt, GREEDY, 12, SMALL)
        assert bench.generate(blocks, prompt, 12) == wanted


def test_swapped_blocks_show(bench: Bench) -> None:
    prompt = prompt_of(12)
    right = bench.generate([0, 1, 2, 3, 4, 5, 6], prompt, 12)
    tokens = [
        bench.compute([1, 0, 2, 3, 4, 5, 6], right[i - 1 : i], 11 + i, i) for i in range(1, 12)
    ]
    assert tokens != right[1:]


def test_tokens_depend_on_prompt_model_seed_and_index_only_when_sampled() -> None:
    prompt = prompt_of(9)
    base = expected_tokens(prompt, RANDOM, 20, SMALL)
    other_seed = Sampling(max_tokens=24, temperature=0.8, seed=8)
    assert expected_tokens(prompt, RANDOM, 20, replace(SMALL, block_size=32)) == base
    assert expected_tokens(prompt, other_seed, 20, SMALL) != base
    assert expected_tokens(prompt_of(9, salt=1), RANDOM, 20, SMALL) != base
    assert expected_tokens(prompt, RANDOM, 20, replace(SMALL, name="other")) != base
    cold = [Sampling(max_tokens=24, temperature=0.0, seed=seed) for seed in (1, 2)]
    assert len({tuple(expected_tokens(prompt, one, 20, SMALL)) for one in cold}) == 1


def test_text_is_words_of_two_to_nine_letters() -> None:
    sampling = Sampling(max_tokens=500)
    text = text_of(expected_tokens(prompt_of(5), sampling, 500, SMALL))
    assert set(text) <= set(string.ascii_lowercase + " ")
    assert {len(word) for word in text.split(" ")[:-1]} == set(range(2, 10))


def test_end_comes_only_if_configured_and_allowed() -> None:
    config = replace(SMALL, eos_every=3)
    long = Sampling(max_tokens=200)
    assert len(expected_tokens(prompt_of(5), long, 200, SMALL)) == 200
    short = expected_tokens(prompt_of(5), long, 200, config)
    assert short[-1] == 257
    assert len(short) < 60
    later = Sampling(max_tokens=200, min_tokens=60)
    assert len(expected_tokens(prompt_of(5), later, 200, config)) > 60
    never = Sampling(max_tokens=200, ignore_eos=True)
    assert len(expected_tokens(prompt_of(5), never, 200, config)) == 200


def test_steps_take_the_time_of_their_batch() -> None:
    config = replace(SMALL, step_s=0.01, step_per_seq_s=0.001, prefill_tokens_per_s=1000.0)
    bench = Bench(config)
    first = Chunk([0, 1, 2], prompt_of(10), 0, False, GREEDY, 0)
    second = Chunk([3], [1], 0, True, GREEDY, 0)
    bench.runner.step([first, second])
    assert bench.waited == [pytest.approx(0.01 + 0.002 + 0.01)]
    bench.arena.close()


def test_speed_zero_does_not_wait(bench: Bench) -> None:
    bench.generate([0, 1, 2, 3], prompt_of(10), 3)
    assert bench.waited == []


def test_too_little_kv_to_chain_is_refused() -> None:
    with pytest.raises(ConfigError, match="16 bytes"):
        SimulatedRunner(
            replace(SMALL, kv_bytes_per_token=8), byte_assets(), wait=lambda seconds: None
        )


def test_no_step_ends_while_the_file_that_holds_is_there(tmp_path: Path) -> None:
    hold = tmp_path / "hold"
    hold.touch()
    bench = Bench(replace(SMALL, hold=str(hold)))
    looks = 0

    def wait(_seconds: float) -> bool:
        nonlocal looks
        looks += 1
        if looks == 3:
            hold.unlink()
        return False

    bench.runner._wait = wait
    prompt = prompt_of(5)
    assert bench.compute([1, 2], prompt, 0, 0) == expected_tokens(prompt, GREEDY, 1, SMALL)[0]
    assert looks == 3
    hold.touch()
    bench.runner._wait = lambda _seconds: True  # the engine stops
    assert bench.compute([1, 2], [65], 5, 1) is not None
    bench.arena.close()


async def test_it_reads_and_writes_text_as_the_model_of_a_folder_does() -> None:
    """Whatever is asked for: ids that it would never say are prompts, or all that a grammar lets
    it say."""
    config = replace(SMALL, assets=load_assets(demo_model_folder()))
    prompt = [3000, 5, 3071, 261, 262, 1234]
    async with running(config) as world:
        plain = await world.over(world.decode(prompt, GREEDY))
        assert plain.finish == "length"
        scores = Sampling(max_tokens=2, logprobs=2, prompt_logprobs=2)
        scored = await world.over(world.decode(prompt, scores))
        assert scored.failed is None
        number = Sampling(max_tokens=50, grammar='{"enum":[12345,"no"]}')
        fitting = await world.over(world.decode(prompt, number))
        assert json.loads(fitting.text) in (12345, "no")


def test_a_vocabulary_smaller_than_what_it_says_is_refused() -> None:
    files = dict(load_assets(demo_model_folder()).files)
    tokenizer = json.loads(files["tokenizer.json"])
    tokenizer["model"]["vocab"] = {"a": 0}
    tokenizer["model"]["merges"] = []
    tokenizer["added_tokens"] = []
    files["tokenizer.json"] = json.dumps(tokenizer).encode()
    small = replace(SMALL, assets=make_assets(files))
    assert small.assets is not None
    with pytest.raises(ConfigError, match="at least 262 tokens"):
        SimulatedRunner(small, small.assets, wait=lambda _: None)
