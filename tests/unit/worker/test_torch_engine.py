"""The torch engine whole: real stepper, pool, leases and shared memory, against `transformers`."""

from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import baton
from protocol.errors import ConfigError, LocalError
from protocol.ids import JobKey
from protocol.sampling import Sampling
from tests.unit.worker.engine_world import Attempt, new_key
from tests.unit.worker.tiny_llama import (
    BLOCK,
    EOS,
    VOCAB,
    Bench,
    TorchWorld,
    config_of,
    make_model,
    prompt_of,
    reference,
    running,
    sampling_of,
)
from text.assets import load_assets
from text.tokenizer import Tokenizer
from worker.engine.base import DecodeJob, PrefillJob
from worker.engine.stepper import StepperConfig
from worker.engine.torch_engine import build_torch
from worker.kv.arena import Arena
from worker.transfer.shm import ShmTransfer

NUM_TOKENS = 12
LENGTHS = [1, 2, BLOCK - 1, BLOCK, BLOCK + 1, 20, 3 * BLOCK, 100, 150, 300]
DEMO = Path(baton.__file__).parent / "demo_model"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("engine") / "gqa")


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    return [prompt_of(length, salt=4) for length in LENGTHS]


@pytest.fixture(scope="module")
def answers(folder: Path, prompts: list[list[int]]) -> list[list[int]]:
    found = [reference(folder).greedy(prompt, NUM_TOKENS) for prompt in prompts]
    assert len({token for answer in found for token in answer}) > 20
    return found


def submit(world: TorchWorld, prompt: Sequence[int], sampling: Sampling, **rest: Any) -> JobKey:
    key = new_key()
    world.stepper.submit(DecodeJob(key, "choice/0", array("I", prompt), sampling, **rest))
    return key


async def all_over(world: TorchWorld, keys: Sequence[JobKey]) -> list[Attempt]:
    attempts = [await world.recorder.over(key) for key in keys]
    for attempt in attempts:
        assert attempt.failed is None
        assert attempt.finish == "length"
    return attempts


async def aggregated(
    world: TorchWorld, prompts: Sequence[Sequence[int]], sampling: Sampling, **rest: Any
) -> list[list[int]]:
    keys = [submit(world, prompt, sampling, **rest) for prompt in prompts]
    return [attempt.ids for attempt in await all_over(world, keys)]


async def disaggregated(
    source: TorchWorld, target: TorchWorld, prompts: Sequence[Sequence[int]], sampling: Sampling
) -> list[list[int]]:
    """Prefilled all at once there, decoded all at once here."""
    keys = [new_key() for _ in prompts]
    for key, prompt in zip(keys, prompts, strict=True):
        source.stepper.submit(PrefillJob(key, "choice/0", prompt, sampling))
    legs = []
    for key, prompt in zip(keys, prompts, strict=True):
        result = (await source.recorder.over(key)).prefilled
        assert result is not None
        assert result.first is not None
        assert result.handle is not None
        chars = len(result.first.text)
        decoding = submit(
            target, prompt, sampling,
            handle=result.handle, output_ids=result.first.ids, chars_sent=chars,
        )  # fmt: skip
        legs.append((result.first.ids, decoding, result.handle.handle_id))
    attempts = await all_over(target, [key for _, key, _ in legs])
    for attempt in attempts:
        assert attempt.decoding is not None
        assert attempt.decoding.transport == "shm"
    source.stepper.release([handle_id for _, _, handle_id in legs])
    return [first + a.ids for (first, _, _), a in zip(legs, attempts, strict=True)]


@pytest.mark.parametrize("max_step_tokens", [17, 512])
async def test_aggregated_answers_are_those_of_transformers(
    folder: Path, prompts: list[list[int]], answers: list[list[int]], max_step_tokens: int
) -> None:
    async with running(folder, num_blocks=200, max_step_tokens=max_step_tokens) as world:
        assert await aggregated(world, prompts, sampling_of(NUM_TOKENS)) == answers
        # once more: the prompts' full blocks are taken from the prefix cache
        assert await aggregated(world, prompts, sampling_of(NUM_TOKENS)) == answers
        assert world.stepper.stats().cached_tokens >= sum(LENGTHS) // BLOCK * BLOCK // 2


