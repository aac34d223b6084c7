"""Leases: the two orders that make the word a proof, each end once, slots, expiry."""

from collections.abc import Callable, Iterator, Sequence

import pytest

from protocol.errors import LocalError
from worker.handoff.source import Lease, Source
from worker.kv.pool import BlockPool, PoolCounts

NONCE = 0xFEED


class Journal:
    """Lease words and the pool's lease references, in the order in which they were touched."""

    def __init__(self) -> None:
        self.words: dict[int, int] = {}
        self.lines: list[str] = []

    def write(self, slot: int, word: int) -> None:
        self.words[slot] = word
        self.lines.append(f"word {slot} written")

    def zero(self, slot: int) -> None:
        self.words[slot] = 0
        self.lines.append(f"word {slot} zeroed")


class RecordingPool(BlockPool):
    def __init__(self, num_blocks: int, journal: Journal) -> None:
        super().__init__(num_blocks, 16)
        self._journal = journal

    def lend(self, blocks: Sequence[int]) -> None:
        super().lend(blocks)
        self._journal.lines.append("references taken")

    def unlend(self, blocks: Sequence[int]) -> None:
        super().unlend(blocks)
        self._journal.lines.append("references dropped")


class Lender:
    """A source with two slots over a pool of eight blocks, all of them held by one sequence."""

    def __init__(self) -> None:
        self.journal = Journal()
        self.pool = RecordingPool(8, self.journal)
        self.source = Source(self.pool, self.journal, num_slots=2, lease_s=30.0)
        self.pool.allocate(8)

    def lend(self, handle_id: str, blocks: Sequence[int] = (0, 1), *, now: float = 0.0) -> Lease:
        lease = self.source.lend(handle_id, blocks, NONCE, now)
        assert lease is not None
        return lease


@pytest.fixture
def lender() -> Iterator[Lender]:
    lender = Lender()
    yield lender
    lender.pool.validate()
    lender.source.validate()


def ids(leases: Sequence[Lease]) -> list[str]:
    return [lease.handle_id for lease in leases]


def test_a_lease_says_where_its_word_is_and_when_it_ends(lender: Lender) -> None:
    assert lender.lend("h", (3, 4), now=5.0) == Lease("h", 0, NONCE, (3, 4), 35.0, 5.0)
    assert lender.journal.words == {0: NONCE}
    assert lender.source.num_lent == 1
    assert lender.pool.counts() == PoolCounts(0, 0, 6, 2, 0)


def test_the_word_is_written_after_the_references_are_taken(lender: Lender) -> None:
    lender.lend("h")
    assert lender.journal.lines == ["references taken", "word 0 written"]


ENDS: dict[str, Callable[[Source], list[Lease]]] = {
    "released": lambda source: source.release(["h"], 1.0),
    "revoked": lambda source: source.revoke(["h"], 1.0),
    "expired": lambda source: source.expire(30.0),
}


@pytest.mark.parametrize("end", ENDS)
def test_the_word_is_zeroed_before_the_references_are_dropped(lender: Lender, end: str) -> None:
    lender.lend("h")
    lender.journal.lines.clear()
    assert ids(ENDS[end](lender.source)) == ["h"]
    assert lender.journal.lines == ["word 0 zeroed", "references dropped"]
    assert lender.journal.words == {0: 0}


@pytest.mark.parametrize("first", ENDS)
@pytest.mark.parametrize("second", ENDS)
def test_a_lease_ends_once(lender: Lender, first: str, second: str) -> None:
    lender.lend("h")
    assert ids(ENDS[first](lender.source)) == ["h"]
    lender.journal.lines.clear()
    assert ENDS[second](lender.source) == []
    lender.source.renew(["h"], 2.0)
    assert lender.journal.lines == []
    assert lender.source.num_lent == 0
    assert lender.source.next_deadline() is None
    assert lender.source.ended == {"released": 0, "revoked": 0, "expired": 0, first: 1}


def test_repeats_within_one_call_and_unknown_handles_are_ignored(lender: Lender) -> None:
    lender.lend("h")
    lender.source.renew(["?", "h", "h"], 1.0)
    assert ids(lender.source.release(["?", "h", "h"], 1.0)) == ["h"]
    assert lender.source.ended["released"] == 1


def test_no_free_slot_lends_nothing(lender: Lender) -> None:
    lender.lend("h1", (0,))
    lender.lend("h2", (1,))
    lender.journal.lines.clear()
    assert lender.source.lend("h3", (2,), NONCE, 0.0) is None
    assert lender.journal.lines == []
    assert lender.pool.counts().lent == 2


