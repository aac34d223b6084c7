"""Eligible workers by role, ordered by how free they are, at constant cost.

A *group* is the workers of one model that may hand KV to each other: equal model digest and layout.
It has two pools, and a `both` worker sits in both. A pool keeps its workers in buckets of load, so
the freest are found without a look at the others; it also adds up places and blocks, which is what
prefill is admitted against. Nothing here costs O(workers) per request.
"""

from collections import Counter
from collections.abc import Set
from itertools import islice
from typing import TYPE_CHECKING, Final, Literal

from protocol.errors import LocalError
from protocol.worker_info import KvLayout, Role, WorkerInfo

if TYPE_CHECKING:
    from router.scheduling.fleet import Worker
    from router.scheduling.lifecycle import Choice

PoolRole = Literal["prefill", "decode"]

FULL: Final = 31
"""The bucket of those that take nothing now."""
_PREFILL_UNIT_BITS: Final = 8
PREFILL_QUEUE: Final = 2
"""Prefills in flight per place: enough that the worker never waits for the bus."""


class Seat:
    """One worker's place in one pool."""

    __slots__ = (
        "_blocks", "_context", "_idle", "_running", "_sizes", "bucket", "pool", "position",
        "worker",
    )  # fmt: skip

    def __init__(self, pool: "Pool", worker: "Worker") -> None:
        self.pool = pool
        self.worker = worker
        self.position = len(pool.order)
        pool.order.append(self)
        pool.members[worker.id] = self
        capacity = worker.info.capacity
        self._sizes = (capacity.max_running, capacity.num_blocks)
        pool.max_running += capacity.max_running
        pool.num_blocks += capacity.num_blocks
        self._context = capacity.max_context
        pool.contexts[self._context] = pool.contexts.get(self._context, 0) + 1
        self._running = worker.running
        self._blocks = worker.blocks + worker.foreign_blocks
        self._idle = not (worker.running or worker.blocks)
        pool.running += self._running
        pool.blocks += self._blocks
        pool.num_idle += self._idle
        self.bucket = pool.bucket_of(worker)
        pool.enter(self)

    def update(self) -> None:
        """The worker's load has changed."""
        worker = self.worker
        pool = self.pool
        blocks = worker.blocks + worker.foreign_blocks
        pool.running += worker.running - self._running
        pool.blocks += blocks - self._blocks
        self._running = worker.running
        self._blocks = blocks
        idle = not (worker.running or worker.blocks)
        pool.num_idle += idle - self._idle
        self._idle = idle
        bucket = pool.bucket_of(worker)
        if bucket != self.bucket:
            pool.exit(self)
            self.bucket = bucket
            pool.enter(self)

    def leave(self) -> None:
        pool = self.pool
        last = pool.order.pop()
        if last is not self:
            pool.order[self.position] = last
            last.position = self.position
        del pool.members[self.worker.id]
        pool.max_running -= self._sizes[0]
        pool.num_blocks -= self._sizes[1]
        pool.contexts[self._context] -= 1
        if not pool.contexts[self._context]:
            del pool.contexts[self._context]
        pool.running -= self._running
        pool.blocks -= self._blocks
        pool.num_idle -= self._idle
        pool.exit(self)