async def test_handed_over_answers_are_those_of_transformers(
    folder: Path, prompts: list[list[int]], answers: list[list[int]]
) -> None:
    source = running(
        folder, num_blocks=200, transfers=[ShmTransfer()], worker="p", max_step_tokens=60
    )
    target = running(folder, num_blocks=150, transfers=[ShmTransfer()], worker="d")
    async with source as prefill, target as decode:
        found = await disaggregated(prefill, decode, prompts, sampling_of(NUM_TOKENS))
        assert found == answers
        assert decode.stepper.stats().prefilled_tokens <= len(prompts)


async def test_preempted_answers_are_those_of_transformers(
    folder: Path, prompts: list[list[int]], answers: list[list[int]]
) -> None:
    short = [i for i, length in enumerate(LENGTHS) if length <= 100]
    async with running(folder, num_blocks=18, max_step_tokens=64) as world:
        found = await aggregated(world, [prompts[i] for i in short], sampling_of(NUM_TOKENS))
        assert world.stepper.stats().preemptions > 0
    assert found == [answers[i] for i in short]


@pytest.mark.parametrize("changes", [{}, {"temperature": 1.3, "top_p": 0.9}, {"top_k": 20}])
async def test_sampled_answers_are_equal_on_every_way(
    folder: Path, prompts: list[list[int]], changes: dict[str, Any]
) -> None:
    chosen = prompts[3:8]
    sampling = sampling_of(NUM_TOKENS, **{"temperature": 0.8, "seed": 5, **changes})
    source = running(folder, transfers=[ShmTransfer()], worker="p", max_step_tokens=40)
    target = running(folder, transfers=[ShmTransfer()], worker="d")
    async with source as prefill, target as decode, running(folder) as alone:
        expected = await aggregated(alone, chosen, sampling)
        assert await disaggregated(prefill, decode, chosen, sampling) == expected
        for given in (1, 5, NUM_TOKENS - 1):
            keys = [
                submit(alone, prompt, sampling, output_ids=answer[:given], cache_salt=str(given))
                for prompt, answer in zip(chosen, expected, strict=True)
            ]
            resumed = [attempt.ids for attempt in await all_over(alone, keys)]
            assert resumed == [answer[given:] for answer in expected]
        other = await aggregated(alone, chosen, sampling_of(NUM_TOKENS, temperature=0.8, seed=6))
        assert other != expected


async def test_min_tokens_puts_the_end_off_and_the_end_ends(tmp_path: Path) -> None:
    folder = make_model(tmp_path)
    greedy = reference(folder).greedy(prompt_of(20), 6)
    ending = make_model(tmp_path / "ending", eos_token_id=[EOS, greedy[2]])
    async with running(ending) as world:
        assert world.info.assets is not None
        free = Sampling(max_tokens=6, temperature=0.0)
        stopped = await world.recorder.over(submit(world, prompt_of(20), free))
        assert (stopped.ids, stopped.finish) == (greedy[:3], "stop")
        bound = Sampling(max_tokens=6, temperature=0.0, min_tokens=4)
        later = await world.recorder.over(submit(world, prompt_of(20), bound))
        assert len(later.ids) >= 5 or later.finish == "length"
        assert greedy[2] not in later.ids[:4]


async def test_what_it_says_of_itself(folder: Path) -> None:
    async with running(folder, num_blocks=10, transfers=[ShmTransfer()]) as world:
        info = world.info
        assert info.engine == "torch"
        assert info.layout.block_bytes == BLOCK * 3 * 2 * 2 * 8 * 4
        assert (info.layout.num_layers, info.layout.num_kv_heads, info.layout.head_dim) == (3, 2, 8)
        assert (info.capacity.num_blocks, info.capacity.max_context) == (10, 10 * BLOCK)
        assert info.transports == ("shm",)
        assert info.assets == load_assets(folder)


