"""Pulls that wait, for room or for a sign of life: order, scratch slots, deadlines, quarantine."""

from collections.abc import Callable, Iterator

import pytest
from msgspec.structs import replace

from tests.unit.worker.pull_world import (
    BROKEN,
    GONE,
    HELD,
    LOST,
    MINE,
    OK,
    PULL,
    checking,
    ends,
    make,
    pulling,
)
from worker.handoff.sink import (
    FreeBlocks,
    PostData,
    PostWord,
    PullFailed,
    Quarantine,
    Ready,
    Sink,
)


@pytest.fixture
def sink() -> Iterator[Sink]:
    sink = make()
    yield sink
    sink.validate()


@pytest.mark.parametrize("reach", [pulling, checking])
def test_silence_is_given_up_told_and_fenced(sink: Sink, reach: Callable[[Sink], None]) -> None:
    reach(sink)
    deadline = sink.next_deadline()
    assert deadline is not None
    assert sink.tick(deadline - 0.1) == []
    message = f"no progress for 60.0 s while {reach.__name__}"
    expected = [PullFailed(1, "transfer_failed", message), Quarantine(1, MINE)]
    assert sink.tick(deadline) == expected
    assert sink.tick(1e6) == []
    assert sink.next_deadline() is None
    assert sink.ended == ends(transfer_failed=1)
    assert sink.abandon(1, 1e6) == []
    over = sink.data_ended if reach is pulling else sink.word_ended
    assert over(1, HELD, 1e6) == [FreeBlocks(1, MINE)]
    assert sink.ended == ends(transfer_failed=1)


def test_every_byte_restarts_the_deadline(sink: Sink) -> None:
    pulling(sink)
    sink.begin(2, PULL, 10.0)
    sink.progressed(1, 100, 50.0)
    assert sink.next_deadline() == 70.0
    sink.progressed(2, 1, 55.0)
    assert sink.next_deadline() == 110.0
    sink.progressed(1, 100, 60.0)
    assert sink.next_deadline() == 110.0


def test_the_check_has_a_deadline_of_its_own(sink: Sink) -> None:
    pulling(sink)
    sink.data_ended(1, OK, 50.0)
    assert sink.next_deadline() == 110.0


def test_progress_of_others_than_running_copies_is_ignored(sink: Sink) -> None:
    checking(sink)
    sink.progressed(1, 100, 30.0)
    sink.progressed(9, 100, 30.0)
    assert sink.next_deadline() == 61.0


def test_a_clock_that_runs_backwards_does_not_shorten_a_deadline(sink: Sink) -> None:
    sink.begin(1, PULL, 10.0)
    sink.begin(2, PULL, 5.0)
    assert sink.next_deadline() == 70.0
    assert sink.tick(69.0) == []


def test_pulls_wait_in_order_for_the_tokens_in_flight() -> None:
    sink = make(max_tokens_in_flight=64)
    small = replace(PULL, local_blocks=(5,), remote_blocks=(7,), num_tokens=16)
    assert sink.begin(1, small, 0.0) == [PostData(1, small)]
    assert sink.begin(2, PULL, 0.0) == [PostData(2, PULL)]
    assert sink.begin(3, PULL, 0.0) == []
    assert sink.begin(4, small, 0.0) == []
    assert sink.num_waiting == 2
    assert sink.data_ended(1, OK, 1.0) == [PostWord(1, 0), PostData(3, PULL)]
    assert sink.data_ended(2, GONE, 1.0) == [
        PullFailed(2, "lease_lost", LOST),
        FreeBlocks(2, MINE),
        PostData(4, small),
    ]
    sink.validate()


def test_a_pull_larger_than_the_bound_runs_alone() -> None:
    sink = make(max_tokens_in_flight=8)
    pulling(sink)
    assert sink.begin(2, PULL, 0.0) == []
    assert sink.data_ended(1, HELD, 1.0) == [Ready(1), PostData(2, PULL)]


def test_a_fenced_copy_does_not_keep_the_others_waiting() -> None:
    sink = make(num_scratch=1, max_tokens_in_flight=32)
    pulling(sink)
    assert sink.begin(2, PULL, 0.0) == []
    assert sink.abandon(1, 1.0) == [Quarantine(1, MINE), PostData(2, PULL)]


def test_a_scratch_slot_comes_back_only_when_the_read_into_it_is_over() -> None:
    sink = make(num_scratch=1)
    checking(sink)
    assert sink.begin(2, PULL, 1.0) == []
    assert sink.abandon(1, 2.0) == [Quarantine(1, MINE)]
    assert sink.data_ended(1, OK, 2.0) == []
    assert sink.word_ended(1, GONE, 3.0) == [FreeBlocks(1, MINE), PostData(2, PULL)]
    assert sink.data_ended(2, OK, 4.0) == [PostWord(2, 0)]
    sink.validate()


def test_a_scratch_slot_is_used_again_last() -> None:
    sink = make(num_scratch=3)
    slots = []
    for pull_id in range(4):
        sink.begin(pull_id, PULL, 0.0)
        slots += sink.data_ended(pull_id, OK, 0.0)
        sink.word_ended(pull_id, HELD, 0.0)
    assert slots == [PostWord(pull_id, pull_id % 3) for pull_id in range(4)]


def test_waiting_behind_fenced_slots_alone_is_bounded_too() -> None:
    sink = make(num_scratch=1)
    checking(sink)
    sink.begin(2, PULL, 5.0)
    assert sink.next_deadline() == 61.0
    sink.abandon(1, 20.0)
    sink.begin(3, PULL, 30.0)
    assert sink.next_deadline() == 80.0
    message = "no progress for 60.0 s while waiting"
    assert sink.tick(80.0) == [
        PullFailed(2, "transfer_failed", message),
        FreeBlocks(2, MINE),
    ]
    assert sink.next_deadline() == 90.0
    assert sink.word_ended(1, BROKEN, 85.0) == [FreeBlocks(1, MINE), PostData(3, PULL)]
    sink.validate()


def test_waiting_for_those_that_make_progress_never_times_out() -> None:
    sink = make(max_tokens_in_flight=32)
    pulling(sink)
    sink.begin(2, PULL, 0.0)
    for turn in range(1, 20):
        sink.progressed(1, turn, turn * 50.0)
        assert sink.tick(turn * 50.0) == []
    assert sink.data_ended(1, HELD, 960.0) == [Ready(1), PostData(2, PULL)]
    assert sink.next_deadline() == 1020.0


def test_one_tick_gives_up_all_that_are_due_and_starts_who_waited() -> None:
    sink = make(num_scratch=2)
    for pull_id in (1, 2, 3):
        sink.begin(pull_id, PULL, 0.0)
    message = "no progress for 60.0 s while pulling"
    assert sink.tick(60.0) == [
        PullFailed(1, "transfer_failed", message),
        Quarantine(1, MINE),
        PostData(3, PULL),
        PullFailed(2, "transfer_failed", message),
        Quarantine(2, MINE),
    ]
    assert sink.next_deadline() == 120.0


def test_the_quarantine_says_when_it_is_over_its_bound(sink: Sink) -> None:
    over = []
    for pull_id in (1, 2):
        sink.begin(pull_id, PULL, 3.0)
        sink.abandon(pull_id, 3.0)
        over.append(sink.over_bound)
    sink.data_ended(1, BROKEN, 4.0)
    assert [*over, sink.over_bound] == [False, True, False]
    assert sink.num_quarantined == 2
