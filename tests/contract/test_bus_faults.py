"""How every bus loses, breaks and recovers: one suite for a real nats-server and memory."""

import asyncio
import logging

import pytest

from protocol.bus import Message
from protocol.errors import BusError, BusOverflow, BusTimeout
from protocol.fragments import PART_HEADER
from tests.contract.bus_worlds import PATIENCE_S, Listener, MemoryWorld, World, started

MIB = 1 << 20


async def test_a_slow_subscription_loses_and_says_how_many(world: World) -> None:
    sender, receiver, heard = await started(world), await started(world), Listener()
    receiver.on_event(heard.on_event)
    await receiver.subscribe("slow", heard, max_pending=100)
    for _ in range(2000):
        sender.publish("slow", b"x")
    await heard.until(lambda: len(heard.messages) + heard.lost == 2000)
    assert heard.lost == receiver.lost > 0
    assert {e.subject for e in heard.events if e.kind == "lost"} == {"slow"}


async def test_pending_bytes_are_bounded_too(world: World) -> None:
    sender, receiver, heard = await started(world), await started(world), Listener()
    receiver.on_event(heard.on_event)
    await receiver.subscribe("slow", heard, max_pending_bytes=1000)
    sender.publish("slow", bytes(1000))
    sender.publish("slow", bytes(999))
    await heard.until(lambda: heard.messages and heard.lost)
    assert [len(p) for p in heard.payloads] == [999]
    assert heard.lost == receiver.lost == 1


async def test_all_works_again_after_the_server_was_killed(world: World) -> None:
    sender, receiver, heard = await started(world), await started(world), Listener()
    receiver.on_event(heard.on_event)
    sender_events = Listener()
    sender.on_event(sender_events.on_event)
    await receiver.subscribe("s", heard)
    world.kill()
    await heard.until(lambda: "down" in heard.kinds)
    await sender_events.until(lambda: "down" in sender_events.kinds)
    assert not receiver.connected
    sender.publish("s", b"buffered")
    await receiver.subscribe("new", heard)
    with pytest.raises(BusTimeout):
        await sender.flush(timeout_s=0.5 if isinstance(world, MemoryWorld) else 2.0)
    world.revive()
    await heard.until(lambda: "up" in heard.kinds)
    await sender_events.until(lambda: "up" in sender_events.kinds)
    for _ in range(100):
        sender.publish("s", b"s")
        sender.publish("new", b"n")
    await heard.until(lambda: heard.payloads.count(b"n") == 100)
    assert heard.payloads.count(b"s") == 100
    assert heard.kinds == ["down", "up"]
    await receiver.subscribe("ping", lambda m: receiver.publish(m.reply, b"pong"))
    assert (await sender.request("ping", b"", timeout_s=5)).payload == b"pong"


