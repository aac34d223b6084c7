"""Small random models in folders, what `transformers` says of them, and engines over them."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import msgspec
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer as RawTokenizer
from tokenizers import decoders, models, pre_tokenizers, trainers
from torch import Tensor

from protocol.sampling import Sampling
from tests.unit.worker.engine_world import Recorder
from text.assets import load_assets
from text.tokenizer import Tokenizer
from worker.config import WorkerConfig
from worker.engine.base import EngineInfo
from worker.engine.runner import Chunk
from worker.engine.stepper import Stepper, StepperConfig
from worker.engine.torch_config import read_llama_config
from worker.engine.torch_engine import TorchRunner, build_arena, build_runner, build_torch
from worker.engine.torch_llama import expected_tensors
from worker.transfer.base import Transfer

# Two threads wait for each other at every step of models as small as these.
torch.set_num_threads(1)

VOCAB = 320
EOS = 2
NULL = "null"
"""A change of a config that writes null."""
BLOCK = 8
GREEDY = Sampling(max_tokens=1, temperature=0.0, ignore_eos=True)
CORPUS = (
    "the prefill worker computes the blocks of the prompt and the decode worker pulls them",
    "a lease ends when it is released, revoked or expired, and each of these happens once",
)
BASE: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_act": "silu",
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "bos_token_id": 1,
    "eos_token_id": EOS,
    "pad_token_id": 0,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "gqa": {},
    "mha": {"num_key_value_heads": 4},
    "mqa": {"num_key_value_heads": 1},
    "tied": {"tie_word_embeddings": True},
    "wide_heads": {"head_dim": 16},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "new_rope": {
        "rope_theta": None,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
    },
    "old_rope": {"rope_theta": 777.0, "rope_scaling": {"type": "default"}},
}


def make_model(
    folder: Path, *, seed: int = 0, num_files: int = 1, dtype: torch.dtype = torch.float32,
    **changes: Any,
) -> Path:  # fmt: skip
    """A model folder; `changes` of None remove a key of its config, NULL leaves it empty."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        key: None if value is NULL else value
        for key, value in {**BASE, **changes}.items()
        if value is not None
    }
    (folder / "config.json").write_text(json.dumps(config))
    _tokenizer().save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|end|>"}))
    save(folder, {k: t.to(dtype) for k, t in tensors_of(config, seed).items()}, num_files)
    return folder