class Pool:
    """The eligible workers of one group and role."""

    __slots__ = (
        "blocks", "buckets", "contexts", "max_running", "members", "num_blocks", "num_idle",
        "occupied", "order", "role", "running",
    )  # fmt: skip

    def __init__(self, role: PoolRole) -> None:
        self.role: PoolRole = role
        self.order: list[Seat] = []
        """For sampling; the order means nothing."""
        self.members: dict[str, Seat] = {}
        """By worker id: two workers may claim one incarnation, one of them a liar."""
        self.buckets: list[dict[Seat, None]] = [{} for _ in range(FULL + 1)]
        self.occupied = 0
        """Bit n: bucket n is not empty."""
        self.contexts: dict[int, int] = {}
        """How many take sequences of at most so many tokens."""
        self.max_running = 0
        self.num_blocks = 0
        self.running = 0
        self.blocks = 0
        self.num_idle = 0
        """Workers with nothing of ours: they take whatever is not too long for them."""

    def bucket_of(self, worker: "Worker") -> int:
        capacity = worker.info.capacity
        if worker.claim or worker.refused:
            return FULL
        if self.role == "prefill":
            if worker.prefills >= PREFILL_QUEUE * capacity.max_running:
                return FULL
            return min(FULL - 1, (worker.tokens >> _PREFILL_UNIT_BITS).bit_length())
        if worker.running >= capacity.max_running:
            return FULL  # also where a worker says that it runs nothing
        blocks = (worker.blocks + worker.foreign_blocks) / max(1, capacity.num_blocks)
        return min(FULL - 1, int(max(worker.running / capacity.max_running, blocks) * FULL))

    def enter(self, seat: Seat) -> None:
        self.buckets[seat.bucket][seat] = None
        self.occupied |= 1 << seat.bucket

    def exit(self, seat: Seat) -> None:
        bucket = self.buckets[seat.bucket]
        del bucket[seat]
        if not bucket:
            self.occupied &= ~(1 << seat.bucket)

    def freest(self, count: int) -> list["Worker"]:
        """Up to `count` of the least loaded workers; none that is full."""
        found: list[Worker] = []
        rest = self.occupied & ((1 << FULL) - 1)
        while rest and len(found) < count:
            low = rest & -rest
            rest ^= low
            bucket = self.buckets[low.bit_length() - 1]
            found += [seat.worker for seat in islice(bucket, count - len(found))]
        return found

    @property
    def is_full(self) -> bool:
        """Nobody takes anything now."""
        return not self.occupied & ((1 << FULL) - 1)

    def context_for(self, tokens: int) -> int:
        """Of the smallest workers that take more than so many; 0 if there are none."""
        return min((context for context in self.contexts if context > tokens), default=0)

    def has(self, worker: "Worker") -> bool:
        """Whether this very process sits here, not its successor of the same name."""
        seat = self.members.get(worker.id)
        return seat is not None and seat.worker is worker

    def all_in(self, incarnations: Set[str]) -> bool:
        """True if nobody else is here (also if nobody is)."""
        return all(seat.worker.incarnation in incarnations for seat in self.order)

    def validate(self) -> None:
        workers = [seat.worker for seat in self.order]
        counted = (
            sum(w.info.capacity.max_running for w in workers),
            sum(w.info.capacity.num_blocks for w in workers),
            sum(w.running for w in workers),
            sum(w.blocks + w.foreign_blocks for w in workers),
            sum(not (w.running or w.blocks) for w in workers),
        )
        books = (self.max_running, self.num_blocks, self.running, self.blocks, self.num_idle)
        if counted != books:
            raise LocalError(f"the {self.role} pool does not add up")
        for position, seat in enumerate(self.order):
            right = seat.position == position and seat in self.buckets[seat.bucket]
            if not right or seat.bucket != self.bucket_of(seat.worker):
                raise LocalError(f"{seat.worker.id} sits wrongly in the {self.role} pool")
        contexts = Counter(w.info.capacity.max_context for w in workers)
        if contexts != self.contexts:
            raise LocalError(f"the {self.role} pool's contexts do not add up")
        if sum(map(len, self.buckets)) != len(self.order) or len(self.members) != len(self.order):
            raise LocalError(f"the {self.role} pool has strangers")


class Group:
    """Workers of one model that may hand KV to each other."""

    __slots__ = (
        "_contexts", "block_size", "decode", "digest", "layout", "model", "num_pending",
        "num_workers", "pending_blocks", "prefill", "waiters",
    )  # fmt: skip

    def __init__(self, model: str, digest: str, layout: KvLayout) -> None:
        self.model = model
        self.digest = digest
        self.layout = layout
        self.block_size = max(1, layout.block_size)
        self.prefill = Pool("prefill")
        self.decode = Pool("decode")
        self.num_workers = 0
        self._contexts: dict[int, int] = {}
        self.num_pending = 0
        """Choices that were admitted to prefill and have no decode place yet."""
        self.pending_blocks = 0
        self.waiters: dict[str, Choice] = {}
        """Choices in `decode_wait`, the oldest first."""

    def pools(self, role: Role) -> list[Pool]:
        if role == "both":
            return [self.prefill, self.decode]
        return [self.prefill if role == "prefill" else self.decode]

    def join(self, info: WorkerInfo) -> None:
        self.num_workers += 1
        if info.role != "prefill":
            length = info.capacity.max_context
            self._contexts[length] = self._contexts.get(length, 0) + 1

    def leave(self, info: WorkerInfo) -> None:
        self.num_workers -= 1
        if info.role != "prefill":
            length = info.capacity.max_context
            self._contexts[length] -= 1
            if not self._contexts[length]:
                del self._contexts[length]

    @property
    def max_context(self) -> int:
        """Tokens of the longest sequence that any listed decode worker takes; 0 if none is."""
        return max(self._contexts, default=0)

    def has_place(self, blocks: int) -> bool:
        """Projected decode capacity: would one more, now prefilled, find a place?"""
        pool = self.decode
        if not pool.running and not self.num_pending:
            return bool(pool.order)
        return pool.num_idle > self.num_pending or (
            pool.running + self.num_pending < pool.max_running
            and pool.blocks + self.pending_blocks + blocks <= pool.num_blocks
        )

    def validate(self) -> None:
        self.prefill.validate()
        self.decode.validate()
