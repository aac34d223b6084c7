"""A model that costs only time, and whose tokens prove that the right KV was used.

The "KV" of a position is a hash of its token chained with the bytes of the position before, written
into the arena. The next token is drawn from a fold over the **bytes of all positions, read back
from the blocks that the step names**. So KV that is stale, missing, mixed up or of another prompt
gives other tokens than `expected_tokens` does, which needs no arena at all. Tokens depend on token
ids and sampling alone: not on timing, batches, block numbers, or on which worker computed what.
Penalties, biases and the shape of the distribution change nothing; a grammar is obeyed.
"""

import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from typing import Final

from protocol.errors import ConfigError, LocalError
from protocol.out import TokenLogprob
from protocol.sampling import Sampling
from protocol.worker_info import KvLayout
from text.assets import ModelAssets, byte_assets
from text.tokenizer import Tokenizer
from worker.engine.runner import Chunk
from worker.engine.simulated_choice import EOS_ID, NUM_DRAWN, Fold, draw, scored
from worker.engine.stepper import Stepper, StepperConfig
from worker.kv.arena import Arena, LeaseTable, ScratchWords
from worker.transfer.base import Transfer

_DIGEST_BYTES: Final = 16
_MAX_FOLDS: Final = 4096
_HOLD_LOOK_S: Final = 0.005


@dataclass(frozen=True, slots=True)
class SimulatedConfig:
    """The model and how fast it is. A speed of 0 takes no time."""

    name: str = "simulated"
    """Part of the model digest: models of other names draw other tokens."""
    num_blocks: int = 1024
    block_size: int = 32
    kv_bytes_per_token: int = 64
    """At least 16."""
    max_running: int = 64
    max_context: int = 1 << 20
    prefill_tokens_per_s: float = 0.0
    step_s: float = 0.0
    """Every step takes this long, and `step_per_seq_s` more for each sequence in it."""
    step_per_seq_s: float = 0.0
    eos_every: int = 0
    """One token in so many ends the answer; 0: none ever does."""
    num_leases: int = 4096
    num_scratch: int = 256
    assets: ModelAssets | None = None
    """Text as another model reads and writes it; None: a token for each byte."""
    hold: str = ""
    """While a file of this name exists no step ends, so that a test can find every leg where it
    wants it; empty: none does."""


Wait = Callable[[float], object]
"""Waits for so many seconds, or less if the engine stops, which it says with something true."""


