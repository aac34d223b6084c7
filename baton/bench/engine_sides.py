"""The two sides of `baton bench engine`: our torch engine's steps, and `transformers`.

Both compute the same tokens with the same random weights; nothing here takes the time. It knows no
table and no command line.
"""

import importlib
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import torch

from baton.demo import demo_model_folder
from protocol.errors import ConfigError
from protocol.sampling import Sampling
from text.assets import load_assets
from worker.config import WorkerConfig
from worker.engine.runner import Chunk
from worker.engine.torch_engine import build_runner
from worker.kv.arena import Arena

SHAPES: Final[dict[str, dict[str, Any]]] = {
    "tiny": {  # the demo model's
        "vocab_size": 3072,
        "hidden_size": 256,
        "intermediate_size": 640,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
    },
    "100m": {
        "vocab_size": 32_000,
        "hidden_size": 768,
        "intermediate_size": 2048,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "num_key_value_heads": 4,
        "tie_word_embeddings": True,
    },
}
MAX_POSITIONS: Final = 4096
_BLOCK_SIZE: Final = 32
_SEED: Final = 20
_GREEDY: Final = Sampling(max_tokens=MAX_POSITIONS, temperature=0.0, ignore_eos=True)


def set_threads(number: int) -> None:
    """Of torch in this thread; 0: as many as it finds right."""
    if number:
        torch.set_num_threads(number)


def library() -> Any:
    """The `transformers` module, told to be quiet. Raises ConfigError if it is not installed."""
    try:
        transformers: Any = importlib.import_module("transformers")
    except ImportError as error:
        raise ConfigError(
            f"`baton bench engine` compares with transformers, which cannot be imported: {error}"
        ) from None
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    return transformers


class Theirs:
    """`transformers`: sdpa attention, no padding, and the cache that is told."""

    caches: Final = ("dynamic", "static")
    """Tensors that grow with every token, or that are there from the start."""

    def __init__(self, name: str, dtype: str) -> None:
        """A model of that shape with random weights. Raises ConfigError without the library."""
        self._library = library()
        torch.manual_seed(_SEED)
        config = self._library.LlamaConfig(
            **SHAPES[name], max_position_embeddings=MAX_POSITIONS, rms_norm_eps=1e-5
        )
        self.model: Any = self._library.AutoModelForCausalLM.from_config(
            config, attn_implementation="sdpa", dtype=getattr(torch, dtype)
        ).eval()
        self.cache: str = "dynamic"
        self._kv: Any = None
        self._next = torch.empty(0, dtype=torch.int64)

    @torch.inference_mode()
    def prefill(self, prompts: Sequence[Sequence[int]], piece: int, room: int = 0) -> list[int]:
        """The token after each prompt; all are of one length and computed side by side, `piece`
        tokens of each at a time. The cache holds `room` tokens more."""
        ids = torch.tensor(prompts)
        config = self.model.config
        if self.cache == "static":
            length = ids.shape[1] + room
            self._kv = self._library.StaticCache(config=config, max_cache_len=length)
        else:
            self._kv = self._library.DynamicCache(config=config)
        for part in torch.split(ids, piece, dim=1):
            self._next = self._feed(part)
        tokens: list[int] = self._next.view(-1).tolist()
        return tokens

    @torch.inference_mode()
    def decode(self, steps: int) -> list[list[int]]:
        """So many tokens more of each; then as before."""
        token, found = self._next, []
        for _ in range(steps):
            token = self._feed(token)
            found.append(token)
        if self.cache == "static":
            for layer in self._kv.layers:
                layer.cumulative_length.sub_(steps)
        else:
            self._kv.crop(-steps)
        rows: list[list[int]] = torch.cat(found, dim=1).tolist()
        return rows

    def _feed(self, ids: torch.Tensor) -> torch.Tensor:
        answer = self.model(ids, past_key_values=self._kv, use_cache=True, logits_to_keep=1)
        best: torch.Tensor = answer.logits[:, -1].argmax(dim=-1, keepdim=True)
        return best


class Ours:
    """The torch engine's runner over an arena, driven as the stepper drives it."""

    def __init__(self, folder: Path, model: Any, *, dtype: str, num_tokens: int) -> None:
        """`folder` gets the weights of `model`; the arena holds `num_tokens`."""
        model.save_pretrained(folder)
        for file in demo_model_folder().glob("tokenizer*"):
            (folder / file.name).write_bytes(file.read_bytes())
        config = WorkerConfig(
            model=str(folder),
            dtype=dtype,  # type: ignore[arg-type]  # checked by the command line
            block_size=_BLOCK_SIZE,
            num_blocks=-(-num_tokens // _BLOCK_SIZE),
        )
        self._runner, num_blocks = build_runner(config, load_assets(folder), frozenset())
        self._arena = Arena(num_blocks, self._runner.layout.block_bytes)
        self._runner.bind(self._arena)
        # As in a worker that has run for long: the blocks of a sequence lie anywhere.
        self._blocks = list(range(num_blocks))
        random.Random(_SEED).shuffle(self._blocks)
        self._tables: list[list[int]] = []
        self._next: list[int] = []
        self._length = 0

    def prefill(self, prompts: Sequence[Sequence[int]], piece: int, room: int = 0) -> list[int]:
        self._length = len(prompts[0])
        each = -(-(self._length + room) // _BLOCK_SIZE)
        self._tables = [self._blocks[i * each :][:each] for i in range(len(prompts))]
        for start in range(0, self._length, piece):
            ids = [prompt[start : start + piece] for prompt in prompts]
            self._next = self._step(ids, start, is_last=start + piece >= self._length)
        return self._next

    def decode(self, steps: int) -> list[list[int]]:
        token, found = self._next, []
        for position in range(self._length, self._length + steps):
            token = self._step([[one] for one in token], position, is_last=True)
            found.append(token)
        return [list(row) for row in zip(*found, strict=True)]

    def _step(self, ids: Sequence[Sequence[int]], start: int, *, is_last: bool) -> list[int]:
        chunks = [
            Chunk(table, own, start, is_last, _GREEDY, 0)
            for table, own in zip(self._tables, ids, strict=True)
        ]
        return [token or 0 for token in self._runner.step(chunks)]

    def close(self) -> None:
        self._arena.close()
