"""Where it computes: what is refused without a GPU, and an arena that is a tensor, on a CPU here.

What needs a GPU is in `tests/gpu`.
"""

from array import array
from pathlib import Path
from typing import Any

import pytest
import torch

from protocol.errors import ConfigError, LocalError
from tests.unit.worker.engine_world import new_key
from tests.unit.worker.tiny_llama import (
    BLOCK,
    Bench,
    PatientRecorder,
    bench_of,
    chunk_of,
    config_of,
    make_model,
    prompt_of,
    reference,
    sampling_of,
)
from worker.engine import torch_device, torch_engine
from worker.engine.base import DecodeJob, PrefillJob
from worker.engine.runner import Chunk
from worker.engine.stepper import StepperConfig
from worker.engine.torch_config import read_dtype
from worker.engine.torch_device import DeviceArena, bytes_of, check_transports, open_device
from worker.engine.torch_engine import build_torch, choose_dtype
from worker.kv.arena import Arena

CPU = torch.device("cpu")
GPU = torch.device("cuda", 1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("device") / "gqa")


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)


# which device


@pytest.mark.parametrize("name", ["", "gpu", "CUDA", "cuda:", "cuda:x", "cuda:-1", "cuda:٣", "mps"])
def test_a_name_of_no_device(name: str) -> None:
    with pytest.raises(ConfigError, match="is none of cpu, cuda and cuda:N"):
        open_device(name)


def test_a_torch_without_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(ConfigError, match=r"device cuda:3: this build of torch .* has no CUDA"):
        open_device("cuda:3")


@pytest.mark.parametrize("found", [(False, 0), (True, 0)])
def test_a_machine_without_a_gpu(
    monkeypatch: pytest.MonkeyPatch, two_gpus: None, found: tuple[bool, int]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: found[0])
    monkeypatch.setattr(torch.cuda, "device_count", lambda: found[1])
    with pytest.raises(ConfigError, match="device cuda: torch finds no usable GPU"):
        open_device("cuda")


def test_the_gpus_there_are(two_gpus: None) -> None:
    assert open_device("cpu") == CPU
    assert open_device("cuda") == torch.device("cuda", 0)
    assert open_device("cuda:1") == GPU
    with pytest.raises(ConfigError, match="device cuda:2: the highest of the 2 GPUs is cuda:1"):
        open_device("cuda:2")


def test_an_engine_on_a_gpu_that_is_not_there(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(ConfigError, match="device cuda: this build"):
        build_torch(config_of(folder, device="cuda"), [], StepperConfig("w", "inc"))


def test_only_nixl_reaches_a_gpus_memory() -> None:
    check_transports(CPU, ["shm", "tcp", "ucx", "nixl"])
    check_transports(GPU, ["nixl"])
    check_transports(GPU, [])
    for name in ("shm", "tcp", "ucx"):
        with pytest.raises(ConfigError, match=f"device cuda:1: the {name} transfer moves host"):
            check_transports(GPU, ["nixl", name])


# which type


def test_auto_is_float32_on_a_cpu_and_the_models_own_on_a_gpu() -> None:
    for key in ("dtype", "torch_dtype"):
        config = {key: "bfloat16"}
        assert choose_dtype("auto", config, "c", CPU) == torch.float32
        assert choose_dtype("auto", config, "c", GPU) == torch.bfloat16
        assert choose_dtype("float16", config, "c", GPU) == torch.float16
    assert choose_dtype("auto", {}, "c", GPU) == torch.float32
    assert read_dtype({"dtype": "float16", "torch_dtype": "bfloat16"}, "c") == "float16"
    with pytest.raises(ConfigError, match=r"c: dtype 'float8_e4m3fn' is not supported"):
        choose_dtype("auto", {"dtype": "float8_e4m3fn"}, "c", GPU)
    assert choose_dtype("auto", {"dtype": "float8_e4m3fn"}, "c", CPU) == torch.float32


# an arena that is a tensor


def test_an_arena_in_a_devices_memory() -> None:
    arena = DeviceArena(3, 64, CPU)
    assert (arena.kind, arena.device, arena.nbytes) == ("cuda", 0, 192)
    memory = bytes_of(arena)
    assert memory.data_ptr() == arena.address
    assert not memory.any()
    with pytest.raises(LocalError, match="block 0 is in a GPU's memory"):
        arena.block(0)
    arena.close()
    arena.close()
    memory[0] = 1  # a step that still runs does not fault
    with pytest.raises(LocalError, match="closed"):
        bytes_of(arena)
    with pytest.raises(LocalError, match="0 blocks"):
        DeviceArena(0, 64, CPU)
    host = Arena(3, 64)
    assert (host.kind, host.device) == ("host", 0)
    host.close()


def test_a_device_with_too_little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **rest: Any) -> torch.Tensor:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB. GPU 0 has")

    monkeypatch.setattr(torch, "zeros", fail)
    with pytest.raises(ConfigError, match=r"cuda:1 has not enough memory: CUDA out of memory$"):
        DeviceArena(1 << 20, 1 << 20, GPU)


