"""Who waits, who runs, and which blocks they have: admission, growth and preemption.

The only place where sequences get and give blocks. It knows no jobs, no transfers and no model.
Sequences wait in order of arrival. The oldest running one always gets its block: the youngest is
put back for it, so some choice always makes progress.
"""

from collections import deque
from collections.abc import Sequence

from protocol.errors import LocalError
from worker.engine.batching import blocks_for, plan_step
from worker.engine.runner import Chunk
from worker.engine.sequences import ActiveSequence, Stage
from worker.kv.pool import BlockPool

Planned = tuple[ActiveSequence, int]
"""A sequence and how many of its tokens run in this step."""


class Roster:
    """The sequences of one engine and their references in the pool."""

    def __init__(self, pool: BlockPool, *, num_blocks: int, block_size: int) -> None:
        self._pool = pool
        self._block_size = block_size
        self._watermark = max(1, num_blocks // 100)
        self._num_stores = 0
        self.waiting: deque[ActiveSequence] = deque()
        self.running: list[ActiveSequence] = []
        """By age, the oldest first."""
        self.num_preempted = 0

    def place(self, sequence: ActiveSequence, *, alone: bool) -> bool:
        """Give it blocks for all of its tokens, cached ones first. False: not now.

        The last token is never taken from the cache: computing it gives the next one. Unless it is
        `alone`, some blocks are left for those that grow.
        """
        state = (self._pool.num_available, self._num_stores)
        if sequence.refused_at == state:
            return False
        usable = self._num_usable(sequence)
        cached = self._pool.match(sequence.hash_full_blocks()[:usable])
        missing = blocks_for(len(sequence.ids), self._block_size) - len(cached)
        spare = 0 if alone else self._watermark
        fresh = None
        if missing + spare <= self._pool.num_available:
            fresh = self._pool.allocate(missing)
        if fresh is None:
            self._pool.release(cached)
            sequence.refused_at = state
            return False
        sequence.blocks = cached + fresh
        sequence.num_stored = len(cached)
        sequence.num_computed = len(cached) * self._block_size
        sequence.cached_tokens = sequence.num_computed
        return True

    def follows(self, sequence: ActiveSequence) -> bool:
        """Whether a running sequence is computing the very blocks that this one would compute
        next: it waits until they are in the cache, or until that other one runs no more.

        Only what waits follows and only what runs is followed, so nobody waits in a circle.
        """
        if sequence.leader is not None:
            leader, last = sequence.leader
            if leader.stage is Stage.RUNNING and leader.num_stored <= last:
                return True
            sequence.leader = None
        if sequence.handle is not None:
            return False
        hashes = sequence.hash_full_blocks()[: self._num_usable(sequence)]
        for leader in self.running:
            at = leader.num_stored
            theirs = leader.hashes
            # Hashes are chained: one that is equal says that all before it are.
            if at < min(len(hashes), len(theirs)) and hashes[at] == theirs[at]:
                sequence.leader = (leader, _last_common(hashes, theirs, at))
                return True
        return False

    def run(self, sequence: ActiveSequence) -> None:
        """It takes part in the steps from now on."""
        sequence.stage = Stage.RUNNING
        self.running.append(sequence)
        self.running.sort(key=lambda one: one.serial)

    def plan(self, *, max_step_tokens: int) -> list[Planned]:
        """What runs in this step, with blocks for all of it; preempts where they do not suffice."""
        if not self.running:
            return []
        candidates = list(self.running)
        size = self._block_size
        counts = plan_step(
            [len(sequence.ids) - sequence.num_computed for sequence in candidates],
            max_step_tokens=max_step_tokens,
            min_prefill=size,
        )
        planned = []
        for sequence, count in zip(candidates, counts, strict=True):
            if not count or sequence.stage is not Stage.RUNNING:
                continue
            has_room = sequence.num_computed + count <= len(sequence.blocks) * size
            if has_room or self._grow(sequence, count):
                planned.append((sequence, count))
        return planned

    def store_full_blocks(self, sequence: ActiveSequence) -> None:
        """Put its computed full blocks into the prefix cache; they are not written any more."""
        full = sequence.num_computed // self._block_size
        if full <= sequence.num_stored:
            return
        hashes = sequence.hash_full_blocks()
        for index in range(sequence.num_stored, full):
            self._pool.store(sequence.blocks[index], hashes[index])
        self._num_stores += full - sequence.num_stored
        sequence.num_stored = full

    def drop(self, sequence: ActiveSequence) -> None:
        """It is over: it stands nowhere any more, and its blocks are given back."""
        if sequence.stage is Stage.WAITING:
            self.waiting.remove(sequence)
        elif sequence.stage is Stage.RUNNING:
            self.running.remove(sequence)
        self._pool.release(sequence.forget_blocks())
        sequence.stage = Stage.ENDED

    def validate(self, chunks: Sequence[Chunk]) -> None:
        """Raises LocalError if one of them would write what others may read."""
        for chunk in chunks:
            end = blocks_for(chunk.start + len(chunk.ids), self._block_size)
            for block in chunk.blocks[chunk.start // self._block_size : end]:
                if not self._pool.is_writable(block):
                    raise LocalError(f"block {block} is to be written, and others may read it")

    def _num_usable(self, sequence: ActiveSequence) -> int:
        """Leading blocks that it may take from the cache. Tokens of the prompt that are to be
        scored must be computed, from the one before them on."""
        num_tokens = len(sequence.ids)
        if sequence.prompt_logprobs is not None:
            num_tokens = min(num_tokens, len(sequence.prompt_logprobs))
        return (num_tokens - 1) // self._block_size

    def _grow(self, sequence: ActiveSequence, count: int) -> bool:
        """Blocks for `count` more tokens. False: it was put back itself."""
        end = blocks_for(sequence.num_computed + count, self._block_size)
        while (missing := end - len(sequence.blocks)) > 0:
            fresh = self._pool.allocate(missing)
            if fresh is not None:
                sequence.blocks += fresh
                return True
            # By age, so nobody who already has a place in this step is younger than this one.
            youngest = self.running[-1]
            self._preempt(youngest)
            if youngest is sequence:
                return False
        return True

    def _preempt(self, sequence: ActiveSequence) -> None:
        """Put it back to the front of the queue; prompt and output are computed again later."""
        self.running.remove(sequence)
        self._pool.release(sequence.forget_blocks())
        sequence.stage = Stage.WAITING
        self.waiting.appendleft(sequence)
        self.num_preempted += 1


def _last_common(ours: Sequence[bytes], theirs: Sequence[bytes], first: int) -> int:
    """The last index at which two chains of hashes agree; they do at `first`."""
    low, high = first, min(len(ours), len(theirs)) - 1
    while low < high:
        middle = (low + high + 1) // 2
        if ours[middle] == theirs[middle]:
            low = middle
        else:
            high = middle - 1
    return low
