"""The faults that the hub in memory can have on purpose."""

import asyncio
from collections.abc import AsyncIterator

import pytest

from protocol.bus import BusEvent, Message
from protocol.errors import LocalError
from protocol.memory_bus import MemoryBus, MemoryHub, matches


class Line:
    """A bus that hears itself."""

    def __init__(self) -> None:
        self.hub = MemoryHub(detect_s=0.02)
        self.bus = MemoryBus(self.hub)
        self.got: list[bytes] = []
        self.kinds: list[str] = []
        self.event = asyncio.Event()

    def hear(self, message: Message) -> None:
        self.got.append(message.payload)

    def note(self, event: BusEvent) -> None:
        self.kinds.append(event.kind)
        self.event.set()

    def send(self, text: str) -> None:
        for letter in text:
            self.bus.publish(f"s.{letter}", letter.encode())

    async def received(self) -> bytes:
        await self.bus.flush(timeout_s=5)
        got, self.got = self.got, []
        return b"".join(got)


@pytest.fixture
async def line() -> AsyncIterator[Line]:
    made = Line()
    made.bus.on_event(made.note)
    await made.bus.start()
    await made.bus.subscribe("s.*", made.hear)
    yield made
    await made.bus.close()


async def test_the_next_messages_can_be_dropped(line: Line) -> None:
    line.hub.drop_next(2)
    line.hub.drop_next(1, "s.c")
    line.send("abcabc")
    assert await line.received() == b"abc"
    assert line.bus.lost == 0


async def test_what_is_on_its_way_when_the_hub_dies_is_lost_and_later_is_kept(line: Line) -> None:
    line.send("a")
    line.hub.down()
    line.send("b")
    line.hub.down()
    line.hub.up()
    line.hub.up()
    line.send("c")
    assert await line.received() == b"bc"
    assert line.kinds == ["up", "down", "up"]


async def test_a_short_freeze_is_a_pause(line: Line) -> None:
    line.hub.freeze()
    line.send("a")
    await asyncio.sleep(0)
    line.hub.up()
    line.send("b")
    assert await line.received() == b"ab"
    assert line.kinds == ["up"]


async def test_a_long_freeze_is_noticed(line: Line) -> None:
    line.event.clear()
    line.hub.freeze()
    line.send("a")
    async with asyncio.timeout(5):
        await line.event.wait()
    assert (line.kinds, line.bus.connected) == (["up", "down"], False)
    line.hub.up()
    line.send("b")
    assert await line.received() == b"b"


async def test_callbacks_that_publish_do_not_starve_the_loop(line: Line) -> None:
    turns = 0

    def forever(message: Message) -> None:
        line.bus.publish("loop", b"")

    await line.bus.subscribe("loop", forever)
    line.bus.publish("loop", b"")
    for _ in range(20):
        await asyncio.sleep(0)
        turns += 1
    assert turns == 20


async def test_a_bus_is_started_once(line: Line) -> None:
    with pytest.raises(LocalError):
        await line.bus.start()


@pytest.mark.parametrize(
    ("pattern", "subject", "expected"),
    [
        ("a", "a", True),
        ("a", "a.b", False),
        ("a.b", "a", False),
        ("*", "a", True),
        ("*", "a.b", False),
        (">", "a.b", True),
        ("a.>", "a", False),
        ("a.*.>", "a.b", False),
        ("a.*.>", "a.b.c.d", True),
        ("*.b", "a.b", True),
        ("*.b", "a.c", False),
    ],
)
def test_wildcards(pattern: str, subject: str, expected: bool) -> None:
    assert matches(pattern, subject) is expected
