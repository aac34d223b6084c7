"""Pulls: the table of states, what comes late, what is refused before it moves."""

import itertools
from collections.abc import Callable, Iterator

import msgspec
import pytest
from msgspec.structs import replace

from protocol.blocks import pack_ids
from protocol.errors import LocalError
from protocol.out import FailureCode
from tests.unit.worker.pull_world import (
    BROKEN,
    GONE,
    HELD,
    LOST,
    MINE,
    NONCE,
    OK,
    PULL,
    checking,
    ends,
    failed,
    fenced_data,
    fenced_word,
    handle,
    make,
    pulling,
    waiting,
)
from worker.handoff.ends import TransferEnd
from worker.handoff.sink import (
    FreeBlocks,
    PostData,
    Pull,
    PullFailed,
    Ready,
    Sink,
)
from worker.handoff.states import HOLDS, NEXT, PullEvent, PullState


@pytest.fixture
def sink() -> Iterator[Sink]:
    sink = make()
    yield sink
    sink.validate()


def test_data_then_a_right_word_is_ready(sink: Sink) -> None:
    checking(sink)
    assert sink.word_ended(1, HELD, 2.0) == [Ready(1)]
    assert sink.ended == ends(ready=1)
    assert sink.num_live == 0


def test_a_word_that_came_with_the_data_is_judged_at_once(sink: Sink) -> None:
    pulling(sink)
    assert sink.data_ended(1, HELD, 1.0) == [Ready(1)]
    assert sink.ended == ends(ready=1)


@pytest.mark.parametrize(
    ("end", "code", "message"),
    [
        (GONE, "lease_lost", LOST),
        (TransferEnd(ok=True, word=NONCE + 1), "lease_lost", LOST),
        (BROKEN, "transfer_failed", "reset by peer"),
        (TransferEnd(ok=False, word=NONCE), "transfer_failed", "the transport gave no reason"),
        (TransferEnd(ok=False, reason="refused by the source", word=0), "lease_lost", LOST),
    ],
)
@pytest.mark.parametrize("two_sided", [False, True])
def test_anything_but_the_nonce_fails_and_frees_at_once(
    sink: Sink, end: TransferEnd, code: FailureCode, message: str, two_sided: bool
) -> None:
    if two_sided:
        pulling(sink)
        assert sink.data_ended(1, end, 1.0) == failed(code, message)
    else:
        checking(sink)
        assert sink.word_ended(1, end, 2.0) == failed(code, message)
    assert sink.ended == ends(**{code: 1})
    assert sink.num_live == 0


def test_a_word_read_without_a_word_proves_nothing(sink: Sink) -> None:
    checking(sink)
    expected = failed("transfer_failed", "the transport gave no reason")
    assert sink.word_ended(1, OK, 2.0) == expected


MISMATCHES = {
    "another prompt or model": replace(PULL, expected_hash=b"x" * 16),
    "another block size": replace(PULL, handle=handle(block_size=32, blocks=pack_ids((7,)))),
    "no block size": replace(PULL, handle=handle(block_size=0)),
    "no tokens": replace(PULL, num_tokens=0),
    "more tokens than are lent": replace(PULL, num_tokens=33),
    "no rank": replace(PULL, handle=handle(num_ranks=0)),
    "two ranks": replace(PULL, handle=handle(num_ranks=2)),
    "a nonce that an empty word equals": replace(PULL, handle=handle(nonce=0)),
    "a nonce of more than 64 bits": replace(PULL, handle=handle(nonce=1 << 64)),
    "too few blocks lent": replace(PULL, handle=handle(blocks=pack_ids((7,)))),
    "too many blocks lent": replace(PULL, handle=handle(blocks=pack_ids((7, 8, 9)))),
    "damaged block numbers": replace(PULL, handle=handle(blocks=b"1234567")),
    "fewer blocks of ours": replace(PULL, local_blocks=(1,)),
    "nothing to pull": replace(PULL, local_blocks=(), remote_blocks=()),
    "blocks that are not lent": replace(PULL, remote_blocks=(7, 9)),
}


@pytest.mark.parametrize("pull", MISMATCHES.values(), ids=MISMATCHES)
def test_a_handle_that_does_not_fit_fails_before_anything_is_posted(sink: Sink, pull: Pull) -> None:
    commands = sink.begin(1, pull, 0.0)
    match commands:
        case [PullFailed(1, "handle_mismatch", message), FreeBlocks(1, blocks)]:
            assert message
            assert blocks == pull.local_blocks
        case _:
            pytest.fail(str(commands))
    assert sink.ended == ends(handle_mismatch=1)
    assert sink.num_live == sink.num_waiting == 0
    assert sink.next_deadline() is None


def test_a_part_of_what_is_lent_can_be_pulled(sink: Sink) -> None:
    pull = replace(PULL, local_blocks=(1,), remote_blocks=(8,), num_tokens=16)
    assert sink.begin(1, pull, 0.0) == [PostData(1, pull)]


def test_an_unfilled_last_block_counts() -> None:
    sink = make(block_size=None)
    pull = replace(PULL, handle=handle(num_tokens=17), num_tokens=17)
    assert sink.begin(1, pull, 0.0) == [PostData(1, pull)]
    pull = replace(PULL, handle=handle(num_tokens=33), num_tokens=33)
    assert len(sink.begin(2, pull, 0.0)) == 2


def test_an_opaque_handle_is_not_pulled(sink: Sink) -> None:
    opaque = msgspec.structs.replace(handle(num_ranks=0), opaque=msgspec.Raw(b"\x01"))
    expected = [PullFailed(1, "handle_mismatch", "KV of 0 ranks, not of one"), FreeBlocks(1, MINE)]
    assert sink.begin(1, replace(PULL, handle=opaque), 0.0) == expected