@pytest.mark.parametrize(
    ("settings", "max_context"),
    [({"num_blocks": 500}, 1024), ({"max_context": 50}, 50), ({"max_context": 9999}, 96 * BLOCK)],
)
def test_the_shortest_bound_of_the_context_counts(
    folder: Path, settings: dict[str, int], max_context: int
) -> None:
    bench = Bench(folder, **settings)
    assert bench.runner.max_context == max_context
    bench.arena.close()


def test_blocks_fill_the_memory_they_may_have(folder: Path) -> None:
    bench = Bench(folder, num_blocks=0, kv_memory_mb=1)
    assert bench.arena.num_blocks == (1 << 20) // (BLOCK * 3 * 2 * 2 * 8 * 4)
    bench.arena.close()


def test_digest_and_layout_follow_the_type(folder: Path) -> None:
    whole, half = Bench(folder), Bench(folder, dtype="bfloat16")
    assert whole.runner.model_digest != half.runner.model_digest
    assert whole.runner.layout.block_bytes == 2 * half.runner.layout.block_bytes
    whole.arena.close()
    half.arena.close()


def test_the_block_size_does_not_change_the_model(folder: Path) -> None:
    benches = [Bench(folder), Bench(folder, block_size=32)]
    assert len({bench.runner.model_digest for bench in benches}) == 1
    for bench in benches:
        bench.arena.close()


def test_an_arena_of_other_blocks_is_refused(folder: Path) -> None:
    bench = Bench(folder)
    other = Arena(4, 64)
    with pytest.raises(LocalError, match="blocks of 64"):
        bench.runner.bind(other)
    other.close()
    bench.arena.close()


def test_the_memory_outlives_a_closed_arena(folder: Path) -> None:
    """A step that still runs while the process stops must not fault."""
    bench = Bench(folder)
    bench.arena.close()
    bench.in_chunks([0, 1], prompt_of(BLOCK + 1), 100)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"device": "tpu"}, "device 'tpu' is none of cpu, cuda and cuda:N"),
        ({"kv_memory_mb": 1, "num_blocks": 0, "block_size": 4096}, "holds no block of"),
        ({"model": "/nowhere"}, "model folder /nowhere does not exist"),
    ],
)
def test_what_cannot_run_is_refused_in_one_line(
    folder: Path, settings: dict[str, Any], said: str
) -> None:
    config = config_of(folder)
    config = type(config)(
        **{**{f: getattr(config, f) for f in config.__struct_fields__}, **settings}
    )
    with pytest.raises(ConfigError, match=said) as raised:
        build_torch(config, [], StepperConfig("w", "inc"))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_files_of_the_folder_that_are_missing_are_named(tmp_path: Path, name: str) -> None:
    folder = make_model(tmp_path)
    (folder / name).unlink()
    with pytest.raises(ConfigError, match=f"has no {name}"):
        build_torch(config_of(folder), [], StepperConfig("w", "inc"))


async def test_ids_beyond_the_vocabulary_are_refused(folder: Path) -> None:
    async with running(folder) as world:
        attempt = await world.recorder.over(submit(world, [VOCAB], sampling_of(4)))
        assert attempt.failed is not None
        assert attempt.failed.code == "invalid_request"


async def test_threads_are_those_of_the_config(folder: Path) -> None:
    before = torch.get_num_threads()
    try:
        stepper = build_torch(config_of(folder, threads=before + 1), [], StepperConfig("w", "inc"))
        assert torch.get_num_threads() == before + 1
        assert await stepper.stop()
    finally:
        torch.set_num_threads(before)


async def test_the_demo_model_says_what_transformers_says() -> None:
    tokenizer = Tokenizer.from_assets(load_assets(DEMO))
    prompt = tokenizer.encode("This module provides", add_special_tokens=True)
    expected = reference(DEMO).greedy(prompt, 24)
    async with running(DEMO, block_size=16) as world:
        assert await aggregated(world, [prompt], sampling_of(24)) == [expected]
