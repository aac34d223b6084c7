"""The block pool against a naive model that keeps what is *in* every block.

Blocks are written only where the pool says they are writable. Whatever the schedule: nobody's
blocks change under them, a cached block holds what its hash says, the counts are those of the
references, and the events replayed give the cache.
"""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    MultipleResults,
    RuleBasedStateMachine,
    consumes,
    invariant,
    multiple,
    rule,
)

from protocol.errors import LocalError
from protocol.events import KvCleared, KvEvent, KvRemoved, KvStored
from worker.kv.pool import BlockPool, PoolCounts

NUM_BLOCKS = 10
PROMPTS = st.lists(st.integers(0, 1), min_size=1, max_size=5)


def hashes_of(prompt: list[int]) -> list[bytes]:
    """The chained hash of a block is, here, all tokens up to its end."""
    return [bytes(prompt[: end + 1]).rjust(16, b"\xff") for end in range(len(prompt))]


Held = list[tuple[int, bytes]]
"""Blocks of one holder, with what it expects in each."""


class PoolMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(NUM_BLOCKS, 1)
        self.content = [b""] * NUM_BLOCKS
        self.live: list[Held] = []
        self.lent: list[Held] = []
        self.fenced: list[list[int]] = []
        self.told: set[bytes] = set()
        self.num_writes = 0

    sequences: Bundle[Held] = Bundle("sequences")
    leases: Bundle[Held] = Bundle("leases")
    transfers: Bundle[list[int]] = Bundle("transfers")

    def write(self, block: int, content: bytes) -> None:
        assert self.pool.is_writable(block)
        self.content[block] = content

    def take(self, count: int) -> list[int] | None:
        available = self.pool.num_available
        before = self.pool.counts()
        blocks = self.pool.allocate(count)
        assert (blocks is None) is (count > available)
        if blocks is None:
            assert self.pool.counts() == before
            return None
        held = {block for owner in self.live + self.lent for block, _ in owner}
        assert held.isdisjoint(blocks)
        assert not {block for owner in self.fenced for block in owner} & set(blocks)
        return blocks

    @rule(target=sequences, prompt=PROMPTS, tail=st.booleans())
    def prefill(self, prompt: list[int], tail: bool) -> MultipleResults[Held] | Held:
        """All full blocks are stored, an unfilled last one is not."""
        hashes = hashes_of(prompt)
        hit = self.pool.match(hashes)
        fresh = self.take(len(hashes) - len(hit) + tail)
        if fresh is None:
            self.pool.release(hit)
            return multiple()
        self.num_writes += 1
        wanted = [*hashes, b"tail %d" % self.num_writes][: len(hit) + len(fresh)]
        for index, block in enumerate(fresh, len(hit)):
            self.write(block, wanted[index])
            if index < len(hashes):
                self.pool.store(block, hashes[index])
        held = list(zip([*hit, *fresh], wanted, strict=True))
        self.live.append(held)
        return held

    @rule(target=sequences, prompt=PROMPTS)
    def prefill_without_the_cache(self, prompt: list[int]) -> MultipleResults[Held] | Held:
        hashes = hashes_of(prompt)
        fresh = self.take(len(hashes))
        if fresh is None:
            return multiple()
        for block, digest in zip(fresh, hashes, strict=True):
            self.write(block, digest)
            self.pool.store(block, digest)
        held = list(zip(fresh, hashes, strict=True))
        self.live.append(held)
        return held

    @rule(held=consumes(sequences))
    def finish(self, held: Held) -> None:
        self.pool.release([block for block, _ in held])
        self.live = [other for other in self.live if other is not held]

    @rule(target=leases, held=sequences)
    def lend(self, held: Held) -> Held:
        lease = list(held)
        self.pool.lend([block for block, _ in lease])
        self.lent.append(lease)
        return lease

    @rule(lease=consumes(leases))
    def end_lease(self, lease: Held) -> None:
        self.pool.unlend([block for block, _ in lease])
        self.lent = [other for other in self.lent if other is not lease]

    @rule(target=transfers, count=st.integers(1, 4))
    def give_up_a_pull(self, count: int) -> MultipleResults[list[int]] | list[int]:
        blocks = self.take(count)
        if blocks is None:
            return multiple()
        self.pool.quarantine(blocks)
        self.fenced.append(blocks)
        return blocks

    @rule(blocks=transfers)
    def late_bytes_arrive(self, blocks: list[int]) -> None:
        if any(blocks is other for other in self.fenced):
            for block in blocks:
                self.content[block] = b"late"

    @rule(blocks=consumes(transfers))
    def transfer_ends(self, blocks: list[int]) -> None:
        self.pool.unquarantine(blocks)
        self.fenced = [other for other in self.fenced if other is not blocks]

    @rule()
    def clear_cache(self) -> None:
        self.pool.clear_cache()

    @rule()
    def take_events(self) -> None:
        events = self.pool.take_events()
        assert len({type(event) for event in events}) == len(events)
        for event in events:
            self.told = applied(self.told, event)
        assert self.told == set(self.pool.cached_hashes())

    @rule(block=st.integers(0, NUM_BLOCKS - 1))
    def misuse(self, block: int) -> None:
        """Nobody may drop a reference that nobody has."""
        used = any(block == other for owner in self.live for other, _ in owner)
        lent = any(block == other for owner in self.lent for other, _ in owner)
        fenced = any(block in owner for owner in self.fenced)
        for held, drop in (
            (used, self.pool.release),
            (lent, self.pool.unlend),
            (fenced, self.pool.unquarantine),
        ):
            if not held:
                with pytest.raises(LocalError):
                    drop([block])

    @invariant()
    def everybody_reads_what_he_expects(self) -> None:
        for held in self.live + self.lent:
            for block, expected in held:
                assert self.content[block] == expected

    @invariant()
    def counts_are_those_of_the_references(self) -> None:
        self.pool.validate()
        fenced = {block for owner in self.fenced for block in owner}
        lent = {block for owner in self.lent for block, _ in owner}
        used = {block for owner in self.live for block, _ in owner} - lent
        found = self.pool.counts()
        assert (found.quarantined, found.lent, found.used) == (len(fenced), len(lent), len(used))
        assert self.pool.num_available == found.free + found.cached
        assert self.pool.num_available == NUM_BLOCKS - len(fenced | lent | used)

    @invariant()
    def a_cached_block_holds_what_its_hash_says(self) -> None:
        for digest, block in self.pool._cached.items():
            assert self.content[block] == digest

    def teardown(self) -> None:
        for held in self.live:
            self.pool.release([block for block, _ in held])
        for lease in self.lent:
            self.pool.unlend([block for block, _ in lease])
        for blocks in self.fenced:
            self.pool.unquarantine(blocks)
        cached = len(self.pool.cached_hashes())
        assert self.pool.counts() == PoolCounts(NUM_BLOCKS - cached, cached, 0, 0, 0)
        self.pool.validate()


def applied(cache: set[bytes], event: KvEvent) -> set[bytes]:
    match event:
        case KvCleared():
            return set()
        case KvStored(hashes):
            gained = split(hashes)
            assert gained.isdisjoint(cache)
            return cache | gained
        case KvRemoved(hashes):
            lost = split(hashes)
            assert lost <= cache
            return cache - lost


def split(hashes: bytes) -> set[bytes]:
    return {hashes[start : start + 16] for start in range(0, len(hashes), 16)}


TestPool = PoolMachine.TestCase
TestPool.settings = settings(
    max_examples=120, stateful_step_count=40, deadline=None, derandomize=True
)
