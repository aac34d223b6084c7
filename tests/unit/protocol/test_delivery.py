"""What all adapters share: throttled complaints, coalesced losses, joins that time out."""

import asyncio
import logging

import pytest

from protocol.bus import BusEvent, Message
from protocol.delivery import Grumbler, Inlet, Notices, Throttle
from protocol.fragments import PART_HEADER


def test_a_throttle_lets_one_through_and_counts_the_rest() -> None:
    throttle = Throttle(every_s=10.0)
    assert [throttle.due(now) for now in (0.0, 1.0, 9.9, 10.0, 19.0, 50.0)] == [
        0,
        None,
        None,
        2,
        None,
        1,
    ]


def test_a_grumbler_says_each_cause_at_once_and_forgets_when_all_is_well(
    caplog: pytest.LogCaptureFixture,
) -> None:
    grumbler = Grumbler(max_causes=2)
    for now, text in ((0.0, "a"), (1.0, "a"), (2.0, "b"), (3.0, "b"), (11.0, "a")):
        grumbler.complain(text, now)
    assert caplog.messages == ["a", "b", "a (1 more before)"]
    grumbler.complain("c", 12.0)
    grumbler.complain("a", 12.0)
    assert caplog.messages[3:] == ["c", "a"]
    grumbler.reset()
    grumbler.complain("a", 12.5)
    assert caplog.messages[5:] == ["a"]


def test_what_is_refused_for_each_subject_anew_is_one_cause(
    caplog: pytest.LogCaptureFixture,
) -> None:
    grumbler = Grumbler()
    for number in range(1001):
        grumbler.complain(f'nats: permissions violation for publish to "in.{number}"', number / 100)
    assert caplog.messages == [
        'nats: permissions violation for publish to "in.0"',
        'nats: permissions violation for publish to "in.1000" (999 more before)',
    ]


async def test_losses_of_one_turn_are_told_together(caplog: pytest.LogCaptureFixture) -> None:
    notices, told = Notices(), list[BusEvent]()
    notices.on_event(told.append)
    for _ in range(3):
        notices.report_lost("a", 1)
    notices.report_lost("b", 5)
    assert told == []
    await asyncio.sleep(0)
    notices.report_lost("a", 1)
    await asyncio.sleep(0)
    assert told == [BusEvent("lost", "a", 3), BusEvent("lost", "b", 5), BusEvent("lost", "a", 1)]
    assert notices.lost == 9
    assert len([r for r in caplog.records if r.levelno == logging.WARNING]) == 1


async def test_a_join_that_nobody_completes_is_lost_by_itself() -> None:
    notices, lost, got = Notices(), asyncio.Event(), list[Message]()
    notices.on_event(lambda event: lost.set())
    inlet = Inlet("s", got.append, notices, max_bytes=1000, max_age_s=0.05)
    inlet.feed(Message("s", b"x", "", {PART_HEADER: "a 0 2"}))
    async with asyncio.timeout(5):
        await lost.wait()
    assert (got, notices.lost, inlet._timer) == ([], 1, None)


async def test_a_closed_inlet_watches_and_delivers_nothing() -> None:
    notices, got = Notices(), list[Message]()
    inlet = Inlet("s", got.append, notices, max_bytes=1000, max_age_s=0.05)
    inlet.feed(Message("s", b"x", "", {PART_HEADER: "a 0 2"}))
    armed = inlet._timer
    inlet.close()
    assert armed is not None
    assert armed.cancelled()
    inlet.feed(Message("s", b"y"))
    inlet.close()
    assert got == []
