import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from protocol.errors import ConfigError
from tests.unit.worker.tiny_llama import (
    BASE,
    BLOCK,
    VARIANTS,
    bench_of,
    chunk_of,
    make_model,
    prompt_of,
    reference,
)
from worker.engine.torch_config import read_llama_config
from worker.engine.torch_rope import PlainRope

TOLERANCE = 1e-4
LENGTH = 3 * BLOCK + 5


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("llama") / "gqa")


def difference(ours: Tensor, theirs: Tensor) -> float:
    assert ours.shape == theirs.shape
    return float((ours - theirs).abs().max())


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_are_those_of_transformers(variant: str, tmp_path: Path) -> None:
    folder = make_model(tmp_path / variant, **VARIANTS[variant])
    ids = prompt_of(LENGTH)
    theirs = reference(folder).logits(ids)
    assert theirs.std() > 1
    with bench_of(folder) as bench:
        assert difference(bench.in_chunks([3, 0, 7, 1], ids, 100), theirs) < TOLERANCE
        assert difference(bench.in_chunks([9, 8, 5, 6], ids, 11, 1), theirs) < TOLERANCE


def test_shards_are_one_model(folder: Path, tmp_path: Path) -> None:
    ids = prompt_of(LENGTH)
    with bench_of(make_model(tmp_path, num_files=3)) as bench:
        ours = bench.in_chunks([0, 1, 2, 3], ids, 100)
    assert difference(ours, reference(folder).logits(ids)) < TOLERANCE
    assert difference(ours, reference(tmp_path).logits(ids)) < TOLERANCE


def test_bfloat16_weights_are_computed_in_float32(tmp_path: Path) -> None:
    folder = make_model(tmp_path, dtype=torch.bfloat16, dtype_name="bfloat16")
    ids = prompt_of(LENGTH)
    with bench_of(folder) as bench:
        ours = bench.in_chunks([0, 1, 2, 3], ids, 100)
    assert difference(ours, reference(folder).logits(ids)) < TOLERANCE


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_near(folder: Path, dtype: str) -> None:
    ids = prompt_of(LENGTH)
    theirs = reference(folder).logits(ids)
    with bench_of(folder, dtype=dtype) as bench:
        assert bench.runner.layout.dtype == dtype
        ours = bench.in_chunks([3, 0, 7, 1], ids, 13, 9, 1)
    agreement = torch.nn.functional.cosine_similarity(ours, theirs, dim=-1)
    assert float(agreement.min()) > 0.99


@pytest.mark.parametrize("size", [1, 2, 7, BLOCK, BLOCK + 1, 1000])
@pytest.mark.parametrize("length", [1, BLOCK - 1, BLOCK, BLOCK + 1, 5 * BLOCK + 3])
def test_chunks_change_nothing(folder: Path, size: int, length: int) -> None:
    ids = prompt_of(length)
    blocks = random.Random(length).sample(range(96), 6)
    with bench_of(folder) as bench:
        ours = bench.in_chunks(blocks, ids, size)
    assert difference(ours, reference(folder).logits(ids)) < TOLERANCE


def test_a_long_context_is_right_to_its_end(folder: Path) -> None:
    ids = prompt_of(700)
    blocks = random.Random(1).sample(range(96), 88)
    with bench_of(folder) as bench:
        ours = bench.in_chunks(blocks, ids, 300, 256, 143, 1)
    assert difference(ours, reference(folder).logits(ids)) < TOLERANCE


def test_sequences_of_one_step_do_not_touch_each_other(folder: Path) -> None:
    lengths = [1, 5, BLOCK, BLOCK + 1, 30, 31, 150, 151, 300, 17]
    prompts = [prompt_of(length, salt=1) for length in lengths]
    theirs = [reference(folder).logits(ids) for ids in prompts]
    with bench_of(folder, num_blocks=200) as bench:
        tables = _tables(lengths, 200)
        rng = random.Random(5)
        done = [0] * len(prompts)
        found: list[list[Tensor]] = [[] for _ in prompts]
        while left := [i for i, ids in enumerate(prompts) if done[i] < len(ids)]:
            chosen = rng.sample(left, min(len(left), rng.randint(1, 8)))
            # the last tokens go one by one: they decode while others prefill
            sizes = {
                i: min(rng.randint(10, 90), max(1, len(prompts[i]) - 6 - done[i])) for i in chosen
            }
            chunks = [
                chunk_of(tables[i], prompts[i][done[i] : done[i] + sizes[i]], done[i])
                for i in chosen
            ]
            for i, logits in zip(chosen, bench.logits(chunks), strict=True):
                found[i].append(logits)
                done[i] += sizes[i]
    for ours, expected in zip(found, theirs, strict=True):
        assert difference(torch.cat(ours), expected) < TOLERANCE


