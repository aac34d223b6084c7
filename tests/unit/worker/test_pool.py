"""The block pool: references, states, the cache and its eviction order, and what it refuses."""

from collections.abc import Callable, Iterator

import pytest

from protocol.errors import LocalError
from protocol.events import KvCleared, KvRemoved, KvStored
from worker.kv.pool import BlockPool, PoolCounts

A, B, C, D, E = (bytes([letter]) * 16 for letter in b"ABCDE")


@pytest.fixture
def pool() -> Iterator[BlockPool]:
    pool = BlockPool(8, 16)
    yield pool
    pool.validate()


def take(pool: BlockPool, count: int) -> list[int]:
    blocks = pool.allocate(count)
    assert blocks is not None
    return blocks


def cached(pool: BlockPool, *hashes: bytes) -> list[int]:
    """Blocks of a sequence that has come and gone and left these in the cache."""
    blocks = take(pool, len(hashes))
    for block, digest in zip(blocks, hashes, strict=True):
        pool.store(block, digest)
    pool.release(blocks)
    return blocks


def counts(**states: int) -> PoolCounts:
    given = {"cached": 0, "used": 0, "lent": 0, "quarantined": 0, **states}
    return PoolCounts(free=8 - sum(given.values()), **given)


def test_a_new_pool_is_free(pool: BlockPool) -> None:
    assert pool.counts() == counts()
    assert pool.num_available == 8
    assert pool.take_events() == []


@pytest.mark.parametrize(("num_blocks", "block_size"), [(0, 16), (8, 0), (-1, 16)])
def test_a_pool_of_nothing_is_refused(num_blocks: int, block_size: int) -> None:
    with pytest.raises(LocalError):
        BlockPool(num_blocks, block_size)


def test_allocated_blocks_are_distinct_writable_and_counted(pool: BlockPool) -> None:
    blocks = take(pool, 3)
    assert len(set(blocks)) == 3
    assert all(pool.is_writable(block) for block in blocks)
    assert pool.counts() == counts(used=3)
    pool.release(blocks)
    assert not pool.is_writable(blocks[0])
    assert pool.counts() == counts()


def test_allocation_is_all_or_nothing(pool: BlockPool) -> None:
    take(pool, 5)
    assert pool.allocate(4) is None
    assert pool.counts() == counts(used=5)
    assert pool.allocate(0) == []


def test_a_freed_block_is_used_again_last(pool: BlockPool) -> None:
    first = take(pool, 2)
    pool.release(first)
    assert set(take(pool, 6)).isdisjoint(first)


def test_stored_blocks_stay_cached_after_release_and_are_matched(pool: BlockPool) -> None:
    blocks = cached(pool, A, B)
    assert pool.counts() == counts(cached=2)
    assert pool.match([A, B, C]) == blocks
    assert pool.counts() == counts(used=2)
    pool.release(blocks)
    assert pool.cached_hashes() == [A, B]


def test_match_stops_at_the_first_block_that_is_missing(pool: BlockPool) -> None:
    blocks = cached(pool, A, C)
    assert pool.match([A, B, C]) == blocks[:1]
    assert pool.match([B, A]) == []


def test_several_sequences_share_a_cached_block(pool: BlockPool) -> None:
    blocks = cached(pool, A)
    assert pool.match([A]) == pool.match([A]) == blocks
    pool.release(blocks)
    assert pool.counts() == counts(used=1)
    pool.release(blocks)
    assert pool.counts() == counts(cached=1)


def test_a_stored_or_shared_block_is_not_writable(pool: BlockPool) -> None:
    own = take(pool, 1)
    pool.store(own[0], A)
    assert not pool.is_writable(own[0])
    shared = pool.match([A])
    pool.release(own)
    assert not pool.is_writable(shared[0])


def test_the_older_of_two_equal_blocks_is_cached_and_the_other_immutable(pool: BlockPool) -> None:
    older, newer = take(pool, 2)
    pool.store(older, A)
    pool.store(newer, A)
    assert not pool.is_writable(newer)
    assert pool.take_events() == [KvStored(A)]
    pool.release([newer])
    assert pool.counts() == counts(used=1)
    assert pool.match([A]) == [older]
    assert newer in take(pool, 7)
    assert pool.is_writable(newer)


def test_storing_content_again_keeps_the_older_copy_longer(pool: BlockPool) -> None:
    first = cached(pool, A)
    cached(pool, B)
    again = take(pool, 1)
    pool.store(again[0], A)
    pool.release(again)
    take(pool, 7)
    assert pool.cached_hashes() == [A]
    assert pool.match([A]) == first


