"""What was said is kept until the router has it, and not longer."""

from collections.abc import Callable
from typing import Any

import pytest

from protocol.ids import JobKey
from protocol.out import Accepted, Decoding, Failed, Out, Prefilled, Progress, StepFrame
from tests.unit.worker.service_world import delta_of, handle_of, key_of
from worker.outbox import NEXT, Outbox, Say, Told


class Posted(list[tuple[str, Out]]):
    def post(self, router: str, out: Out) -> None:
        self.append((router, out))

    def take(self) -> list[Out]:
        taken = [out for _, out in self]
        self.clear()
        return taken


@pytest.fixture
def posted() -> Posted:
    return Posted()


@pytest.fixture
def outbox(posted: Posted) -> Outbox:
    return Outbox(posted.post, linger_s=10.0, max_ended=4)


def test_a_step_is_one_frame_for_each_router(outbox: Outbox, posted: Posted) -> None:
    keys = [JobKey("a", 1), JobKey("b", 1), JobKey("a", 2)]
    for key in keys:
        outbox.open(key, "decode")
    outbox.step([(key, delta_of(key.attempt, 0)) for key in [*keys, JobKey("a", 9)]], 0.0)
    assert posted == [
        ("a", StepFrame([delta_of(1, 0), delta_of(2, 0)])),
        ("b", StepFrame([delta_of(1, 0)])),
    ]


def test_a_replay_is_cut_at_a_delta_and_never_inside(outbox: Outbox, posted: Posted) -> None:
    key = key_of(1)
    outbox.open(key, "decode")
    for index in range(5):
        outbox.step([(key, delta_of(1, index))], 0.0)
    posted.take()
    for index in range(7):
        outbox.replay(key, index)
        missing = [delta_of(1, i) for i in range(index, 5)]
        assert posted.take() == [StepFrame(missing) if missing else Accepted(1)]


def test_a_replay_of_a_failure_is_the_failure_alone(outbox: Outbox, posted: Posted) -> None:
    key = key_of(1)
    failed = Failed(1, "decode", "engine", "why")
    outbox.open(key, "decode")
    outbox.decoding(key, Decoding(1))
    outbox.step([(key, delta_of(1, 0))], 0.0)
    outbox.failed(key, failed, 0.0)
    posted.take()
    outbox.replay(key, 0)
    assert posted.take() == [failed]


def test_what_is_said_of_a_forgotten_attempt_is_not_said(outbox: Outbox, posted: Posted) -> None:
    key = key_of(1)
    outbox.open(key, "prefill")
    outbox.forget(key)
    outbox.accept(key)
    outbox.progress(key, Progress(1, "prefill", 1, 2), 0.0)
    outbox.prefilled(key, Prefilled(1, 2, 0, None, handle_of("h")), 0.0)
    outbox.decoding(key, Decoding(1))
    outbox.step([(key, delta_of(1, 0))], 0.0)
    outbox.failed(key, Failed(1, "prefill", "engine", ""), 0.0)
    assert posted == []
    assert len(outbox) == outbox.num_open == 0


def test_only_what_ended_lingers_out_and_the_oldest_first(outbox: Outbox) -> None:
    for attempt in (1, 2, 3):
        outbox.open(key_of(attempt), "decode")
    outbox.step([(key_of(2), delta_of(2, 0, finish=True))], 0.0)
    outbox.step([(key_of(1), delta_of(1, 0, finish=True))], 5.0)
    outbox.sweep(10.0)
    assert [key_of(n) in outbox for n in (1, 2, 3)] == [True, False, True]
    outbox.sweep(1e9)
    assert [key_of(n) in outbox for n in (1, 2, 3)] == [False, False, True]
    assert outbox.open_keys() == [key_of(3)]


def test_ended_records_are_bounded_and_open_ones_stay(outbox: Outbox) -> None:
    outbox.open(key_of(1000), "decode")
    for attempt in range(100):
        outbox.open(key_of(attempt), "decode")
        outbox.step([(key_of(attempt), delta_of(attempt, 0, finish=True))], float(attempt) / 1e3)
    assert len(outbox) == 5
    assert outbox.num_open == 1
    assert key_of(1000) in outbox


def test_a_second_end_does_not_count_twice(outbox: Outbox) -> None:
    key = key_of(1)
    outbox.open(key, "decode")
    outbox.step([(key, delta_of(1, 0, finish=True))], 0.0)
    outbox.failed(key, Failed(1, "decode", "aborted", ""), 1.0)
    assert outbox.num_open == 0
    outbox.forget(key)
    assert len(outbox) == outbox.num_open == 0


# --- the table ---

ATTEMPT = key_of(1)
SAYINGS: dict[Say, Callable[[Outbox], object]] = {
    Say.ACCEPT: lambda outbox: outbox.accept(ATTEMPT),
    Say.LEND: lambda outbox: outbox.accept(ATTEMPT, Accepted(1, handle_of("h"))),
    Say.BEGIN: lambda outbox: outbox.decoding(ATTEMPT, Decoding(1)),
    Say.TOKENS: lambda outbox: outbox.step([(ATTEMPT, delta_of(1, 0))], 0.0),
    Say.END: lambda outbox: outbox.failed(ATTEMPT, Failed(1, "decode", "engine", "why"), 0.0),
}
WAYS = {Told.TAKEN: [], Told.ACCEPTED: [Say.ACCEPT], Told.WORKING: [Say.BEGIN]}


@pytest.mark.parametrize("event", Say)
@pytest.mark.parametrize("state", Told)
def test_what_the_table_has_no_row_for_is_not_said(
    outbox: Outbox, posted: Posted, state: Told, event: Say
) -> None:
    outbox.open(ATTEMPT, "decode")
    for step in WAYS.get(state, [Say.END]):
        SAYINGS[step](outbox)
    assert outbox._records[ATTEMPT].state is state
    posted.take()
    SAYINGS[event](outbox)
    assert len(posted.take()) == ((state, event) in NEXT)
    assert outbox._records[ATTEMPT].state is NEXT.get((state, event), state)


@pytest.mark.parametrize("say", [Outbox.failed, Outbox.prefilled, None])
def test_an_attempt_ends_once(
    outbox: Outbox, posted: Posted, say: Callable[[Outbox, JobKey, Any, float], object] | None
) -> None:
    """However it ended, nothing is added to what a replay says, and the bound counts it once."""
    outbox.open(ATTEMPT, "decode")
    if say is None:
        outbox.step([(ATTEMPT, delta_of(1, 0, finish=True))], 0.0)
    else:
        is_failure = say is Outbox.failed
        say(outbox, ATTEMPT, Failed(1, "decode", "engine", "") if is_failure else prefilled(), 0.0)
    first = posted.take()
    assert outbox.prefilled(ATTEMPT, prefilled(), 1.0) is False
    for late in SAYINGS.values():
        late(outbox)
    outbox.progress(ATTEMPT, Progress(1, "decode", 1, 2), 5.0)
    assert posted.take() == []
    outbox.replay(ATTEMPT, 0)
    assert posted.take() == first
    assert outbox.num_open == 0


def prefilled() -> Prefilled:
    return Prefilled(1, 3, 0, None, handle_of("h"))