def test_many_decode_together_at_all_lengths(folder: Path) -> None:
    lengths = [2, 130, 9, 16, 129, 260, 3, 128, 17, 261]
    prompts = [prompt_of(length, salt=2) for length in lengths]
    with bench_of(folder, num_blocks=200) as bench:
        tables = _tables(lengths, 200)
        bench.logits([chunk_of(t, ids[:-1]) for t, ids in zip(tables, prompts, strict=True)])
        chunks = [
            chunk_of(table, ids[-1:], len(ids) - 1)
            for table, ids in zip(tables, prompts, strict=True)
        ]
        batch = bench.runner.kv.plan(chunks)
        assert 1 < len(batch.parts) < 4
        ours = bench.logits(chunks)
    for logits, ids in zip(ours, prompts, strict=True):
        assert difference(logits, reference(folder).logits(ids)[-1:]) < TOLERANCE


def test_blocks_work_in_another_arena(folder: Path) -> None:
    ids = prompt_of(LENGTH)
    theirs = reference(folder).logits(ids)
    with bench_of(folder) as source, bench_of(folder) as target:
        source.in_chunks([5, 3, 9, 1], ids[:-3], 10)
        for there, here in zip([5, 3, 9, 1], [0, 8, 2, 4], strict=True):
            target.arena.block(here)[:] = source.arena.block(there)
        ours = target.logits([chunk_of([0, 8, 2, 4], ids[-3:], LENGTH - 3)])
    assert difference(ours[0], theirs[-3:]) < TOLERANCE


def test_numbers_of_who_had_the_block_before_cannot_come_near(folder: Path) -> None:
    """Masked is not enough: 0 * nan is nan."""
    prompts = [prompt_of(BLOCK + 2), prompt_of(3 * BLOCK + 1, salt=1)]
    tables = [[4, 7], [1, 2, 3, 5]]
    with bench_of(folder) as bench:
        bench.runner.kv.blocks.fill_(float("nan"))
        for table, ids in zip(tables, prompts, strict=True):
            bench.in_chunks(table, ids[:-2], 3)
        chunks = [
            chunk_of(t, ids[-2:-1], len(ids) - 2) for t, ids in zip(tables, prompts, strict=True)
        ]
        ours = bench.logits(chunks)
        assert not bench.runner.kv.blocks[7, :, :, :, 2:].any()
    for logits, ids in zip(ours, prompts, strict=True):
        assert difference(logits, reference(folder).logits(ids)[-2:-1]) < TOLERANCE


def test_wrong_kv_gives_other_logits(folder: Path) -> None:
    """What the other tests rely on: the context counts."""
    ids = prompt_of(LENGTH)
    with bench_of(folder) as bench:
        right = bench.in_chunks([0, 1, 2, 3], ids, 100)
        bench.in_chunks([4], prompt_of(BLOCK, salt=1), 100)
        ours = bench.logits([chunk_of([0, 4, 2, 3], ids[-1:], LENGTH - 1)])
    assert difference(ours[0], right[-1:]) > 0.1


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"architectures": ["MixtralForCausalLM"]}, "architecture MixtralForCausalLM"),
        ({"architectures": None, "model_type": "gpt2"}, "architecture gpt2"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantized"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope scaling 'dynamic'"),
        ({"rope_parameters": {"rope_type": "longrope"}}, "rope scaling 'longrope'"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"rope_scaling": 2}, "rope_scaling must be an object"),
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"hidden_size": "32"}, "hidden_size must be int, not '32'"),
        ({"num_hidden_layers": True}, "num_hidden_layers must be int"),
        ({"num_hidden_layers": 0}, "num_hidden_layers must be above 0"),
        ({"num_key_value_heads": 3}, "4 attention heads cannot share 3 KV heads"),
        ({"head_dim": 7}, "head_dim 7 is odd"),
    ],
)
def test_a_config_that_is_not_understood_is_refused(changes: dict[str, Any], said: str) -> None:
    config = {k: v for k, v in {**BASE, **changes}.items() if v is not None}
    with pytest.raises(ConfigError) as raised:
        read_llama_config(config, "config.json")
    assert str(raised.value).startswith("config.json: ")
    assert said in str(raised.value)
    assert "\n" not in str(raised.value)


def test_both_ways_of_writing_the_rope_base_are_read() -> None:
    plain = {k: v for k, v in BASE.items() if k != "rope_theta"}
    assert read_llama_config(plain, "c").rope == PlainRope(10_000.0)
    assert read_llama_config({**plain, "rope_theta": 5e5}, "c").rope == PlainRope(5e5)
    nested = {"rope_parameters": {"rope_type": "default", "rope_theta": 123}}
    assert read_llama_config({**plain, **nested}, "c").rope == PlainRope(123.0)


def _tables(lengths: list[int], num_blocks: int) -> list[list[int]]:
    free = random.Random(3).sample(range(num_blocks), num_blocks)
    return [[free.pop() for _ in range(-(-length // BLOCK))] for length in lengths]