def test_free_blocks_go_first_then_the_least_recently_used(pool: BlockPool) -> None:
    cached(pool, A)
    cached(pool, B)
    cached(pool, C)
    pool.release(pool.match([A]))
    take(pool, 5)
    assert pool.cached_hashes() == [A, B, C]
    take(pool, 1)
    assert pool.cached_hashes() == [A, C]
    take(pool, 1)
    assert pool.cached_hashes() == [A]


def test_children_are_evicted_before_their_parents(pool: BlockPool) -> None:
    cached(pool, A, B, C, D)
    pool.release(pool.match([A, B]))
    left = []
    for count in (5, 1, 1, 1):
        take(pool, count)
        left.append(pool.cached_hashes())
    assert left == [[A, B, C], [A, B], [A], []]


def test_blocks_of_an_ended_lease_are_evicted_children_first_too(pool: BlockPool) -> None:
    blocks = take(pool, 3)
    for block, digest in zip(blocks, (A, B, C), strict=True):
        pool.store(block, digest)
    pool.lend(blocks)
    pool.release(blocks)
    pool.unlend(blocks)
    take(pool, 6)
    assert pool.cached_hashes() == [A, B]


def test_referenced_blocks_are_never_evicted(pool: BlockPool) -> None:
    used, lent, fenced = cached(pool, A), cached(pool, B), take(pool, 1)
    pool.match([A])
    pool.lend(pool.match([B]))
    pool.release(lent)
    pool.quarantine(fenced)
    assert pool.counts() == counts(used=1, lent=1, quarantined=1)
    assert pool.num_available == 5
    assert pool.allocate(6) is None
    assert set(take(pool, 5)).isdisjoint([*used, *lent, *fenced])
    assert pool.cached_hashes() == [A, B]


def test_a_lease_holds_a_block_after_its_sequence_has_gone(pool: BlockPool) -> None:
    blocks = take(pool, 2)
    pool.lend(blocks)
    assert not pool.is_writable(blocks[0])
    pool.release(blocks)
    assert pool.counts() == counts(lent=2)
    pool.unlend(blocks)
    assert pool.counts() == counts()


def test_a_block_is_lent_until_its_last_lease_ends(pool: BlockPool) -> None:
    blocks = take(pool, 1)
    pool.lend(blocks)
    pool.lend(blocks)
    pool.unlend(blocks)
    assert pool.counts() == counts(lent=1)
    pool.unlend(blocks)
    assert pool.counts() == counts(used=1)
    assert pool.is_writable(blocks[0])


def test_a_lent_cached_block_can_be_matched(pool: BlockPool) -> None:
    blocks = cached(pool, A)
    pool.lend(pool.match([A]))
    pool.release(blocks)
    assert pool.match([A]) == blocks
    pool.unlend(blocks)
    assert pool.counts() == counts(used=1)


def test_quarantine_takes_over_the_reference_and_gives_the_block_back_free(
    pool: BlockPool,
) -> None:
    blocks = take(pool, 2)
    pool.quarantine(blocks)
    assert pool.counts() == counts(quarantined=2)
    assert not pool.is_writable(blocks[0])
    with pytest.raises(LocalError):
        pool.release(blocks)
    pool.unquarantine(blocks)
    assert pool.counts() == counts()


def test_events_are_net_and_merged(pool: BlockPool) -> None:
    cached(pool, A, B)
    assert pool.take_events() == [KvStored(A + B)]
    assert pool.take_events() == []
    held = take(pool, 8)
    assert pool.take_events() == [KvRemoved(B + A)]
    pool.store(held[0], C)
    pool.store(held[1], D)
    pool.release(held)
    assert pool.take_events() == [KvStored(C + D)]


def test_what_came_and_went_between_two_looks_is_no_news(pool: BlockPool) -> None:
    cached(pool, A)
    held = take(pool, 8)
    assert pool.take_events() == []
    pool.store(held[0], A)
    pool.take_events()
    pool.release(held)
    held = take(pool, 8)
    pool.store(held[0], A)
    pool.store(held[1], B)
    assert pool.take_events() == [KvStored(B)]
    pool.release(held)


def test_removed_comes_before_stored(pool: BlockPool) -> None:
    cached(pool, A)
    pool.take_events()
    held = take(pool, 8)
    pool.store(held[0], B)
    assert pool.take_events() == [KvRemoved(A), KvStored(B)]
    pool.release(held)


