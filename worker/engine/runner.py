"""The model behind a stepped engine: compute one step over a batch, synchronously.

The stepper decides what runs; a runner only computes. It lives in the engine's thread and knows
nothing of jobs, leases, text or the loop.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from protocol.sampling import Sampling
from protocol.worker_info import KvLayout
from worker.kv.arena import Arena


@dataclass(frozen=True, slots=True)
class Chunk:
    """One sequence's part of one step: tokens `ids` at positions `start ..`."""

    blocks: Sequence[int]
    """The block table: block `i` holds positions `i * block_size ..`. Covers all of `ids`."""
    ids: Sequence[int]
    start: int
    sample: bool
    """Sample the token after the last of `ids`."""
    sampling: Sampling
    output_index: int
    """Output index of the token to sample: with `sampling.seed` it fixes the random number."""
    num_output: int = 0
    """Tokens of the output that are already there (for min_tokens)."""


class ModelRunner(Protocol):
    @property
    def layout(self) -> KvLayout: ...

    @property
    def model_digest(self) -> str: ...

    @property
    def max_context(self) -> int: ...

    @property
    def vocab_size(self) -> int:
        """Ids the model can read are below it."""

    @property
    def eos_ids(self) -> frozenset[int]: ...

    def bind(self, arena: Arena) -> None:
        """The arena holds the KV; called once, before the first step."""

    def step(self, chunks: Sequence[Chunk]) -> list[int | None]:
        """Write KV of all chunks into their blocks, return the sampled id of each (None where
        `sample` is false). Blocks; runs in the engine's thread."""

    def copy_block(self, source: int, target: int) -> None:
        """Copy-on-write of one block."""
