"""The prefix index by itself: matches, gaps, snapshots, sweeps and bounds."""

import random
import tracemalloc

import pytest

from protocol.blocks import block_hashes, pack_ids, seed_of
from protocol.errors import LocalError
from protocol.events import KvCleared, KvEvent, KvRemoved, KvStored
from router.scheduling.prefix_index import PrefixIndex, PromptHashes, deepest, depth_of
from tests.unit.router.scheduling.bench import hashes_of


def stored(text: str) -> KvStored:
    return KvStored(b"".join(hashes_of(text)))


def test_the_longest_match_of_every_holder_is_found() -> None:
    index = PrefixIndex(1000)
    slots = [index.join() for _ in range(4)]
    prompt = "abcdefghijklmnop"
    for slot, depth in zip(slots, (16, 5, 5, 0), strict=True):
        index.change(slot, 1, [stored(prompt[:depth])])
    match = index.match(hashes_of(prompt))
    assert [depth_of(match, slot) for slot in slots] == [16, 5, 5, 0]
    assert deepest(match, 4, 2) == [0, 2, 1]
    assert deepest(match, 1, 0) == [0]
    assert index.match(hashes_of("zzz")) == []
    assert index.match([]) == []
    index.validate()


@pytest.mark.parametrize("seed", range(20))
def test_jumping_finds_what_walking_finds(seed: int) -> None:
    rng = random.Random(seed)
    index = PrefixIndex(100_000)
    prompt = [n.to_bytes(16, "big") for n in range(rng.randrange(1, 200))]
    depths = [rng.randrange(len(prompt) + 1) for _ in range(12)]
    for depth in depths:
        index.change(index.join(), 1, [KvStored(b"".join(prompt[:depth]))])
    match = index.match(prompt)
    assert [depth_of(match, slot) for slot in range(12)] == depths
    order = [depths[slot] for slot in deepest(match, 12, 3)]
    assert order == sorted((depth for depth in depths if depth), reverse=True)


def test_events_remove_and_clear() -> None:
    index = PrefixIndex(1000)
    slot = index.join()
    events: list[KvEvent] = [stored("abc"), stored("a"), KvRemoved(b"".join(hashes_of("cz")))]
    assert not index.change(slot, 1, events)
    assert depth_of(index.match(hashes_of("abc")), slot) == 2
    assert not index.change(slot, 3, [KvRemoved(b"".join(hashes_of("c"))), KvCleared()])
    assert index.match(hashes_of("abc")) == []
    assert not index.heard_last(slot, 4)
    index.validate()


def test_a_gap_asks_once_and_what_follows_is_kept_for_the_snapshot() -> None:
    index = PrefixIndex(1000)
    slot = index.join()
    assert index.change(slot, 3, [stored("c")])
    assert not index.change(slot, 4, [stored("d")])
    assert not index.heard_last(slot, 9)
    assert index.is_waiting(slot)
    assert index.match(hashes_of("c")) == []
    slot, again = index.replace(slot, 3, hashes_of("abc"))
    assert not again
    assert depth_of(index.match(hashes_of("abcd")), slot) == 4
    assert not index.is_waiting(slot)
    assert index.heard_last(slot, 9)


def test_a_snapshot_that_is_too_old_is_asked_for_again_or_ignored() -> None:
    index = PrefixIndex(1000)
    slot = index.join()
    assert index.change(slot, 3, [stored("c")])
    slot, again = index.replace(slot, 1, hashes_of("a"))
    assert again
    slot, again = index.replace(slot, 2, hashes_of("ab"))
    assert not again
    assert depth_of(index.match(hashes_of("abc")), slot) == 3
    slot, again = index.replace(slot, 1, [])
    assert not again
    assert depth_of(index.match(hashes_of("abc")), slot) == 3


def test_what_is_held_back_is_bounded() -> None:
    index = PrefixIndex(1000)
    slot = index.join()
    index.change(slot, 2, [stored("b")])
    for n in range(3, 200):
        index.change(slot, n, [KvStored(n.to_bytes(16, "big"))])
    slot, again = index.replace(slot, 1, hashes_of("a"))
    assert not again
    assert index.heard_last(slot, 199)


def test_a_slot_is_swept_in_steps_and_then_reused() -> None:
    index = PrefixIndex(100_000)
    slot = index.join()
    prompt = [n.to_bytes(16, "big") for n in range(1200)]
    index.change(slot, 1, [KvStored(b"".join(prompt))])
    index.leave(slot)
    assert index.match(prompt) == []
    assert 0 < index.num_pairs <= 1200 - 1024
    index.validate()
    assert index.join() == 1
    index.sweep()
    assert index.num_pairs == 0
    assert index.join() == 0
    index.validate()