def test_clearing_the_cache_frees_what_nobody_holds_and_keeps_the_rest(pool: BlockPool) -> None:
    cached(pool, A)
    held = take(pool, 1)
    pool.store(held[0], B)
    pool.take_events()
    pool.clear_cache()
    assert pool.counts() == counts(used=1)
    assert pool.cached_hashes() == []
    assert pool.match([B]) == []
    assert not pool.is_writable(held[0])
    assert pool.take_events() == [KvCleared()]
    pool.release(held)
    assert pool.counts() == counts()


def test_what_is_stored_after_a_clear_is_told_after_it(pool: BlockPool) -> None:
    cached(pool, A)
    pool.clear_cache()
    cached(pool, B)
    assert pool.take_events() == [KvCleared(), KvStored(B)]


MISUSE: dict[str, Callable[[BlockPool], object]] = {
    "a negative count": lambda pool: pool.allocate(-1),
    "release of a free block": lambda pool: pool.release([0, 7]),
    "release of a cached block": lambda pool: pool.release([1]),
    "release of a lent block": lambda pool: pool.release([2]),
    "release of one block twice": lambda pool: pool.release([0, 0]),
    "release outside": lambda pool: pool.release([0, 8]),
    "release of a negative number": lambda pool: pool.release([0, -1]),
    "store of a free block": lambda pool: pool.store(7, E),
    "store of a stored block": lambda pool: pool.store(4, E),
    "store of a quarantined block": lambda pool: pool.store(3, E),
    "lend of a free block": lambda pool: pool.lend([0, 7]),
    "lend of a quarantined block": lambda pool: pool.lend([0, 3]),
    "unlend of a used block": lambda pool: pool.unlend([2, 0]),
    "quarantine of a stored block": lambda pool: pool.quarantine([0, 4]),
    "quarantine of a lent block": lambda pool: pool.quarantine([0, 2]),
    "quarantine of a free block": lambda pool: pool.quarantine([0, 7]),
    "unquarantine of a used block": lambda pool: pool.unquarantine([3, 0]),
    "match of one hash twice": lambda pool: pool.match([A, A]),
    "a block outside": lambda pool: pool.is_writable(8),
}


@pytest.mark.parametrize("misuse", MISUSE.values(), ids=MISUSE)
def test_misuse_raises_and_changes_nothing(
    pool: BlockPool, misuse: Callable[[BlockPool], object]
) -> None:
    assert take(pool, 4) == [0, 1, 2, 3]
    pool.store(1, A)
    pool.lend([2])
    pool.release([1, 2])
    pool.quarantine([3])
    pool.store(take(pool, 1)[0], B)
    before = repr(vars(pool))
    with pytest.raises(LocalError):
        misuse(pool)
    assert repr(vars(pool)) == before
    assert pool.counts() == counts(used=2, cached=1, lent=1, quarantined=1)


def _double_count(pool: BlockPool) -> None:
    pool._counts[0] += 1


def _lose_free_block(pool: BlockPool) -> None:
    pool._free.pop()


def _double_free_block(pool: BlockPool) -> None:
    pool._free[0] = pool._free[1]


def _grow_eviction_order(pool: BlockPool) -> None:
    pool._evictable[99] = None


def _grow_cache(pool: BlockPool) -> None:
    pool._cached[E] = 7


def _break(index: int, field: str, value: object) -> Callable[[BlockPool], None]:
    return lambda pool: setattr(pool._blocks[index], field, value)


BREAKS: dict[str, Callable[[BlockPool], None]] = {
    "a wrong count": _double_count,
    "a lost free block": _lose_free_block,
    "a doubled free block": _double_free_block,
    "an eviction order too long": _grow_eviction_order,
    "a cache with a stranger": _grow_cache,
    "a state against the references": _break(7, "sequences", 1),
    "a negative count": _break(2, "sequences", -1),
    "a quarantined block in use": _break(3, "sequences", 1),
    "a shared block that may be written": _break(0, "sequences", 2),
    "a free block that may not": _break(7, "sealed", True),
    "a cached block out of the order": lambda pool: pool._evictable.clear(),
    "a hash of another block": lambda pool: pool._cached.update({A: 0}),
}


@pytest.mark.parametrize("damage", BREAKS.values(), ids=BREAKS)
def test_validate_finds_what_is_broken(damage: Callable[[BlockPool], None]) -> None:
    pool = BlockPool(8, 16)
    take(pool, 4)
    pool.store(1, A)
    pool.release([1])
    pool.lend([2])
    pool.quarantine([3])
    pool.validate()
    damage(pool)
    with pytest.raises(LocalError):
        pool.validate()