def test_given_up_before_anything_was_posted_frees_at_once() -> None:
    sink = make(num_scratch=1)
    pulling(sink)
    assert sink.begin(2, PULL, 0.0) == []
    assert sink.abandon(2, 1.0) == [FreeBlocks(2, MINE)]
    assert sink.ended == ends(abandoned=1)
    assert sink.num_waiting == 0
    sink.validate()


@pytest.mark.parametrize("end", [OK, HELD, GONE, BROKEN])
def test_given_up_during_the_copy_is_quarantined_until_the_copy_ends(
    sink: Sink, end: TransferEnd
) -> None:
    fenced_data(sink)
    assert (sink.num_quarantined, sink.num_live) == (2, 1)
    assert sink.abandon(1, 3.0) == []
    assert sink.data_ended(1, end, 4.0) == [FreeBlocks(1, MINE)]
    assert (sink.num_quarantined, sink.num_live) == (0, 0)
    assert sink.ended == ends(abandoned=1)


@pytest.mark.parametrize("end", [HELD, GONE, BROKEN, OK])
def test_given_up_during_the_check_is_quarantined_until_the_word_is_read(
    sink: Sink, end: TransferEnd
) -> None:
    fenced_word(sink)
    assert sink.num_quarantined == 2
    assert sink.abandon(1, 3.0) == []
    assert sink.data_ended(1, OK, 3.0) == []
    assert sink.word_ended(1, end, 4.0) == [FreeBlocks(1, MINE)]
    assert sink.num_quarantined == 0
    assert sink.ended == ends(abandoned=1)


def test_the_copys_end_once_more_changes_nothing(sink: Sink) -> None:
    checking(sink)
    assert [sink.data_ended(1, end, 2.0) for end in (OK, HELD, GONE, BROKEN)] == [[]] * 4
    assert sink.word_ended(1, HELD, 2.0) == [Ready(1)]


def test_whatever_comes_for_a_forgotten_pull_changes_nothing(sink: Sink) -> None:
    checking(sink)
    sink.word_ended(1, HELD, 2.0)
    before = repr(vars(sink))
    for end in (OK, HELD, GONE, BROKEN):
        assert sink.data_ended(1, end, 3.0) == sink.word_ended(1, end, 3.0) == []
    assert sink.abandon(1, 3.0) == []
    assert repr(vars(sink)) == before


ILLEGAL: dict[str, tuple[Callable[[Sink], None], Callable[[Sink], object]]] = {
    "an id in use": (pulling, lambda sink: sink.begin(1, PULL, 9.0)),
    "an id in use while fenced": (fenced_data, lambda sink: sink.begin(1, PULL, 9.0)),
    "data of what waits": (waiting, lambda sink: sink.data_ended(1, OK, 9.0)),
    "a word of what waits": (waiting, lambda sink: sink.word_ended(1, HELD, 9.0)),
    "a word that was not asked for": (pulling, lambda sink: sink.word_ended(1, HELD, 9.0)),
    "a word while the copy is fenced": (fenced_data, lambda sink: sink.word_ended(1, GONE, 9.0)),
}


@pytest.mark.parametrize(("reach", "move"), ILLEGAL.values(), ids=ILLEGAL)
def test_an_illegal_move_raises_and_changes_nothing(
    sink: Sink, reach: Callable[[Sink], None], move: Callable[[Sink], object]
) -> None:
    reach(sink)
    before = repr(vars(sink))
    with pytest.raises(LocalError):
        move(sink)
    assert repr(vars(sink)) == before


@pytest.mark.parametrize(("num_scratch", "timeout_s"), [(0, 60.0), (1, 0.0)])
def test_a_sink_without_slots_or_time_is_refused(num_scratch: int, timeout_s: float) -> None:
    with pytest.raises(LocalError):
        Sink(
            num_scratch=num_scratch,
            max_tokens_in_flight=None,
            timeout_s=timeout_s,
            max_quarantined_blocks=0,
        )


DAMAGE: dict[str, Callable[[Sink], object]] = {
    "the queue": lambda sink: sink._waiting.clear(),
    "tokens": lambda sink: setattr(sink, "_tokens_in_flight", 1),
    "slots": lambda sink: sink._free_slots.append(9),
    "quarantine": lambda sink: setattr(sink, "num_quarantined", 1),
    "deadlines": lambda sink: sink._running.move_to_end(11),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_validate_finds_what_is_broken(damage: Callable[[Sink], object]) -> None:
    sink = make()
    waiting(sink)
    sink.progressed(11, 1, 1.0)
    sink.progressed(12, 1, 2.0)
    sink.validate()
    damage(sink)
    with pytest.raises(LocalError):
        sink.validate()


def test_the_table_leads_everywhere_and_every_path_ends() -> None:
    ended = {state for state in PullState if not HOLDS[state]}
    assert ended == {PullState.READY, PullState.FAILED, PullState.FREED}
    assert not [state for state, _ in NEXT if state in ended]
    assert set(NEXT.values()) == set(PullState) - {PullState.WAITING}
    rank = {state: place for place, state in enumerate(PullState)}
    for (before, event), after in NEXT.items():
        assert after is before or rank[after] > rank[before], (before, event)


def test_no_event_after_giving_up_makes_a_pull_ready() -> None:
    fenced = (PullState.FENCED_DATA, PullState.FENCED_WORD)
    for state, event in itertools.product(fenced, PullEvent):
        assert NEXT.get((state, event), PullState.FREED) in (PullState.FREED, state)