def test_the_index_is_bounded_and_forgets_the_oldest() -> None:
    index = PrefixIndex(256)
    gone = index.join()
    index.change(gone, 1, [KvStored(b"".join(n.to_bytes(16, "big") for n in range(600)))])
    index.validate()
    slot = index.join()
    index.leave(gone)
    for n in range(300):
        index.change(slot, n + 1, [KvStored((1000 + n).to_bytes(16, "big"))])
    index.validate()
    assert index.num_pairs <= 256
    assert index.match([(1000).to_bytes(16, "big")]) == []
    assert index.match([(1299).to_bytes(16, "big")]) != []


def test_the_oldest_go_also_while_a_slot_is_being_swept() -> None:
    index = PrefixIndex(1000)
    gone, slot = index.join(), index.join()
    index.change(gone, 1, [KvStored(b"".join(n.to_bytes(16, "big") for n in range(990)))])
    index.leave(gone)
    holder = index._holders[slot]
    for n in range(600):
        index._add_pair(5000 + n, holder)
    index.validate()


class _Reluctant(PrefixIndex):
    """Sweeps one shard at a time."""

    def sweep(self, limit: int = 1) -> None:
        super().sweep(limit)


@pytest.mark.parametrize("seed", range(10))
def test_what_a_slot_let_go_of_is_never_found_however_late_it_is_swept(seed: int) -> None:
    rng = random.Random(seed)
    index = _Reluctant(65_536)
    blocks = [rng.randbytes(16) for _ in range(60)]
    truth: dict[int, set[bytes]] = {index.join(): set() for _ in range(3)}
    said = dict.fromkeys(truth, 0)
    for _ in range(300):
        slot = rng.choice(list(truth))
        some = rng.sample(blocks, rng.randrange(1, 12))
        match rng.randrange(8):
            case 0:
                index.leave(slot)
                del truth[slot], said[slot]
                fresh = index.join()
                assert fresh not in truth
                truth[fresh], said[fresh] = set(), 0
            case 1:
                said[slot] += 1
                assert not index.change(slot, said[slot], [KvCleared()])
                truth[slot] = set()
            case 2:
                fresh, again = index.replace(slot, said[slot], some)
                assert not again
                assert fresh == slot or fresh not in truth
                del truth[slot]
                truth[fresh], said[fresh] = set(some), said.pop(slot)
            case 3 | 4:
                said[slot] += 1
                assert not index.change(slot, said[slot], [KvRemoved(b"".join(some))])
                truth[slot] -= set(some)
            case _:
                said[slot] += 1
                assert not index.change(slot, said[slot], [KvStored(b"".join(some))])
                truth[slot] |= set(some)
        index.validate()
        for block in blocks:
            found = deepest(index.match([block]), 10, 0)
            assert set(found) == {slot for slot, held in truth.items() if block in held}
    assert index.num_slots < 40