def test_a_slot_is_not_used_again_while_its_lease_lives_and_then_last() -> None:
    pool = BlockPool(8, 16)
    held = pool.allocate(8)
    source = Source(pool, Journal(), num_slots=3, lease_s=30.0)
    assert held is not None

    def slot_of(handle_id: str) -> int:
        lease = source.lend(handle_id, held, NONCE, 0.0)
        assert lease is not None
        return lease.slot

    assert [slot_of("h1"), slot_of("h2")] == [0, 1]
    source.release(["h2"], 0.0)
    assert slot_of("h3") == 2
    assert slot_of("h4") == 1
    source.release(["h3", "h1"], 0.0)
    assert [slot_of("h5"), slot_of("h6")] == [2, 0]


def test_several_leases_on_the_same_blocks_end_separately(lender: Lender) -> None:
    lender.lend("h1")
    lender.lend("h2")
    lender.source.release(["h1"], 1.0)
    assert lender.pool.counts().lent == 2
    lender.source.release(["h2"], 1.0)
    assert lender.pool.counts().lent == 0


def test_leases_outlive_their_sequence(lender: Lender) -> None:
    lender.lend("h")
    lender.pool.release(range(8))
    assert lender.pool.counts() == PoolCounts(6, 0, 0, 2, 0)
    lender.source.release(["h"], 1.0)
    assert lender.pool.counts() == PoolCounts(8, 0, 0, 0, 0)


def test_what_nobody_renews_expires_in_time_and_in_order(lender: Lender) -> None:
    lender.lend("h1", now=0.0)
    lender.lend("h2", now=10.0)
    assert lender.source.next_deadline() == 30.0
    lender.source.renew(["h1"], 20.0)
    assert lender.source.expire(39.9) == []
    assert lender.source.next_deadline() == 40.0
    assert ids(lender.source.expire(45.0)) == ["h2"]
    assert ids(lender.source.expire(50.0)) == ["h1"]
    assert lender.source.ended["expired"] == 2


def test_all_that_are_due_expire_at_once(lender: Lender) -> None:
    lender.lend("h1")
    lender.lend("h2")
    assert ids(lender.source.expire(1e9)) == ["h1", "h2"]


def test_a_renewal_that_comes_before_the_sweep_counts(lender: Lender) -> None:
    lender.lend("h", now=0.0)
    lender.source.renew(["h"], 31.0)
    assert lender.source.expire(32.0) == []
    assert lender.source.next_deadline() == 61.0


def test_a_clock_that_runs_backwards_does_not_disturb_the_order(lender: Lender) -> None:
    lender.lend("h1", now=10.0)
    assert lender.lend("h2", now=5.0).expires_at == 40.0
    assert lender.source.next_deadline() == 40.0


MISUSE: dict[str, Callable[[Source], object]] = {
    "a handle that is lent": lambda source: source.lend("h", [0], NONCE, 0.0),
    "a nonce of zero": lambda source: source.lend("n", [0], 0, 0.0),
    "a negative nonce": lambda source: source.lend("n", [0], -1, 0.0),
    "a nonce of more than 64 bits": lambda source: source.lend("n", [0], 1 << 64, 0.0),
    "no blocks": lambda source: source.lend("n", [], NONCE, 0.0),
    "a block that nobody holds": lambda source: source.lend("n", [0, 7], NONCE, 0.0),
    "a block twice": lambda source: source.lend("n", [0, 0], NONCE, 0.0),
}


@pytest.mark.parametrize("misuse", MISUSE.values(), ids=MISUSE)
def test_misuse_raises_and_changes_nothing(
    lender: Lender, misuse: Callable[[Source], object]
) -> None:
    lender.lend("h")
    lender.pool.release([7])
    before = repr([vars(lender.source), vars(lender.pool), vars(lender.journal)])
    with pytest.raises(LocalError):
        misuse(lender.source)
    assert repr([vars(lender.source), vars(lender.pool), vars(lender.journal)]) == before


@pytest.mark.parametrize(("num_slots", "lease_s"), [(0, 30.0), (2, 0.0)])
def test_a_source_without_slots_or_time_is_refused(num_slots: int, lease_s: float) -> None:
    with pytest.raises(LocalError):
        Source(BlockPool(1, 1), Journal(), num_slots=num_slots, lease_s=lease_s)


def test_validate_finds_lost_slots_and_a_broken_order(lender: Lender) -> None:
    lender.lend("h1", now=0.0)
    lender.lend("h2", now=1.0)
    lender.source._lent.move_to_end("h1")
    with pytest.raises(LocalError):
        lender.source.validate()
    lender.source._lent.move_to_end("h2")
    lender.source._free_slots.append(0)
    with pytest.raises(LocalError):
        lender.source.validate()
    lender.source._free_slots.clear()
