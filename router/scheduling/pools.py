"""Eligible workers by role, ordered by how free they are, at constant cost.

A *group* is the workers of one model that may hand KV to each other: equal model digest and layout.
It has two pools, and a `both` worker sits in both. A pool keeps its workers in buckets of load, so
the freest are found without a look at the others; it also adds up places and blocks, which is what
prefill is admitted against. Nothing here costs O(workers) per request.
"""

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


class Tier:
    """The workers of one pool that take sequences of equal length, and what is taken of them."""

    __slots__ = ("blocks", "max_running", "num_blocks", "num_workers", "running")

    def __init__(self) -> None:
        self.num_workers = 0
        self.max_running = 0
        self.num_blocks = 0
        self.running = 0
        self.blocks = 0

    def books(self) -> tuple[int, int, int, int, int]:
        return self.num_workers, self.max_running, self.num_blocks, self.running, self.blocks


class Seat:
    """One worker's place in one pool."""

    __slots__ = (
        "_blocks", "_context", "_idle", "_running", "_sizes", "_tier", "bucket", "pool",
        "position", "worker",
    )  # fmt: skip

    def __init__(self, pool: "Pool", worker: "Worker") -> None:
        self.pool = pool
        self.worker = worker
        self.position = len(pool.order)
        pool.order.append(self)
        pool.members[worker.id] = self
        capacity = worker.info.capacity
        self._sizes = (capacity.max_running, capacity.num_blocks)
        self._context = capacity.max_context
        tier = pool.tiers.get(self._context)
        if tier is None:
            tier = pool.tiers[self._context] = Tier()
        self._tier = tier
        tier.num_workers += 1
        tier.max_running += capacity.max_running
        tier.num_blocks += capacity.num_blocks
        self._running, self._blocks = _taken(worker)
        self._idle = not (worker.running or worker.blocks)
        tier.running += self._running
        tier.blocks += self._blocks
        pool.num_idle += self._idle
        self.bucket = pool.bucket_of(worker)
        pool.enter(self)

    def update(self) -> None:
        """The worker's load has changed."""
        worker = self.worker
        pool = self.pool
        tier = self._tier
        running, blocks = _taken(worker)
        tier.running += running - self._running
        tier.blocks += blocks - self._blocks
        self._running = running
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
        tier = self._tier
        tier.num_workers -= 1
        tier.max_running -= self._sizes[0]
        tier.num_blocks -= self._sizes[1]
        tier.running -= self._running
        tier.blocks -= self._blocks
        if not tier.num_workers:
            del pool.tiers[self._context]
        pool.num_idle -= self._idle
        pool.exit(self)


def _taken(worker: "Worker") -> tuple[int, int]:
    """Places and blocks that nobody else can have; more may be promised than there are."""
    capacity = worker.info.capacity
    blocks = worker.blocks + worker.foreign_blocks
    return min(worker.running, capacity.max_running), min(blocks, capacity.num_blocks)


class Pool:
    """The eligible workers of one group and role."""

    __slots__ = ("buckets", "members", "num_idle", "occupied", "order", "role", "tiers")

    def __init__(self, role: PoolRole) -> None:
        self.role: PoolRole = role
        self.order: list[Seat] = []
        """For sampling; the order means nothing."""
        self.members: dict[str, Seat] = {}
        """By worker id: two workers may claim one incarnation, one of them a liar."""
        self.buckets: list[dict[Seat, None]] = [{} for _ in range(FULL + 1)]
        self.occupied = 0
        """Bit n: bucket n is not empty."""
        self.tiers: dict[int, Tier] = {}
        """By the tokens of the longest sequence that they take."""
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

    def has(self, worker: "Worker") -> bool:
        """Whether this very process sits here, not its successor of the same name."""
        seat = self.members.get(worker.id)
        return seat is not None and seat.worker is worker

    def all_in(self, incarnations: Set[str]) -> bool:
        """True if nobody else is here (also if nobody is)."""
        return all(seat.worker.incarnation in incarnations for seat in self.order)

    def validate(self) -> None:
        workers = [seat.worker for seat in self.order]
        counted: dict[int, tuple[int, ...]] = {}
        for worker in workers:
            capacity = worker.info.capacity
            row = (1, capacity.max_running, capacity.num_blocks, *_taken(worker))
            before = counted.get(capacity.max_context, (0,) * len(row))
            counted[capacity.max_context] = tuple(a + b for a, b in zip(before, row, strict=True))
        num_idle = sum(not (w.running or w.blocks) for w in workers)
        books = {context: tier.books() for context, tier in self.tiers.items()}
        if (counted, num_idle) != (books, self.num_idle):
            raise LocalError(f"the {self.role} pool does not add up")
        for position, seat in enumerate(self.order):
            right = seat.position == position and seat in self.buckets[seat.bucket]
            if not right or seat.bucket != self.bucket_of(seat.worker):
                raise LocalError(f"{seat.worker.id} sits wrongly in the {self.role} pool")
        if sum(map(len, self.buckets)) != len(self.order) or len(self.members) != len(self.order):
            raise LocalError(f"the {self.role} pool has strangers")


class Group:
    """Workers of one model that may hand KV to each other."""

    __slots__ = (
        "_contexts", "block_size", "decode", "digest", "layout", "model", "num_pending",
        "num_workers", "pending", "prefill", "waiters",
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
        """Choices that were admitted to prefill and have no decode place yet, and none is kept for
        them."""
        self.pending: dict[int, tuple[int, int]] = {}
        """The same by the context that they need at least: how many, and their blocks."""
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

    def context_for(self, tokens: int) -> int:
        """Of the smallest decode workers that take so many; if there are none, of no worker's."""
        tiers = self.decode.tiers
        return min((context for context in tiers if context > tokens), default=tokens + 1)

    def count_pending(self, context: int, num: int, blocks: int) -> None:
        """So many more, or less, wait for a place at a worker of that context or a larger one."""
        before = self.pending.get(context, (0, 0))
        self.num_pending += num
        if before[0] + num:
            self.pending[context] = (before[0] + num, before[1] + blocks)
        else:
            del self.pending[context]

    def has_place(self, tokens: int, blocks: int) -> bool:
        """Projected decode capacity: would one more, now prefilled, find a place? Counted from the
        largest workers down: who waits for one of them takes no place of a smaller one."""
        pool = self.decode
        if pool.num_idle > self.num_pending:
            return True
        tiers = pool.tiers
        places = room = 0
        for context in sorted(tiers.keys() | self.pending.keys(), reverse=True):
            if context <= tokens:
                break
            tier = tiers.get(context)
            if tier is not None:
                places += tier.max_running - tier.running
                room += tier.num_blocks - tier.blocks
            num, waiting = self.pending.get(context, (0, 0))
            places = max(0, places - num)
            room = max(0, room - waiting)
        return places > 0 and blocks <= room

    def validate(self) -> None:
        self.prefill.validate()
        self.decode.validate()
