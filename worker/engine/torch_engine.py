"""The torch engine: a Llama-like model from a folder behind the stepper, with KV in its arena.

On a CPU the arena is host memory, on a GPU the GPU's. Loads, checks and refuses what cannot run
here; then plans, computes and samples steps. It knows no jobs, leases, text or transfers.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Final

import torch

from protocol.errors import ConfigError, LocalError
from protocol.worker_info import KvLayout
from text.assets import CONFIG_FILE, AssetsError, ModelAssets, load_assets
from text.tokenizer import Tokenizer
from worker.config import WorkerConfig
from worker.engine.runner import Chunk
from worker.engine.stepper import Stepper, StepperConfig
from worker.engine.torch_attention import PagedKv
from worker.engine.torch_config import LlamaConfig, read_dtype, read_llama_config
from worker.engine.torch_device import (
    DeviceArena,
    allocating,
    bytes_of,
    check_transports,
    open_device,
    settle,
)
from worker.engine.torch_llama import LlamaModel
from worker.engine.torch_logprobs import score_prompt
from worker.engine.torch_sampling import sample
from worker.engine.torch_weights import open_weights, weights_digest
from worker.kv.arena import Arena, LeaseTable, ScratchWords
from worker.transfer.base import Transfer

_DTYPES: Final = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
_NUM_LEASES: Final = 4096
_NUM_SCRATCH: Final = 256


class TorchRunner:
    """A `ModelRunner`."""

    def __init__(
        self, folder: Path, config: LlamaConfig, *, layout: KvLayout, dtype: torch.dtype,
        max_context: int, eos_ids: frozenset[int], device: torch.device,
    ) -> None:  # fmt: skip
        """Reads the weights. Raises ConfigError with one clear line."""
        self.layout = layout
        self.max_context = max_context
        self.vocab_size = config.vocab_size
        self.eos_ids = eos_ids
        facts = {"engine": "torch", "dtype": layout.dtype, **_kv_facts(config)}
        self.model_digest = weights_digest(folder, facts)
        with open_weights(folder) as weights, allocating(device):
            self.model = LlamaModel(
                config, weights, dtype=dtype, max_context=max_context, device=device
            )
        self.device = device
        self._config = config
        self._dtype = dtype
        self._kv: PagedKv | None = None

    def bind(self, arena: Arena) -> None:
        if arena.block_bytes != self.layout.block_bytes:
            raise LocalError(f"blocks of {arena.block_bytes}, not {self.layout.block_bytes} bytes")
        self._kv = PagedKv(
            bytes_of(arena),
            block_size=self.layout.block_size,
            config=self._config,
            dtype=self._dtype,
        )

    @property
    def kv(self) -> PagedKv:
        if self._kv is None:
            raise LocalError("the model has no arena")
        return self._kv

    @torch.inference_mode()
    def step(self, chunks: Sequence[Chunk]) -> list[int | None]:
        batch = self.kv.plan(chunks, only_wanted=True)
        hidden = self.model.hidden(batch, self.kv)
        # From here on the blocks may be lent, or reused by a transport, at any moment.
        settle(self.device)
        for index, chunk in enumerate(chunks):
            if chunk.scored:
                end = int(batch.last_rows[index]) + 1
                rows = hidden[end - len(chunk.ids) : end]
                score_prompt(chunk, rows, self.model.logits, self.vocab_size)
        tokens: list[int | None] = [None] * len(chunks)
        sampled = [index for index, chunk in enumerate(chunks) if chunk.sample]
        if not sampled:
            return tokens
        rows = hidden.index_select(0, batch.last_rows[sampled])
        drawn = sample(self.model.logits(rows), [chunks[i] for i in sampled], self.eos_ids)
        for index, token in zip(sampled, drawn, strict=True):
            tokens[index] = token
        return tokens


def build_torch(
    config: WorkerConfig, transfers: list[Transfer], stepper: StepperConfig
) -> Stepper:  # fmt: skip
    """The engine, with memory of its own. Raises ConfigError with one clear line."""
    device = open_device(config.device)
    check_transports(device, [transfer.name for transfer in transfers])
    if config.threads > 0:
        torch.set_num_threads(config.threads)
    assets, eos_ids = _load_text(Path(config.model))
    runner, num_blocks = build_runner(config, assets, eos_ids)
    return Stepper(
        runner,
        build_arena(num_blocks, runner.layout.block_bytes, runner.device),
        LeaseTable(_NUM_LEASES),
        ScratchWords(_NUM_SCRATCH),
        transfers,
        replace(stepper, engine="torch"),
        assets,
    )


def build_runner(
    config: WorkerConfig, assets: ModelAssets, eos_ids: frozenset[int]
) -> tuple[TorchRunner, int]:
    """The model of `config`, and how many blocks its arena is to have. Raises ConfigError."""
    folder = Path(config.model)
    if CONFIG_FILE not in assets.files:
        raise ConfigError(f"model folder {folder} has no {CONFIG_FILE}")
    where = str(folder / CONFIG_FILE)
    model = read_llama_config(assets.json(CONFIG_FILE), where)
    device = open_device(config.device)
    dtype = choose_dtype(config.dtype, assets.json(CONFIG_FILE), where, device)
    layout = _layout(model, config.block_size, dtype)
    num_blocks = config.num_blocks or (config.kv_memory_mb << 20) // layout.block_bytes
    if num_blocks < 1:
        raise ConfigError(
            f"kv_memory_mb {config.kv_memory_mb} holds no block of {layout.block_bytes} bytes"
        )
    longest = min(model.max_positions, num_blocks * config.block_size)
    runner = TorchRunner(
        folder,
        model,
        layout=layout,
        dtype=dtype,
        max_context=min(config.max_context or longest, longest),
        eos_ids=eos_ids,
        device=device,
    )
    return runner, num_blocks


def build_arena(num_blocks: int, block_bytes: int, device: torch.device) -> Arena:
    """In the memory that the model computes in. Raises ConfigError if there is too little."""
    if device.type == "cpu":
        return Arena(num_blocks, block_bytes)
    return DeviceArena(num_blocks, block_bytes, device)


def choose_dtype(
    asked: str, config: Mapping[str, Any], where: str, device: torch.device
) -> torch.dtype:
    """`auto`: what the model was made for on a GPU; float32 on a CPU, where halves are slow."""
    if asked != "auto":
        return _DTYPES[asked]
    return torch.float32 if device.type == "cpu" else _DTYPES[read_dtype(config, where)]


def _load_text(folder: Path) -> tuple[ModelAssets, frozenset[int]]:
    try:
        assets = load_assets(folder)
        return assets, Tokenizer.from_assets(assets).eos_ids
    except AssetsError as error:
        raise ConfigError(str(error)) from error


def _layout(config: LlamaConfig, block_size: int, dtype: torch.dtype) -> KvLayout:
    return KvLayout(
        block_size=block_size,
        block_bytes=block_size * config.kv_bytes_per_token(dtype.itemsize),
        dtype=str(dtype).removeprefix("torch."),
        num_layers=config.num_layers,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
    )


def _kv_facts(config: LlamaConfig) -> dict[str, Any]:
    """What of the config, besides the weights, decides the numbers in the KV (and the logits)."""
    facts = asdict(config)
    facts["rope"]["kind"] = type(config.rope).__name__
    # How far the model may go changes no number within it.
    del facts["max_positions"]
    return facts
