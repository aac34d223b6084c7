"""Who gets blocks, who gives them back, and in which order."""

import pytest

from protocol.sampling import Sampling
from tests.unit.worker.engine_world import new_key, prompt_of
from text.assets import byte_assets
from text.tokenizer import Tokenizer
from worker.engine.base import DecodeJob
from worker.engine.roster import Roster
from worker.engine.sequences import ActiveSequence, ModelLimits, Stage, build_sequence
from worker.kv.pool import BlockPool

LIMITS = ModelLimits("model", 4, 262, 1000, frozenset())
TOKENIZER = Tokenizer.from_assets(byte_assets())


class Floor:
    """A roster over a small pool."""

    def __init__(self, num_blocks: int) -> None:
        self.pool = BlockPool(num_blocks, 4)
        self.roster = Roster(self.pool, num_blocks=num_blocks, block_size=4)
        self.serial = 0

    def sequence(self, num_tokens: int) -> ActiveSequence:
        self.serial += 1
        job = DecodeJob(new_key(), "c/0", prompt_of(num_tokens, self.serial), Sampling(99))
        return build_sequence(job, LIMITS, TOKENIZER, serial=self.serial, now=0.0)

    def enter(self, num_tokens: int) -> ActiveSequence:
        sequence = self.sequence(num_tokens)
        assert self.roster.place(sequence, alone=True)
        self.roster.run(sequence)
        return sequence

    def step(self) -> list[tuple[int, int]]:
        planned = self.roster.plan(max_step_tokens=100)
        for sequence, count in planned:
            sequence.num_computed += count
            self.roster.store_full_blocks(sequence)
            sequence.take(97)
        self.pool.validate()
        return [(sequence.serial, count) for sequence, count in planned]


def test_youngest_gives_way_and_waits_in_front_in_order_of_age() -> None:
    floor = Floor(3)
    oldest, middle, youngest = floor.enter(4), floor.enter(4), floor.enter(4)
    last = floor.sequence(4)
    floor.roster.waiting.append(last)
    assert floor.step() == [(1, 4), (2, 4), (3, 4)]
    assert floor.step() == [(1, 1)]
    assert list(floor.roster.waiting) == [middle, youngest, last]
    assert floor.roster.num_preempted == 2
    assert (middle.stage, middle.num_computed, middle.blocks) == (Stage.WAITING, 0, [])
    assert oldest.num_computed == 5


def test_last_one_running_is_put_back_when_others_hold_the_blocks() -> None:
    floor = Floor(2)
    held = floor.pool.allocate(1)
    assert held is not None
    only = floor.enter(4)
    assert floor.step() == [(1, 4)]
    assert floor.step() == []
    assert floor.roster.running == []
    assert not floor.roster.place(only, alone=True)
    floor.pool.release(held)
    assert floor.roster.place(only, alone=True)
    assert only.num_computed == 4


def test_newcomer_leaves_room_for_those_that_grow() -> None:
    floor = Floor(4)
    floor.enter(8)
    newcomer = floor.sequence(8)
    assert not floor.roster.place(newcomer, alone=False)
    assert floor.roster.place(floor.sequence(4), alone=False)
    floor.pool.validate()


def test_refused_sequence_leaves_the_pool_as_it_was() -> None:
    floor = Floor(4)
    first = floor.enter(12)
    floor.step()
    before = floor.pool.counts()
    twin = build_sequence(
        DecodeJob(new_key(), "c/0", list(first.ids) + [1] * 20, Sampling(99)),
        LIMITS,
        TOKENIZER,
        serial=9,
        now=0.0,
    )
    assert not floor.roster.place(twin, alone=True)
    assert floor.pool.counts() == before


def test_blocks_of_a_new_stay_are_a_new_table() -> None:
    floor = Floor(4)
    sequence = floor.enter(4)
    table = sequence.blocks
    floor.roster.drop(sequence)
    assert sequence.blocks is not table
    assert floor.pool.num_available == 4


@pytest.mark.parametrize("num_common", [0, 3, 4, 7, 12, 23, 24])
def test_follower_waits_for_the_blocks_it_shares_and_no_longer(num_common: int) -> None:
    """Block by block: it goes as soon as all that is common and full is stored."""
    floor = Floor(40)
    leader = floor.enter(24)
    ids = list(leader.ids[:num_common]) + [251] * (24 - num_common)
    job = DecodeJob(new_key(), "c/0", ids, Sampling(99))
    follower = build_sequence(job, LIMITS, TOKENIZER, serial=9, now=0.0)
    shared = min(num_common, 23) // 4
    for stored in range(7):
        assert leader.num_stored == stored or stored == 6
        assert floor.roster.follows(follower) is (stored < shared)
        leader.num_computed = min(4 * (stored + 1), 24)
        floor.roster.store_full_blocks(leader)
    assert floor.roster.place(follower, alone=True)
    assert follower.num_computed == 4 * shared


def test_follower_of_one_that_is_put_back_goes_itself() -> None:
    floor = Floor(40)
    leader = floor.enter(24)
    job = DecodeJob(new_key(), "c/0", list(leader.ids), Sampling(99))
    follower = build_sequence(job, LIMITS, TOKENIZER, serial=9, now=0.0)
    assert floor.roster.follows(follower)
    floor.roster.drop(leader)
    assert not floor.roster.follows(follower)