async def test_a_frozen_server_is_noticed_even_with_much_unsent(world: World) -> None:
    bus, heard = await started(world, pending_bytes=8 * MIB), Listener()
    bus.on_event(heard.on_event)
    await bus.subscribe("s", heard)
    world.freeze()
    frozen_at = asyncio.get_running_loop().time()
    for _ in range(100):
        try:
            bus.publish("other", bytes(MIB // 2))
        except BusOverflow:
            break
        await asyncio.sleep(0)
    else:
        pytest.fail("a server that takes nothing must make the buffer overflow")
    await heard.until(lambda: "down" in heard.kinds)
    assert asyncio.get_running_loop().time() - frozen_at < 3.6
    world.thaw()
    await heard.until(lambda: "up" in heard.kinds)
    bus.publish("s", b"again")
    await heard.until(lambda: b"again" in heard.payloads)


class Numbered:
    """A sender that numbers, remembers, and repeats when asked; a reader that sees gaps."""

    def __init__(self) -> None:
        self.sent: list[bytes] = []
        self.read: list[int] = []
        self.gaps = 0


async def test_what_was_lost_can_be_asked_for_again(world: World) -> None:
    worker, router = await started(world), await started(world)
    state, done = Numbered(), asyncio.Event()

    def replay(message: Message) -> None:
        for frame in state.sent[int(message.payload) :][:50]:
            worker.publish("frames", frame)

    def read(message: Message) -> None:
        number = int(message.payload)
        if number == len(state.read):
            state.read.append(number)
        elif number > len(state.read):
            state.gaps += 1
            router.publish("replay", str(len(state.read)).encode())
        if len(state.read) == 1000:
            done.set()

    await worker.subscribe("replay", replay)
    await router.subscribe("frames", read, max_pending=100)
    for number in range(1000):
        state.sent.append(str(number).encode())
        worker.publish("frames", state.sent[-1])
    async with asyncio.timeout(PATIENCE_S):
        while not done.is_set():
            worker.publish("frames", b"999")  # As a load report does: it names the last number.
            await worker.flush(timeout_s=5)
            await router.flush(timeout_s=5)
    assert state.gaps > 0
    assert router.lost > 0
    assert state.read == list(range(1000))


async def test_start_waits_for_a_server_and_says_so_in_one_line(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    world.kill()
    bus = world.make()
    with caplog.at_level(logging.INFO):
        starting = asyncio.ensure_future(bus.start())
        done, _ = await asyncio.wait([starting], timeout=1.0)
        assert not done
        warnings = [r for r in caplog.records if r.levelno >= logging.WARNING]
        assert len(warnings) == 1
        assert warnings[0].exc_info is None
        world.revive()
        async with asyncio.timeout(PATIENCE_S):
            await starting
    assert bus.connected


async def test_start_can_be_cancelled(world: World) -> None:
    world.kill()
    bus = world.make()
    starting = asyncio.ensure_future(bus.start())
    await asyncio.wait([starting], timeout=0.3)
    starting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await starting
    await bus.close()


@pytest.mark.parametrize("how", ["kill", "freeze"])
async def test_close_does_not_hang_on_a_dead_server(world: World, how: str) -> None:
    bus, heard = await started(world), Listener()
    bus.on_event(heard.on_event)
    await bus.subscribe("s", heard)
    bus.publish("s", bytes(16 * MIB))
    (world.kill if how == "kill" else world.freeze)()
    async with asyncio.timeout(3.0):
        await bus.close()
    with pytest.raises(BusError, match="closed"):
        bus.publish("s", b"x")
    await bus.close()


async def test_close_fails_open_requests(world: World) -> None:
    bus = await started(world)
    await bus.subscribe("mute", lambda m: None)
    asking = asyncio.ensure_future(bus.request("mute", b"", timeout_s=30))
    await bus.flush(timeout_s=5)
    await bus.close()
    with pytest.raises(BusError, match="closed"):
        await asking


async def test_a_failing_callback_harms_nobody(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    bus, heard = await started(world), Listener()

    def call(message: Message) -> None:
        heard(message)
        raise ValueError("bad message")

    await bus.subscribe("s", call)
    for _ in range(50):
        bus.publish("s", b"x")
    await heard.have(50)
    said = [record for record in caplog.records if "bad message" in record.getMessage()]
    assert len(said) == 1
    assert said[0].exc_info is None


async def test_a_full_outbound_buffer_refuses_and_keeps_what_it_took(world: World) -> None:
    sender = await started(world, pending_bytes=MIB)
    receiver, heard = await started(world), Listener()
    await receiver.subscribe("s", heard)
    for _ in range(10):
        sender.publish("s", bytes(100_000))
    for size in (100_000, 3 * MIB):
        with pytest.raises(BusOverflow):
            sender.publish("s", bytes(size))
    await heard.have(10)
    await sender.flush(timeout_s=5)
    assert len(heard.messages) == 10
    sender.publish("s", b"again")
    assert (await heard.have(11))[-1] == b"again"


async def test_parts_that_make_no_sense_are_counted_and_ignored(world: World) -> None:
    bus, heard = await started(world), Listener()
    bus.on_event(heard.on_event)
    await bus.subscribe("s", heard)
    rubbish = ["", "x", "a 0", "a 2 2", "a -1 2", "a 0 9999999", "a b c", "é 0 2", "a 0 2 3"]
    for text in rubbish:
        bus.publish("s", b"payload", headers={PART_HEADER: text})
    bus.publish("s", b"", headers={PART_HEADER: "b 0 2"})
    bus.publish("s", b"1", headers={PART_HEADER: "c 0 3"})
    bus.publish("s", b"3", headers={PART_HEADER: "c 2 3"})
    bus.publish("s", b"fine")
    await heard.until(lambda: heard.lost == len(rubbish) + 2 and heard.messages)
    assert heard.payloads == [b"fine"]
    assert bus.lost == heard.lost


async def test_a_listener_of_events_that_fails_harms_nobody(world: World) -> None:
    bus, heard = world.make(), Listener()

    def fail(event: object) -> None:
        raise ValueError("listener")

    bus.on_event(fail)
    bus.on_event(heard.on_event)
    await bus.start()
    assert heard.kinds == ["up"]
