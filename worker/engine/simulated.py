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
_MAX_STAYS: Final = 4096
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


@dataclass(slots=True)
class _Stay:
    """How far one stay of a sequence in the pool has been read."""

    blocks: Sequence[int]
    """The table is kept: its identity cannot become another one's meanwhile."""
    fold: Fold
    end: int = 0
    """Positions that are in the fold."""


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
        self._memory = memoryview(b"")
        self._seed = _seed(config)
        self._stays: OrderedDict[int, _Stay] = OrderedDict()

    def bind(self, arena: Arena) -> None:
        if arena.block_bytes != self.layout.block_bytes:
            raise LocalError(f"blocks of {arena.block_bytes}, not {self.layout.block_bytes} bytes")
        self._arena, self._memory = arena, arena.memory

    def step(self, chunks: Sequence[Chunk]) -> list[int | None]:
        seconds = self._duration(chunks)
        if seconds > 0:
            self._wait(seconds)
        while self._config.hold and os.path.exists(self._config.hold):
            if self._wait(_HOLD_LOOK_S):
                break
        return [self._run(chunk) for chunk in chunks]

    def _duration(self, chunks: Sequence[Chunk]) -> float:
        config = self._config
        num_prefill = sum(len(chunk.ids) for chunk in chunks if len(chunk.ids) > 1)
        speed = config.prefill_tokens_per_s
        prefill_s = num_prefill / speed if speed > 0 else 0.0
        return config.step_s + config.step_per_seq_s * len(chunks) + prefill_s

    def _run(self, chunk: Chunk) -> int | None:
        fold = self._fold(chunk, self._write(chunk))
        if not chunk.sample:
            return None
        every, index = self._config.eos_every, chunk.output_index
        token = draw(fold, chunk.sampling, index, eos_every=every, allowed=chunk.allowed)
        if chunk.scores is not None and chunk.scores.num_top >= 0:
            chunk.scores.sampled = scored(fold, index, token, chunk.scores.num_top)
        return token

    def _write(self, chunk: Chunk) -> bytes:
        """The KV of the chunk's tokens, chained with the bytes that stand before them."""
        memory, size = self._memory, self._config.kv_bytes_per_token
        start, blocks, before = chunk.start, chunk.blocks, self._seed
        if start:
            at = self._address(blocks, start - 1)
            before = bytes(memory[at : at + size])
        written = []
        for token in chunk.ids:
            before = _slot(before, token, size)
            written.append(before)
        if len(written) == 1:  # A step of a decode.
            at = self._address(blocks, start)
            memory[at : at + size] = before
            return before
        joined, at = b"".join(written), 0
        for piece in self._pieces(blocks, start, start + len(written)):
            piece[:] = joined[at : at + len(piece)]
            at += len(piece)
        return joined

    def _fold(self, chunk: Chunk, written: bytes) -> Fold:
        """The fold over all positions up to the end of the chunk, as the arena has them now. Where
        all before the chunk were read earlier, the `written` bytes are all that is missing."""
        stay = self._stays.get(id(chunk.blocks))
        if stay is None or stay.end != chunk.start:
            stay = self._begin_stay(chunk.blocks)
        if stay.end == chunk.start and chunk.scores is None:
            stay.fold.update(written)
            stay.end += len(chunk.ids)
            return stay.fold
        for position in chunk.scored:
            self._extend(stay, position)
            self._score(stay.fold, chunk, position)
        self._extend(stay, chunk.start + len(chunk.ids))
        return stay.fold

    def _begin_stay(self, blocks: Sequence[int]) -> "_Stay":
        stay = _Stay(blocks, blake2b(self._seed, digest_size=_DIGEST_BYTES))
        self._stays[id(blocks)] = stay
        if len(self._stays) > _MAX_STAYS:
            self._stays.popitem(last=False)  # If it goes on, it is read from the arena once more.
        return stay

    def _extend(self, stay: "_Stay", end: int) -> None:
        for piece in self._pieces(stay.blocks, stay.end, end):
            stay.fold.update(piece)
        stay.end = end

    def _score(self, fold: Fold, chunk: Chunk, position: int) -> None:
        """The prompt's token at `position`, by the fold over all positions before it."""
        scores, index = chunk.scores, position - chunk.num_prompt
        if scores is not None:
            token = chunk.history[position]
            scores.prompt.append(scored(fold, index, token, scores.prompt_num_top))

    def _pieces(self, blocks: Sequence[int], start: int, end: int) -> Iterator[memoryview]:
        """The arena's bytes of positions `start .. end - 1`, block by block."""
        memory, size = self._memory, self._config.kv_bytes_per_token
        block_size = self.layout.block_size
        while start < end:
            count = min(block_size - start % block_size, end - start)
            at = self._address(blocks, start)
            yield memory[at : at + count * size]
            start += count

    def _address(self, blocks: Sequence[int], position: int) -> int:
        layout = self.layout
        block, offset = divmod(position, layout.block_size)
        return blocks[block] * layout.block_bytes + offset * self._config.kv_bytes_per_token

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