async def test_an_engine_over_such_an_arena(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The code that a GPU would run, but for the device."""
    monkeypatch.setattr(torch_engine, "build_arena", DeviceArena)
    prompt = prompt_of(2 * BLOCK + 3)
    stepper = build_torch(
        config_of(folder), [], StepperConfig("w", "inc", validate=True, max_step_tokens=7)
    )
    assert isinstance(stepper._arena, DeviceArena)
    recorder = PatientRecorder()
    await stepper.start(recorder)
    lent, key = new_key(), new_key()
    stepper.submit(PrefillJob(lent, "choice/0", array("I", prompt), sampling_of(8)))
    stepper.submit(DecodeJob(key, "choice/1", array("I", prompt), sampling_of(8)))
    result = (await recorder.over(lent)).prefilled
    assert result is not None
    assert result.handle is not None
    assert (await recorder.over(key)).ids == reference(folder).greedy(prompt, 8)
    assert await stepper.stop()


# what is queued on a device


def test_the_device_is_settled_before_anybody_can_touch_the_blocks(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU the call returns before its kernels ran. Settled is after the last write of KV, and
    for every step: one that samples nothing may be followed by a lease, or a pull into its blocks.
    """
    seen: list[tuple[torch.device, bool]] = []
    with bench_of(folder) as bench:
        kv = bench.runner.kv

        def settled(device: torch.device) -> None:
            seen.append((device, bool(kv.blocks[3, 2].any() and not kv.blocks[5].any())))

        monkeypatch.setattr(torch_engine, "settle", settled)
        chunk = chunk_of([3], prompt_of(BLOCK))
        step = Chunk(chunk.blocks, chunk.ids, 0, False, chunk.sampling, 0)
        assert bench.runner.step([step]) == [None]
        assert seen == [(CPU, True)]


def test_settling_waits_for_the_stream_of_that_device(monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[torch.device] = []

    class Stream:
        def __init__(self, device: torch.device) -> None:
            self.device = device

        def synchronize(self) -> None:
            waited.append(self.device)

    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    torch_device.settle(CPU)
    assert waited == []
    torch_device.settle(GPU)
    assert waited == [GPU]


def test_nothing_is_made_on_another_device_than_the_models(folder: Path) -> None:
    """On `meta` every tensor of a step must be meta, or the operation that mixes them fails."""
    meta = torch.device("meta")
    bench = Bench(folder)
    kv = bench.runner.kv
    model = bench.runner.model
    elsewhere = torch_engine.PagedKv(
        bytes_of(bench.arena).to(meta), block_size=BLOCK, config=bench.runner._config,
        dtype=torch.float32,
    )  # fmt: skip
    for name in ("_embedding", "_norm", "_head", "_cos", "_sin"):
        setattr(model, name, getattr(model, name).to(meta))
    model._layers = [_moved(layer, meta) for layer in model._layers]
    chunks = [chunk_of([0, 1], prompt_of(1), 9), chunk_of([2, 3], prompt_of(9), 4)]
    with torch.inference_mode():
        batch = elsewhere.plan([*chunks, chunk_of([4], prompt_of(5))])
        assert batch.ids.device == batch.last_rows.device == meta
        hidden = model.hidden(batch, elsewhere)
    assert hidden.device == meta
    assert kv.device == CPU
    bench.arena.close()


def _moved(part: Any, device: torch.device) -> Any:
    if isinstance(part, torch.Tensor):
        return part.to(device)
    if part is None:
        return None
    return type(part)(*(_moved(getattr(part, name), device) for name in part.__slots__))
