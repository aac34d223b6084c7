"""The model behind a stepped engine: compute one step over a batch, synchronously.

The stepper decides what runs; a runner only computes. It lives in the engine's thread and knows
nothing of jobs, leases, text or the loop.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import msgspec

from protocol.out import TokenLogprob
from protocol.sampling import Sampling
from protocol.worker_info import KvLayout
from worker.kv.arena import Arena


@dataclass(slots=True)
class Scores:
    """Log-probabilities that are asked for beside a chunk; the runner fills them in.

    Always of the model's own distribution, before penalties, biases, grammar and temperature.
    """

    num_top: int = -1
    """So many of the likeliest tokens beside the sampled one; -1: nothing of it."""
    prompt_num_top: int = -1
    """The same for tokens of the prompt."""
    prompt_from: int = 0
    """The first position whose token is to be scored, if this chunk computes the one before it."""
    sampled: TokenLogprob | None = None
    prompt: list[TokenLogprob] = field(default_factory=list)
    """Of the positions from `prompt_from` on: all that follow positions of this chunk."""


class Chunk(msgspec.Struct, frozen=True, gc=False):
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
    history: Sequence[int] = ()
    """All tokens, prompt and output, as far as they are known (for penalties and scores). It is
    the sequence's own array: neither changed nor kept by a runner."""
    num_prompt: int = 0
    """Leading tokens of `history` that are the prompt."""
    allowed: bytearray | None = None
    """A bit for each id that the grammar allows, the lowest first; None: no grammar. Not empty."""
    scores: Scores | None = None
    """None: nobody asks for log-probabilities."""

    @property
    def scored(self) -> range:
        """The positions of the prompt that `scores` wants and this chunk can tell: each by what
        the model says at the position before it."""
        scores = self.scores
        if scores is None or scores.prompt_num_top < 0:
            return range(0)
        end = min(self.start + len(self.ids) + 1, self.num_prompt)
        return range(max(self.start + 1, scores.prompt_from), end)


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
        """Write KV of all chunks into their blocks, fill in their `scores`, return the sampled
        id of each (None where `sample` is false). Blocks; runs in the engine's thread. When it
        returns nothing is under way in the arena: blocks are lent, or pulled into, right after."""