def test_a_snapshot_is_not_looked_for_among_what_others_hold(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    index = PrefixIndex(100_000)
    other, slot = index.join(), index.join()
    index.change(other, 1, [stored("xyz")])
    index.change(slot, 1, [stored("abc")])
    monkeypatch.setattr(PrefixIndex, "_wash", pytest.fail)
    slot, _ = index.replace(slot, 1, hashes_of("ab"))
    assert depth_of(index.match(hashes_of("abc")), slot) == 2
    assert depth_of(index.match(hashes_of("xyz")), other) == 3
    index.validate()


def test_snapshots_without_end_take_no_slots_without_end() -> None:
    index = PrefixIndex(100_000)
    slot = index.join()
    for _ in range(500):
        slot, again = index.replace(slot, 1, hashes_of("abc"))
        assert not again
    index.validate()
    assert index.num_slots < 40
    assert index.num_pairs < 40 * 3


def test_what_nobody_holds_any_more_goes_before_what_somebody_holds() -> None:
    rng = random.Random(1)
    index = _Reluctant(32_768)
    honest, other = index.join(), index.join()
    held = [rng.randbytes(16) for _ in range(8000)]
    index.change(honest, 1, [KvStored(b"".join(held))])
    for number in range(3):
        hashes = rng.randbytes(16 * 20_000)
        index.change(other, 2 * number + 1, [KvStored(hashes)])
        index.change(other, 2 * number + 2, [KvCleared()])
        index.validate()
    assert all(index.match([block]) for block in held)


def test_an_index_of_several_dicts_is_bounded_too() -> None:
    rng = random.Random(1)
    index = PrefixIndex(16_384)
    slots = [index.join(), index.join()]
    for number in range(100):
        hashes = rng.randbytes(16 * 250)
        for slot in slots:
            index.change(slot, number + 1, [KvStored(hashes)])
        index.validate()
    assert 16_000 < index.num_pairs <= 16_384
    assert index.match([hashes[-16:]])


def test_a_block_of_two_workers_is_remembered_in_few_bytes() -> None:
    """Of what was stored, removed and stored again; a router has a million of them."""
    rng = random.Random(1)
    index = PrefixIndex(2_000_000)
    slots = [index.join(), index.join()]
    events: list[KvEvent] = [KvStored(rng.randbytes(16 * 1000)) for _ in range(50)]
    gone = [KvRemoved(event.hashes) for event in events if isinstance(event, KvStored)]
    tracemalloc.start()
    for number, event in enumerate(events):
        for slot in slots:
            for first, one in ((2 * number + 1, event), (2 * number + 2, gone[number - 25])):
                index.change(slot, first, [one])
    num_bytes, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert index.num_pairs == 2 * 25_000
    assert num_bytes / index.num_pairs < 70
    assert max(map(len, index._shards)) < 200


def test_an_index_that_lost_a_bit_does_not_validate() -> None:
    index = PrefixIndex(1000)
    index.change(index.join(), 1, [stored("a")])
    index._shards[0].clear()
    with pytest.raises(LocalError):
        index.validate()


def test_hashes_are_computed_as_far_as_asked_and_equal_the_protocols() -> None:
    packed = pack_ids(range(16 * 200 + 5))
    seed = seed_of("d", "salt")
    hashes = PromptHashes(packed, 16, seed)
    assert len(hashes) == 200
    expected = block_hashes(packed, 16, seed)
    assert hashes[0] == expected[0]
    assert len(hashes._known) == 64
    assert hashes[150] == expected[150]
    assert [hashes[n] for n in range(200)] == expected


def test_a_worker_holds_no_more_than_it_can() -> None:
    """A liar cannot push out what others hold."""
    index = PrefixIndex(100)
    honest, liar = index.join(10), index.join(10)
    index.change(honest, 1, [stored("abc")])
    blocks = [n.to_bytes(16, "big") for n in range(5000)]
    index.change(liar, 1, [KvStored(b"".join(blocks))])
    liar, _ = index.replace(liar, 5, blocks)
    index.sweep()
    assert index.num_pairs == 13
    assert depth_of(index.match(hashes_of("abc")), honest) == 3
    index.validate()


def test_a_number_that_runs_ahead_of_the_reports_is_not_believed_for_ever() -> None:
    index = PrefixIndex(1000)
    slot = index.join()
    index.change(slot, 1, [stored("a")] * 50)
    asked = [index.heard_last(slot, 3) for _ in range(4)]
    assert asked == [False, False, False, True]
    slot, again = index.replace(slot, 3, hashes_of("xyz"))
    assert not again
    assert depth_of(index.match(hashes_of("xyz")), slot) == 3
    index.change(slot, 4, [stored("w")])
    assert index.match(hashes_of("w")) != []


def test_a_report_that_a_snapshot_overtook_asks_for_nothing() -> None:
    index = PrefixIndex(1000)
    slot = index.join()
    index.change(slot, 3, [stored("c")])
    slot, _ = index.replace(slot, 9, hashes_of("abc"))
    assert not any(index.heard_last(slot, last) for last in (4, 6, 9, 4, 9))


def test_nonsense_that_was_held_back_does_not_ask_for_ever() -> None:
    index = PrefixIndex(1000)
    slot = index.join()
    assert index.change(slot, 10**9, [stored("z")])
    for wanted in (True, True, False, False):
        slot, again = index.replace(slot, 2, hashes_of("ab"))
        assert again is wanted
    assert not index.is_waiting(slot)
    assert depth_of(index.match(hashes_of("ab")), slot) == 2
    assert index.match(hashes_of("z")) == []


def test_what_a_leaver_left_goes_before_anything_that_counts() -> None:
    """A full index, of which one shard in four was looked through when its only holder left."""
    size = 4 * 4096
    index = PrefixIndex(size)
    first, second = index.join(), index.join()
    old = [number.to_bytes(16, "big") for number in range(size)]
    index.change(first, 1, [KvStored(b"".join(old))])
    index.leave(first)
    assert index.num_pairs > size // 2
    new = [(size + number).to_bytes(16, "big") for number in range(size)]
    index.change(second, 1, [KvStored(b"".join(new))])
    index.validate()
    assert index.num_pairs == size
    for one in new[::300]:
        assert depth_of(index.match([one]), second) == 1
