"""The engine's own checks on the device of `BATON_TEST_DEVICE`. Run by `run.sh`."""

import os
from pathlib import Path

import pytest
import torch

from tests.unit.worker.model_families import (
    FAMILIES,
    check_engine,
    check_half,
    check_logits,
    spread,
)
from tests.unit.worker.tiny_llama import BLOCK, Bench, bench_of, chunk_of, make_model, prompt_of
from worker.engine.torch_device import DeviceArena, bytes_of

DEVICE = os.environ["BATON_TEST_DEVICE"]
TOLERANCE = 5e-4
"""Float32 without TF32, summed in another order."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("families")
    return {name: make_model(root / name, **changes) for name, changes in FAMILIES.items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_logits(folders: dict[str, Path], family: str) -> None:
    check_logits(folders[family], TOLERANCE, device=DEVICE)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_halves(folders: dict[str, Path], family: str, dtype: torch.dtype) -> None:
    check_half(folders[family], dtype, device=DEVICE)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("family", FAMILIES)
async def test_answers(folders: dict[str, Path], family: str, dtype: str) -> None:
    await check_engine(folders[family], device=DEVICE, dtype=dtype)


def test_the_arena_is_where_the_model_is(folders: dict[str, Path]) -> None:
    with bench_of(folders["llama"], device=DEVICE) as bench:
        assert isinstance(bench.arena, DeviceArena) == (DEVICE != "cpu")
        assert bench.runner.kv.device == bench.runner.device
        assert bytes_of(bench.arena).data_ptr() == bench.arena.address


def test_auto_takes_the_models_own_type(tmp_path: Path) -> None:
    folder = make_model(tmp_path, dtype=torch.bfloat16, torch_dtype="bfloat16")
    with bench_of(folder, device=DEVICE) as bench:
        own = "float32" if DEVICE == "cpu" else "bfloat16"
        assert bench.runner.layout.dtype == own


def test_blocks_are_complete_when_a_step_returns(folders: dict[str, Path]) -> None:
    """Copied away by another stream, at once: what a transport does. Long prefills, many times."""
    folder, ids = folders["mistral"], prompt_of(60 * BLOCK)
    blocks = list(range(60))
    with bench_of(folder, device=DEVICE) as bench:
        whole = _kv_after_a_step(bench, blocks, ids)
        for _ in range(20):
            bytes_of(bench.arena).zero_()
            assert spread(_kv_after_a_step(bench, blocks, ids), whole).largest == 0
            assert whole.any()


def _kv_after_a_step(bench: Bench, blocks: list[int], ids: list[int]) -> torch.Tensor:
    bench.runner.step([chunk_of(blocks, ids)])
    if DEVICE == "cpu":
        return bench.runner.kv.blocks[blocks].clone()
    with torch.cuda.stream(torch.cuda.Stream(bench.runner.device)):
        return bench.runner.kv.blocks[blocks].cpu()
