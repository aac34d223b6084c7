"""The torch engine: a Llama model from a folder behind the stepper, with KV in its arena.

Loads, checks and refuses what cannot run here; then plans, computes and samples steps. It knows no
jobs, leases, text or transfers.
"""

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Final

import torch

from protocol.errors import ConfigError, LocalError
from protocol.worker_info import KvLayout
from text.assets import CONFIG_FILE, AssetsError, ModelAssets, load_assets
from text.tokenizer import Tokenizer
from worker.config import WorkerConfig
from worker.engine.runner import Chunk
from worker.engine.stepper import Stepper, StepperConfig
from worker.engine.torch_attention import PagedKv
from worker.engine.torch_config import LlamaConfig, read_llama_config
from worker.engine.torch_llama import LlamaModel
from worker.engine.torch_sampling import sample
from worker.engine.torch_weights import open_weights, weights_digest
from worker.kv.arena import Arena, LeaseTable, ScratchWords
from worker.transfer.base import Transfer

_DTYPES: Final = {
    "auto": torch.float32,
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
        max_context: int, eos_ids: frozenset[int],
    ) -> None:  # fmt: skip
        """Reads the weights. Raises ConfigError with one clear line."""
        self.layout = layout
        self.max_context = max_context
        self.vocab_size = config.vocab_size
        self.eos_ids = eos_ids
        facts = {"engine": "torch", "dtype": layout.dtype, **_kv_facts(config)}
        self.model_digest = weights_digest(folder, facts)
        with open_weights(folder) as weights:
            self.model = LlamaModel(config, weights, dtype=dtype, max_context=max_context)
        self._config = config
        self._dtype = dtype
        self._kv: PagedKv | None = None

    def bind(self, arena: Arena) -> None:
        if arena.block_bytes != self.layout.block_bytes:
            raise LocalError(f"blocks of {arena.block_bytes}, not {self.layout.block_bytes} bytes")
        self._kv = PagedKv(
            # A view of its own: the mapping outlives the arena's `close` as long as tensors do.
            arena.memory[:],
            num_blocks=arena.num_blocks,
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
        batch = self.kv.plan(chunks)
        hidden = self.model.hidden(batch, self.kv)
        tokens: list[int | None] = [None] * len(chunks)
        sampled = [index for index, chunk in enumerate(chunks) if chunk.sample]
        if not sampled:
            return tokens
        rows = hidden.index_select(0, batch.last_rows[sampled])
        drawn = sample(self.model.logits(rows), [chunks[i] for i in sampled], self.eos_ids)
        for index, token in zip(sampled, drawn, strict=True):
            tokens[index] = token
        return tokens

    def copy_block(self, source: int, target: int) -> None:
        self.kv.blocks[target] = self.kv.blocks[source]


def build_torch(
    config: WorkerConfig, transfers: list[Transfer], stepper: StepperConfig
) -> Stepper:  # fmt: skip
    """The engine, with memory of its own. Raises ConfigError with one clear line."""
    if config.device != "cpu":
        raise ConfigError(f"device {config.device}: not in this version, only cpu")
    if config.threads > 0:
        torch.set_num_threads(config.threads)
    assets, eos_ids = _load_text(Path(config.model))
    runner, num_blocks = build_runner(config, assets, eos_ids)
    return Stepper(
        runner,
        Arena(num_blocks, runner.layout.block_bytes),
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
    model = read_llama_config(assets.json(CONFIG_FILE), str(folder / CONFIG_FILE))
    dtype = _DTYPES[config.dtype]
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
    )
    return runner, num_blocks


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


def _kv_facts(config: LlamaConfig) -> dict[str, int | float]:
    """What of the config, besides the weights, decides the numbers in the KV (and the logits)."""
    facts: dict[str, int | float] = asdict(config)
    # How far the model may go changes no number within it.
    del facts["max_positions"]
    return facts