def tensors_of(config: dict[str, Any], seed: int = 0) -> dict[str, Tensor]:
    """Random weights that spread the logits, so that greedy choices are not near ties."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in expected_tensors(read_llama_config(config, "test")).items():
        noise = torch.randn(shape, generator=generator)
        if "norm" in name:
            tensors[name] = 1 + 0.2 * noise
        elif name.endswith(".bias"):
            tensors[name] = 0.3 * noise
        elif "embed" in name and not config.get("tie_word_embeddings"):
            tensors[name] = noise
        else:
            gain = 3.0 if name in ("lm_head.weight", "model.embed_tokens.weight") else 1.5
            tensors[name] = gain * noise / shape[1] ** 0.5
    return tensors


def save(folder: Path, tensors: dict[str, Tensor], num_files: int = 1) -> None:
    if num_files == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return
    names = sorted(tensors)
    weight_map = {}
    for part in range(num_files):
        file = f"model-{part + 1:05}-of-{num_files:05}.safetensors"
        own = names[part::num_files]
        save_file({n: tensors[n] for n in own}, folder / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(own, file))
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@cache
def _tokenizer() -> RawTokenizer:
    tokenizer = RawTokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=["<|pad|>", "<|bos|>", "<|end|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def prompt_of(num_tokens: int, salt: int = 0, vocab: int = VOCAB) -> list[int]:
    generator = torch.Generator().manual_seed(1000 * salt + num_tokens)
    ids: list[int] = torch.randint(3, vocab, (num_tokens,), generator=generator).tolist()
    return ids


# what it is compared with


class Reference:
    """The same folder in `transformers`."""

    def __init__(self, folder: Path, dtype: torch.dtype, attention: str) -> None:
        from transformers import AutoModelForCausalLM  # slow: only where it is asked for

        self._model: Any = AutoModelForCausalLM.from_pretrained(
            folder, attn_implementation=attention, dtype=dtype
        )
        self._model.generation_config.eos_token_id = None

    @torch.no_grad()
    def logits(self, ids: Sequence[int]) -> Tensor:
        found: Tensor = self._model(torch.tensor([list(ids)])).logits[0]
        return found.float()

    @torch.no_grad()
    def greedy(self, ids: Sequence[int], num_tokens: int) -> list[int]:
        prompt = torch.tensor([list(ids)])
        out = self._model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=num_tokens,
            do_sample=False,
            pad_token_id=0,
        )
        tokens: list[int] = out[0, len(ids) :].tolist()
        return tokens


@cache
def reference(
    folder: Path, dtype: torch.dtype = torch.float32, attention: str = "eager"
) -> Reference:
    return Reference(folder, dtype, attention)


# ours


def config_of(folder: Path, **settings: Any) -> WorkerConfig:
    settings = {"block_size": BLOCK, "num_blocks": 96, **settings}
    return WorkerConfig(model=str(folder), **settings)


class Bench:
    """A runner over an arena, without an engine."""

    def __init__(self, folder: Path, **settings: Any) -> None:
        assets = load_assets(folder)
        eos_ids = Tokenizer.from_assets(assets).eos_ids
        self.runner: TorchRunner
        self.runner, num_blocks = build_runner(config_of(folder, **settings), assets, eos_ids)
        layout = self.runner.layout
        self.arena = build_arena(num_blocks, layout.block_bytes, self.runner.device)
        self.runner.bind(self.arena)

    @torch.inference_mode()
    def logits(self, chunks: Sequence[Chunk]) -> list[Tensor]:
        """The logits at every position of each chunk, of one step."""
        batch = self.runner.kv.plan(chunks)
        logits = self.runner.model.logits(self.runner.model.hidden(batch, self.runner.kv))
        ends = [int(row) + 1 for row in batch.last_rows]
        return [logits[end - len(chunk.ids) : end] for chunk, end in zip(chunks, ends, strict=True)]

    def in_chunks(self, blocks: list[int], ids: list[int], *sizes: int) -> Tensor:
        """One sequence alone, in chunks of these sizes; the last one is repeated."""
        found: list[Tensor] = []
        start = 0
        while start < len(ids):
            size = sizes[min(len(found), len(sizes) - 1)]
            found += self.logits([chunk_of(blocks, ids[start : start + size], start)])
            start += size
        return torch.cat(found)


@contextmanager
def bench_of(folder: Path, **settings: Any) -> Iterator[Bench]:
    bench = Bench(folder, **settings)
    try:
        yield bench
    finally:
        bench.arena.close()


def chunk_of(blocks: list[int], ids: list[int], start: int = 0) -> Chunk:
    return Chunk(blocks, ids, start, True, GREEDY, 0)


class PatientRecorder(Recorder):
    """Models compute, and the machine may be busy."""

    async def until(self, condition: Callable[[], object]) -> None:
        async with asyncio.timeout(40):
            while not condition():
                self._changed.clear()
                await self._changed.wait()


@dataclass
class TorchWorld:
    """One worker's engine."""

    stepper: Stepper
    recorder: PatientRecorder
    info: EngineInfo


@asynccontextmanager
async def running(
    folder: Path,
    *,
    transfers: Sequence[Transfer] = (),
    worker: str = "w",
    max_step_tokens: int = 512,
    max_running: int = 64,
    **settings: Any,
) -> AsyncIterator[TorchWorld]:
    """An engine as `build_torch` makes it, that checks its own rules at every turn."""
    stepper_config = StepperConfig(
        worker, "inc", validate=True, max_step_tokens=max_step_tokens, max_running=max_running
    )
    stepper = build_torch(config_of(folder, **settings), list(transfers), stepper_config)
    recorder = PatientRecorder()
    info = await stepper.start(recorder)
    try:
        yield TorchWorld(stepper, recorder, info)
        assert recorder.reasons == []
    finally:
        assert await stepper.stop()


def sampling_of(num_tokens: int, **changes: Any) -> Sampling:
    base = Sampling(max_tokens=num_tokens, temperature=0.0, ignore_eos=True)
    return msgspec.structs.replace(base, **changes)
