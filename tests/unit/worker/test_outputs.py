"""What reaches the outlet, and what must not any more."""

import asyncio

from protocol.events import KvCleared, KvRemoved, KvStored
from protocol.ids import JobKey
from protocol.out import Delta
from tests.unit.worker.engine_world import Recorder
from worker.engine.base import DecodingInfo, EngineError, Snapshot
from worker.engine.outputs import OutputDelivery, TurnOutputs

A, B = JobKey("r", 1), JobKey("r", 2)


def outputs_of(*keys: JobKey, serial: int = 1) -> TurnOutputs:
    outputs = TurnOutputs()
    for key in keys:
        outputs.note(key, serial, lambda outlet, key=key: outlet.decoding(key, DecodingInfo()))  # type: ignore[misc]
        outputs.delta(key, serial, Delta(key.attempt, 0, [97], "a"))
    return outputs


async def test_nothing_is_heard_of_a_cancelled_attempt_though_it_was_on_the_way() -> None:
    recorder = Recorder()
    delivery = OutputDelivery(recorder)
    assert delivery.open(A, 1)
    assert delivery.open(B, 1)
    on_the_way = outputs_of(A, B)
    delivery.forget(A)
    delivery.deliver(on_the_way)
    assert A not in recorder.attempts
    assert recorder.of(B).ids == [97]


async def test_outputs_of_an_earlier_life_of_a_key_are_dropped() -> None:
    recorder = Recorder()
    delivery = OutputDelivery(recorder)
    delivery.open(A, 1)
    late = outputs_of(A)
    delivery.forget(A)
    assert delivery.open(A, 2)
    delivery.deliver(late)
    assert A not in recorder.attempts
    delivery.deliver(outputs_of(A, serial=2))
    assert recorder.of(A).ids == [97]


async def test_ended_attempt_may_begin_again_and_an_open_one_may_not() -> None:
    recorder = Recorder()
    delivery = OutputDelivery(recorder)
    assert delivery.open(A, 1)
    assert not delivery.open(A, 2)
    outputs = TurnOutputs()
    error = EngineError("decode", "engine", "x")
    outputs.note(A, 1, lambda outlet: outlet.failed(A, error), ends=True)
    delivery.deliver(outputs)
    assert recorder.of(A).failed == error
    assert delivery.open(A, 3)


async def test_accepted_is_not_said_where_something_else_is() -> None:
    recorder = Recorder()
    delivery = OutputDelivery(recorder)
    delivery.open(A, 1)
    delivery.open(B, 1)
    outputs = TurnOutputs(taken={A: 1, B: 1})
    outputs.note(B, 1, lambda outlet: outlet.decoding(B, DecodingInfo()))
    delivery.deliver(outputs)
    assert (recorder.of(A).accepted, recorder.of(B).accepted) == (1, 0)


async def test_snapshot_is_what_the_events_said() -> None:
    recorder = Recorder()
    delivery = OutputDelivery(recorder)
    one, two = b"1" * 16, b"2" * 16
    delivery.deliver(TurnOutputs(first_event=1, events=[KvStored(one + two), KvRemoved(one)]))
    assert delivery.snapshot() == Snapshot(2, [two])
    delivery.deliver(TurnOutputs(first_event=3, events=[KvCleared(), KvStored(one)]))
    assert delivery.snapshot() == Snapshot(4, [one])
    assert recorder.cached == {one}


async def test_after_close_only_those_who_wait_for_the_drain_are_told() -> None:
    recorder = Recorder()
    delivery = OutputDelivery(recorder)
    delivery.open(A, 1)
    delivery.close()
    drained = asyncio.Event()
    outputs = outputs_of(A)
    outputs.drained, outputs.unhealthy = [drained], "late"
    delivery.deliver(outputs)
    assert drained.is_set()
    assert not recorder.attempts
    assert not recorder.reasons


def test_empty_outputs_are_not_worth_a_call() -> None:
    assert not TurnOutputs()
    assert TurnOutputs(unhealthy="x")
