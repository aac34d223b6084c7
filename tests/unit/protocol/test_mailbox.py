"""One envelope per destination and turn, on a bus in memory."""

import asyncio
from collections.abc import AsyncIterator

import pytest

from protocol.bus import Message
from protocol.mailbox import Mailer
from protocol.memory_bus import MemoryBus, MemoryHub


class Post:
    """A mailer whose envelopes are readable, and what became of them."""

    def __init__(self, hub: MemoryHub, bus: MemoryBus, *, max_messages: int = 4096) -> None:
        self.hub = hub
        self.bus = bus
        self.arrived: list[tuple[str, str, str]] = []
        self.refused: list[tuple[str, list[str]]] = []
        self.seq = 0
        self.mailer: Mailer[str] = Mailer(
            bus,
            envelope=self._envelope,
            on_overflow=lambda subject, messages: self.refused.append((subject, messages)),
            lazy_s=0.05,
            max_messages=max_messages,
        )

    def _envelope(self, subject: str, messages: list[str]) -> bytes:
        if "bug" in messages:
            raise ValueError("bug")
        self.seq += 1
        return " ".join(messages).encode()

    def hear(self, message: Message) -> None:
        self.arrived.append((message.subject, message.payload.decode(), message.reply))

    async def settle(self) -> list[tuple[str, str, str]]:
        """What arrived of that which has left the mailer by the end of this turn."""
        await asyncio.sleep(0)
        await self.bus.flush(timeout_s=5)
        arrived, self.arrived = self.arrived, []
        return arrived

    async def wait(self) -> list[tuple[str, str, str]]:
        async with asyncio.timeout(5):
            while len(self.mailer):  # noqa: ASYNC110  the timer is what is tested
                await asyncio.sleep(0.005)
        return await self.settle()


@pytest.fixture
async def post() -> AsyncIterator[Post]:
    hub = MemoryHub()
    bus = MemoryBus(hub, pending_bytes=2000)
    await bus.start()
    made = Post(hub, bus, max_messages=5)
    await bus.subscribe("to.*", made.hear)
    yield made
    await bus.close()


async def test_one_turn_makes_one_envelope_for_each_destination(post: Post) -> None:
    for text in "abc":
        post.mailer.post("to.1", text)
        post.mailer.post("to.2", text.upper())
    assert len(post.mailer) == 6
    assert await post.settle() == [("to.1", "a b c", ""), ("to.2", "A B C", "")]
    post.mailer.post("to.1", "d")
    assert await post.settle() == [("to.1", "d", "")]
    assert post.seq == 3


async def test_lazy_messages_ride_along_in_order(post: Post) -> None:
    post.mailer.post("to.1", "lazy", lazy=True)
    assert await post.settle() == []
    post.mailer.post("to.1", "now", reply="gone")
    post.mailer.post("to.1", "more", lazy=True)
    assert await post.settle() == [("to.1", "lazy now more", "gone")]
    assert post.mailer._timer is None


async def test_lazy_messages_leave_by_themselves_in_time(post: Post) -> None:
    before = asyncio.get_running_loop().time()
    post.mailer.post("to.1", "a", lazy=True)
    post.mailer.post("to.2", "b", lazy=True)
    assert await post.wait() == [("to.1", "a", ""), ("to.2", "b", "")]
    assert 0.045 < asyncio.get_running_loop().time() - before < 1.0
    assert post.mailer._timer is None


async def test_an_envelope_for_one_leaves_the_lazy_ones_of_another_alone(post: Post) -> None:
    post.mailer.post("to.1", "lazy", lazy=True)
    post.mailer.post("to.2", "now")
    assert await post.settle() == [("to.2", "now", "")]
    assert await post.wait() == [("to.1", "lazy", "")]


async def test_another_reply_subject_starts_another_envelope(post: Post) -> None:
    post.mailer.post("to.1", "a", reply="x")
    post.mailer.post("to.1", "b")
    post.mailer.post("to.1", "c", reply="y")
    assert await post.settle() == [("to.1", "a b", "x"), ("to.1", "c", "y")]


async def test_flush_now_sends_everything(post: Post) -> None:
    post.mailer.post("to.1", "lazy", lazy=True)
    post.mailer.post("to.2", "now")
    post.mailer.flush_now()
    assert len(post.mailer) == 0
    assert sorted(await post.settle()) == [("to.1", "lazy", ""), ("to.2", "now", "")]
    assert post.seq == 2


async def test_a_full_box_leaves_at_once(post: Post) -> None:
    for number in range(12):
        post.mailer.post("to.1", str(number), lazy=True)
        assert len(post.mailer) < 5
    arrived = await post.wait()
    assert [text for _, text, _ in arrived] == ["0 1 2 3 4", "5 6 7 8 9", "10 11"]


async def test_what_the_bus_refuses_comes_back_with_its_number_used(post: Post) -> None:
    post.mailer.post("to.1", "x" * 1500)
    post.mailer.post("to.2", "y" * 1500)
    post.mailer.post("to.3", "z")
    arrived = await post.settle()
    assert [subject for subject, _, _ in arrived] == ["to.1", "to.3"]
    assert post.refused == [("to.2", ["y" * 1500])]
    assert post.seq == 3


async def test_what_was_refused_may_be_posted_again_lazily(post: Post) -> None:
    refused_twice, refusals = asyncio.Event(), 0

    def again(subject: str, messages: list[str]) -> None:
        nonlocal refusals
        refusals += 1
        if refusals == 2:
            refused_twice.set()
            post.hub.up()
        for message in messages:
            mailer.post(subject, message, lazy=True)

    mailer = Mailer(post.bus, envelope=post._envelope, on_overflow=again, lazy_s=0.01)
    post.hub.down()
    post.bus.publish("other", bytes(2000))
    mailer.post("to.1", "a", lazy=True)
    async with asyncio.timeout(5):
        await refused_twice.wait()
        while len(mailer):  # noqa: ASYNC110  the timer is what is tested
            await asyncio.sleep(0.005)
    assert await post.settle() == [("to.1", "a", "")]


async def test_a_bug_in_one_envelope_does_not_keep_the_others(post: Post) -> None:
    loop, seen = asyncio.get_running_loop(), []
    loop.set_exception_handler(lambda _, context: seen.append(context["exception"]))
    post.mailer.post("to.1", "bug")
    post.mailer.post("to.2", "fine")
    await asyncio.sleep(0)
    assert await post.settle() == [("to.2", "fine", "")]
    assert [str(error) for error in seen] == ["bug"]
    loop.set_exception_handler(None)