class SimulatedRunner:
    """A `ModelRunner`.

    A sequence's fold is kept from step to step under the identity of its block table, a list that
    is new for every stay in the pool. On the first step of a stay, so after a pull, a prefix hit
    or a preemption, all positions are read from the arena.
    """

    def __init__(self, config: SimulatedConfig, assets: ModelAssets, *, wait: Wait) -> None:
        if config.kv_bytes_per_token < _DIGEST_BYTES or config.block_size < 1:
            raise ConfigError(f"simulated: at least {_DIGEST_BYTES} bytes of KV for each token")
        tokenizer = Tokenizer.from_assets(assets)
        if tokenizer.vocab_size < NUM_DRAWN:
            raise ConfigError(f"simulated: a vocabulary of at least {NUM_DRAWN} tokens is needed")
        self.layout = _layout(config)
        self.model_digest = _model_digest(config)
        self.max_context = config.max_context
        self.vocab_size = tokenizer.vocab_size
        self.eos_ids = tokenizer.eos_ids
        self._config = config
        self._wait = wait
        self._arena: Arena | None = None
        self._seed = _seed(config)
        self._folds: OrderedDict[int, tuple[Sequence[int], int, Fold]] = OrderedDict()

    def bind(self, arena: Arena) -> None:
        if arena.block_bytes != self.layout.block_bytes:
            raise LocalError(f"blocks of {arena.block_bytes}, not {self.layout.block_bytes} bytes")
        self._arena = arena

    def step(self, chunks: Sequence[Chunk]) -> list[int | None]:
        seconds = self._duration(chunks)
        if seconds > 0:
            self._wait(seconds)
        while self._config.hold and os.path.exists(self._config.hold):
            if self._wait(_HOLD_LOOK_S):
                break
        return [self._run(chunk) for chunk in chunks]

    def copy_block(self, source: int, target: int) -> None:
        arena = self._bound()
        arena.block(target)[:] = arena.block(source)

    def _duration(self, chunks: Sequence[Chunk]) -> float:
        config = self._config
        num_prefill = sum(len(chunk.ids) for chunk in chunks if len(chunk.ids) > 1)
        speed = config.prefill_tokens_per_s
        prefill_s = num_prefill / speed if speed > 0 else 0.0
        return config.step_s + config.step_per_seq_s * len(chunks) + prefill_s

    def _run(self, chunk: Chunk) -> int | None:
        self._write(chunk)
        fold = self._fold(chunk)
        if not chunk.sample:
            return None
        every, index = self._config.eos_every, chunk.output_index
        token = draw(fold, chunk.sampling, index, eos_every=every, allowed=chunk.allowed)
        if chunk.scores is not None and chunk.scores.num_top >= 0:
            chunk.scores.sampled = scored(fold, index, token, chunk.scores.num_top)
        return token

    def _write(self, chunk: Chunk) -> None:
        """The KV of the chunk's tokens, chained with the bytes that stand before them."""
        before = self._seed
        if chunk.start:
            before = bytes(next(self._pieces(chunk.blocks, chunk.start - 1, chunk.start)))
        size, memory = self._config.kv_bytes_per_token, self._bound().memory
        block_size, block_bytes = self.layout.block_size, self.layout.block_bytes
        for position, token in enumerate(chunk.ids, chunk.start):
            before = _slot(before, token, size)
            block = chunk.blocks[position // block_size]
            at = block * block_bytes + position % block_size * size
            memory[at : at + size] = before

    def _fold(self, chunk: Chunk) -> Fold:
        """The fold over all positions up to the end of the chunk, as the arena has them now."""
        end = chunk.start + len(chunk.ids)
        key = id(chunk.blocks)
        start, fold = 0, blake2b(self._seed, digest_size=_DIGEST_BYTES)
        known = self._folds.pop(key, None)
        if known is not None and known[1] == chunk.start:
            _, start, fold = known
        for position in chunk.scored:
            self._extend(fold, chunk.blocks, start, position)
            start = position
            self._score(fold, chunk, position)
        self._extend(fold, chunk.blocks, start, end)
        # The table is kept with the fold: its identity cannot become another one's meanwhile.
        self._folds[key] = (chunk.blocks, end, fold)
        if len(self._folds) > _MAX_FOLDS:
            self._folds.popitem(last=False)
        return fold

    def _extend(self, fold: Fold, blocks: Sequence[int], start: int, end: int) -> None:
        for piece in self._pieces(blocks, start, end):
            fold.update(piece)

    def _score(self, fold: Fold, chunk: Chunk, position: int) -> None:
        """The prompt's token at `position`, by the fold over all positions before it."""
        scores, index = chunk.scores, position - chunk.num_prompt
        if scores is not None:
            token = chunk.history[position]
            scores.prompt.append(scored(fold, index, token, scores.prompt_num_top))

    def _pieces(self, blocks: Sequence[int], start: int, end: int) -> Iterator[memoryview]:
        """The arena's bytes of positions `start .. end - 1`, block by block."""
        memory, size = self._bound().memory, self._config.kv_bytes_per_token
        block_size, block_bytes = self.layout.block_size, self.layout.block_bytes
        while start < end:
            offset = start % block_size
            count = min(block_size - offset, end - start)
            at = blocks[start // block_size] * block_bytes + offset * size
            yield memory[at : at + count * size]
            start += count

    def _bound(self) -> Arena:
        if self._arena is None:
            raise LocalError("the simulated model has no arena")
        return self._arena


def expected_tokens(
    prompt_ids: Sequence[int], sampling: Sampling, num_tokens: int, config: SimulatedConfig
) -> list[int]:
    """The first `num_tokens` output ids that a correct run gives; fewer if the model ends it.

    Stop strings, stop ids and context limits are not looked at.
    """
    slot = _seed(config)
    fold = blake2b(slot, digest_size=_DIGEST_BYTES)
    output: list[int] = []
    ids = list(prompt_ids)
    for _ in range(min(num_tokens, sampling.max_tokens)):
        for token in ids:
            slot = _slot(slot, token, config.kv_bytes_per_token)
            fold.update(slot)
        ids = [draw(fold, sampling, len(output), eos_every=config.eos_every)]
        output += ids
        if ids[0] == EOS_ID:
            break
    return output


def expected_logprobs(
    prompt_ids: Sequence[int], output_ids: Sequence[int], num_top: int, config: SimulatedConfig
) -> list[TokenLogprob | None]:
    """Of every token of prompt and output, in order; the first has none."""
    slot = _seed(config)
    fold = blake2b(slot, digest_size=_DIGEST_BYTES)
    found: list[TokenLogprob | None] = []
    for index, token in enumerate([*prompt_ids, *output_ids], -len(prompt_ids)):
        found.append(scored(fold, index, token, num_top) if found else None)
        slot = _slot(slot, token, config.kv_bytes_per_token)
        fold.update(slot)
    return found


def build_simulated(
    config: SimulatedConfig, transfers: Sequence[Transfer], stepper_config: StepperConfig
) -> Stepper:
    """The engine, with memory of its own. `max_running` of `config` counts."""
    stopping = threading.Event()
    assets = _assets(config)
    runner = SimulatedRunner(config, assets, wait=stopping.wait)
    return Stepper(
        runner,
        Arena(config.num_blocks, runner.layout.block_bytes),
        LeaseTable(config.num_leases),
        ScratchWords(config.num_scratch),
        transfers,
        replace(stepper_config, max_running=config.max_running),
        assets,
        interrupt=stopping.set,
    )


def _assets(config: SimulatedConfig) -> ModelAssets:
    return config.assets or byte_assets(config.name, max_context=config.max_context)


def _layout(config: SimulatedConfig) -> KvLayout:
    return KvLayout(
        block_size=config.block_size,
        block_bytes=config.block_size * config.kv_bytes_per_token,
        dtype="simulated",
    )


def _model_digest(config: SimulatedConfig) -> str:
    text = f"simulated/{config.name}/{config.block_size}/{config.kv_bytes_per_token}"
    if config.assets is not None:
        text += f"/{config.assets.digest}"
    return blake2b(text.encode(), digest_size=_DIGEST_BYTES).hexdigest()


def _seed(config: SimulatedConfig) -> bytes:
    """What stands before the first position. Not the layout: block sizes do not change tokens."""
    return blake2b(config.name.encode(), digest_size=_DIGEST_BYTES).digest()


def _slot(before: bytes, token: int, size: int) -> bytes:
    """The KV of one position: a digest of its token and of the position before, repeated."""
    digest = blake2b(before + token.to_bytes(4, "little"), digest_size=_DIGEST_BYTES).digest()
    return (digest * -(-size // _DIGEST_BYTES))[:size]
