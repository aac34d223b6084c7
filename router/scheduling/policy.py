"""Which worker: eligible -> candidates -> cost -> choose, plain functions.

Cost is in token-equivalents, lower is better: what a worker still has to compute, what this choice
would add, and how crowded its batch and its cache are. Candidates are the holders of the longest
prefix, the freest few and some random samples; pure sampling leaves work waiting beside idle
workers, pure freedom never uses a cache. Nothing here changes anything.
"""

from collections.abc import Mapping, Set
from typing import Final, Protocol

from msgspec import Struct

from router.scheduling.fleet import Reservation, Worker
from router.scheduling.pools import PREFILL_QUEUE, Pool
from router.scheduling.prefix_index import Match, deepest, depth_of

RUNNING_COST: Final = 32
"""One running sequence slows the others as so many tokens of prefill would."""
FULL_COST: Final = 2048
"""A full cache, as opposed to an empty one."""
_HOLDERS: Final = 4
_FREEST: Final = 3


class Rng(Protocol):
    """As much of `random.Random` as is needed."""

    def random(self) -> float: ...
    def randrange(self, stop: int, /) -> int: ...


class Want(Struct, eq=False, gc=False):
    """What one choice asks of a worker of one group."""

    tokens: int
    """Prompt and output so far."""
    prefill_blocks: int
    decode_blocks: int
    """Prompt, output so far and expected output."""
    block_size: int
    excluded: Set[str]
    match: Match
    num_samples: int
    shared: Reservation | None = None
    """A sibling's prefill of the same prompt."""
    shared_tokens: int = 0
    """How much of it will be in that worker's cache: the whole blocks before the last token."""


class Pick(Struct, eq=False, gc=False):
    worker: Worker
    cost: float
    uncached: int
    """Tokens it would have to compute."""


def candidates(
    pool: Pool, want: Want, by_slot: Mapping[int, Worker], rng: Rng, num_slots: int
) -> dict[Worker, None]:
    """A few eligible workers, in no order of merit."""
    found: dict[Worker, None] = {}
    order = pool.order
    if len(order) <= _FREEST + want.num_samples:
        for seat in order:
            found[seat.worker] = None
        return found
    if want.match:
        for slot in deepest(want.match, _HOLDERS, rng.randrange(num_slots)):
            holder = by_slot.get(slot)
            if holder is not None and pool.has(holder):
                found[holder] = None
    shared = want.shared
    if shared is not None and pool.has(shared.worker):
        found[shared.worker] = None
    for worker in pool.freest(_FREEST + len(want.excluded)):
        found[worker] = None
    for _ in range(want.num_samples):
        found[order[int(rng.random() * len(order))].worker] = None
    return found


def others(pool: Pool, want: Want, found: Mapping[Worker, None]) -> dict[Worker, None]:
    """Everybody, for when those found are perhaps too small and the rest not. Only where sizes
    differ and this one is between them, so that it may cost a look at all."""
    between = smallest(pool) < want.tokens <= largest(pool)
    if not between or pool.is_full or len(found) >= len(pool.order):
        return {}
    return {seat.worker: None for seat in pool.order}


def uncached_tokens(worker: Worker, want: Want) -> int:
    """At least one token is always computed."""
    cached = depth_of(want.match, worker.slot) * want.block_size if want.match else 0
    if want.shared is not None and worker is want.shared.worker:
        cached = max(cached, want.shared_tokens)
    return max(1, want.tokens - cached)


def tokens_ahead(worker: Worker, want: Want) -> int:
    """Tokens it computes before this choice's own. A sibling's prefill is not ahead of it: it is
    the choice's own work, which would take as long elsewhere."""
    if want.shared is not None and worker is want.shared.worker:
        return worker.tokens - want.shared.tokens
    return worker.tokens


def fits_prefill(worker: Worker, want: Want) -> bool:
    """A few whole batches may wait at a worker. One with nothing of ours always fits, as below."""
    capacity = worker.info.capacity
    if worker.claim or worker.refused or want.tokens > capacity.max_context:
        return False
    free = capacity.num_blocks - worker.blocks - worker.foreign_blocks
    return not worker.blocks or (
        worker.prefills < PREFILL_QUEUE * capacity.max_running and want.prefill_blocks <= free
    )


def fits_decode(worker: Worker, want: Want) -> bool:
    """A worker with nothing of ours always fits: it queues or refuses by itself."""
    capacity = worker.info.capacity
    if worker.claim or worker.refused or want.tokens >= capacity.max_context:
        return False
    free = capacity.num_blocks - worker.blocks - worker.foreign_blocks
    return not worker.blocks or (
        worker.running < capacity.max_running and want.decode_blocks <= free
    )


def could_take(pool: Pool, tokens: int, excluded: Set[str]) -> bool:
    """Whether anybody here is large enough, however busy, and not excluded."""
    if tokens > largest(pool):
        return False
    return not excluded or any(
        tokens <= seat.worker.info.capacity.max_context - _more(pool)
        and seat.worker.incarnation not in excluded
        for seat in pool.order
    )


def largest(pool: Pool) -> int:
    """Tokens that somebody here can take; 0 if nobody is."""
    return max(0, max(pool.contexts, default=0) - _more(pool))


def smallest(pool: Pool) -> int:
    """Tokens that everybody here can take; 0 if nobody is."""
    return max(0, min(pool.contexts, default=0) - _more(pool))


def _more(pool: Pool) -> int:
    """A sequence that decodes needs room for a token more."""
    return 1 if pool.role == "decode" else 0


def prefill_cost(worker: Worker, want: Want, uncached: int) -> float:
    """In tokens: what it computes until this choice's first, `uncached` of them the choice's."""
    return tokens_ahead(worker, want) + uncached + RUNNING_COST * worker.running


def decode_cost(worker: Worker, want: Want, uncached: int) -> float:
    """The same, and dearer the fuller its blocks are: later tokens need room."""
    crowd = (worker.blocks + worker.foreign_blocks) / max(1, worker.info.capacity.num_blocks)
    return prefill_cost(worker, want, uncached) + FULL_COST * crowd


def choose_prefill(want: Want, found: Mapping[Worker, None]) -> Pick | None:
    """The cheapest of those found that it fits and has not failed it; None if there is none."""
    best: Pick | None = None
    for worker in found:
        if worker.incarnation in want.excluded or not fits_prefill(worker, want):
            continue
        uncached = uncached_tokens(worker, want)
        cost = prefill_cost(worker, want, uncached)
        if best is None or cost < best.cost:
            best = Pick(worker, cost, uncached)
    return best


def choose_decode(want: Want, found: Mapping[Worker, None], *, local: bool) -> Pick | None:
    """`local`: it prefills for itself, so what it has cached counts."""
    best: Pick | None = None
    for worker in found:
        if worker.incarnation in want.excluded or not fits_decode(worker, want):
            continue
        uncached = uncached_tokens(worker, want) if local else 0
        cost = decode_cost(worker, want, uncached)
        if best is None or cost < best.cost:
            best = Pick(worker, cost, uncached)
    return best


def should_disaggregate(want: Want, here: Pick, there: Pick | None, limit: int) -> bool:
    """The decider: a long uncached part, and a prefill worker that is not the decode worker."""
    if there is None or here.uncached <= limit or there.worker is here.worker:
        return False
    both = here.worker.info.role == "both"
    return not (both and prefill_cost(here.worker, want, here.uncached) <= there.cost)
