"""`SseWriter` behind a real aiohttp server; the client reads as the test says."""

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
from aiohttp import web

from protocol.errors import ClientError
from router import streams
from router.streams import SseWriter

TOO_LATE = ClientError(502, "broken", code="worker_failed")


class World:
    """One request, its writer, and the client's socket."""

    def __init__(self, writer: SseWriter, client: socket.socket, serving: "Serving") -> None:
        self.writer = writer
        self.client = client
        self.serving = serving

    async def read(self, size: int = 1 << 20) -> bytes:
        return await asyncio.get_running_loop().sock_recv(self.client, size)

    async def read_all(self) -> bytes:
        """To the end of the chunked answer."""
        data = b""
        async with asyncio.timeout(10):
            while not data.endswith(b"\r\n0\r\n\r\n"):
                piece = await self.read()
                assert piece
                data += piece
        return data


class Serving:
    """How the handler ended."""

    def __init__(self) -> None:
        self.writer: asyncio.Future[SseWriter] = asyncio.get_running_loop().create_future()
        self.ended: asyncio.Future[BaseException | None] = (
            asyncio.get_running_loop().create_future()
        )
        self.stalled = asyncio.Event()


@asynccontextmanager
async def streaming(*, stall_s: float = 5.0, ping_s: float = 60.0) -> AsyncIterator[World]:
    serving = Serving()

    async def handle(request: web.Request) -> web.StreamResponse:
        writer = SseWriter("rid", stall_s=stall_s, ping_s=ping_s, on_stall=serving.stalled.set)
        serving.writer.set_result(writer)
        try:
            response = await writer.serve(request, {"x-request-id": "rid"})
        except BaseException as error:
            serving.ended.set_result(error)
            raise
        serving.ended.set_result(None)
        return response

    app = web.Application()
    app.add_routes([web.post("/", handle)])
    runner = web.AppRunner(app, handler_cancellation=True, access_log=None, shutdown_timeout=1.0)
    await runner.setup()
    listener = socket.create_server(("127.0.0.1", 0))
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 16_384)
    await web.SockSite(runner, listener).start()
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 32_768)
    client.setblocking(False)
    try:
        loop = asyncio.get_running_loop()
        await loop.sock_connect(client, listener.getsockname())
        await loop.sock_sendall(client, b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n")
        async with asyncio.timeout(10):
            yield World(await serving.writer, client, serving)
    finally:
        client.close()
        await runner.cleanup()


def body_of(answer: bytes) -> bytes:
    """Without head and chunked framing, which is checked."""
    _, _, rest = answer.partition(b"\r\n\r\n")
    body = b""
    while True:
        size, _, rest = rest.partition(b"\r\n")
        length = int(size, 16)
        body, end, rest = body + rest[:length], rest[length : length + 2], rest[length + 2 :]
        assert end == b"\r\n"
        if length == 0:
            assert rest == b""
            return body


def events_of(answer: bytes) -> list[bytes]:
    *events, rest = body_of(answer).split(b"\n\n")
    assert rest == b""
    return events


def chunk(number: int, size: int) -> bytes:
    return json.dumps({"number": number, "pad": "x" * size}).encode()


def numbers_of(events: list[bytes]) -> list[int]:
    assert events[-1] == b"data: [DONE]"
    return [json.loads(event.removeprefix(b"data: "))["number"] for event in events[:-1]]


async def test_what_was_held_goes_before_what_comes_later() -> None:
    """Also when the buffer has room again and no sweep has come by yet."""
    async with streaming() as world:
        answer, number = b"", 0
        for _ in range(4):
            for _ in range(80):  # far more than all buffers take: the rest is held
                world.writer.write(chunk(number, 4000))
                number += 1
            await asyncio.sleep(0)
            goal = len(answer) + 200_000
            while len(answer) < goal:  # now there is room
                answer += await world.read()
            for _ in range(5):
                world.writer.write(chunk(number, 10))
                number += 1
        world.writer.finish()
        answer += await world.read_all()
        assert numbers_of(events_of(answer)) == list(range(number))
        assert await world.serving.ended is None


@pytest.mark.parametrize("is_done", [False, True])
async def test_who_takes_nothing_is_aborted(is_done: bool) -> None:
    async with streaming(stall_s=0.5) as world:
        for number in range(2500):
            world.writer.write(chunk(number, 4000))
            if number % 50 == 0:
                await asyncio.sleep(0)
        if is_done:
            world.writer.finish()
        async with asyncio.timeout(4):
            await world.serving.stalled.wait()
            ended = await world.serving.ended
        assert isinstance(ended, ConnectionError | asyncio.CancelledError)
        world.writer.write(b"late")  # changes nothing, raises nothing
        world.writer.finish()


async def test_a_client_keeps_no_more_than_so_much_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "MAX_HELD", 1 << 20)
    async with streaming(stall_s=60.0) as world:
        number = 0
        while not world.serving.stalled.is_set():
            world.writer.write(chunk(number, 4000))
            number += 1
            if number % 50 == 0:
                await asyncio.sleep(0)
            assert number < 20_000
        world.writer.write(b"late")
        async with asyncio.timeout(4):
            ended = await world.serving.ended
        assert isinstance(ended, ConnectionError | asyncio.CancelledError)


async def test_so_much_held_before_the_first_byte_ends_it_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(streams, "MAX_HELD", 1 << 20)
    async with streaming(stall_s=60.0) as world:
        for number in range(400):
            world.writer.write(chunk(number, 4000))
        async with asyncio.timeout(4):
            await world.serving.stalled.wait()
            assert await world.serving.ended is not None


async def test_what_was_taken_is_held_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """A client that keeps pace may get much more in all."""
    monkeypatch.setattr(streams, "MAX_HELD", 1 << 20)
    async with streaming() as world:
        answer, number = b"", 0
        for _ in range(8):
            for _ in range(100):
                world.writer.write(chunk(number, 4000))
                number += 1
            await asyncio.sleep(0)
            while len(answer) < 4000 * (number - 20):
                answer += await world.read()
        world.writer.finish()
        answer += await world.read_all()
        assert numbers_of(events_of(answer)) == list(range(number))


Ends = Callable[[SseWriter], Any]


@pytest.mark.parametrize(
    ("act", "expected"),
    [
        (lambda w: w.finish(), [b"data: [DONE]"]),
        (lambda w: (w.write(b"1"), w.finish()), [b"data: 1", b"data: [DONE]"]),
        (lambda w: (w.write(b"1"), w.write(b"2"), w.finish()),
         [b"data: 1", b"data: 2", b"data: [DONE]"]),
    ],
)  # fmt: skip
async def test_a_stream_that_is_over_before_it_began(act: Ends, expected: list[bytes]) -> None:
    async with streaming() as world:
        act(world.writer)
        assert events_of(await world.read_all()) == expected


async def test_the_head_goes_with_the_first_chunk_and_the_end_with_the_last(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sent: list[bytes] = []
    for name in ("send", "sendmsg"):
        system = getattr(socket.socket, name)

        def call(self: socket.socket, data: Any, *, system: Any = system) -> Any:
            sent.append(data)
            return system(self, data)

        monkeypatch.setattr(socket.socket, name, call)
    async with streaming() as world:
        sent.clear()
        world.writer.write(b"1")
        answer = await world.read()
        splice = world.writer.splice(b"<", b">")
        splice(b"2")
        answer += await world.read()
        world.writer.write(b"3")
        world.writer.write(b"usage")
        world.writer.finish()
        answer += await world.read_all()
        assert [event.removeprefix(b"data: ") for event in events_of(answer)] == [
            *(b"1", b"<2>", b"3", b"usage", b"[DONE]")
        ]
    assert len(sent) == 3


async def test_what_waits_for_the_end_of_the_turn_keeps_its_place() -> None:
    """Choices of one request are in one frame: one ends, the others go on."""
    async with streaming() as world:
        world.writer.write(b"1")
        answer = await world.read()
        splice = world.writer.splice(b"<", b">")
        for rounds in (1, 2):
            splice(b"2")
            world.writer.write(b"3")
            splice(b"4")
            world.writer.write(b"5")
            while answer.count(b"data: 5") < rounds:  # there before the end
                answer += await world.read()
        world.writer.finish()
        answer += await world.read_all()
    events = [event.removeprefix(b"data: ") for event in events_of(answer)]
    assert events == [b"1", *([b"<2>", b"3", b"<4>", b"5"] * 2), b"[DONE]"]


async def test_an_error_before_the_first_byte_is_raised() -> None:
    async with streaming() as world:
        world.writer.fail(TOO_LATE)
        assert await world.serving.ended is TOO_LATE


@pytest.mark.parametrize("wait", [False, True])
async def test_an_error_after_a_chunk_is_an_event(wait: bool) -> None:
    async with streaming() as world:
        world.writer.write(b"1")
        head = await world.read() if wait else b""
        world.writer.fail(TOO_LATE)
        first, error, done = events_of(head + await world.read_all())
    assert (first, done) == (b"data: 1", b"data: [DONE]")
    assert json.loads(error.removeprefix(b"data: "))["error"]["code"] == "worker_failed"


async def test_an_error_after_a_ping_is_an_event() -> None:
    async with streaming(ping_s=0.02) as world:
        head = await world.read()
        assert b": ping\n\n" in head
        world.writer.fail(TOO_LATE)
        events = events_of(head + await world.read_all())
    assert [event for event in events if event != b": ping"][-1] == b"data: [DONE]"
    assert b"worker_failed" in events[-2]


async def test_a_client_that_leaves_cancels_the_handler_and_late_writes_are_harmless() -> None:
    async with streaming() as world:
        world.writer.write(b"1")
        await world.read()
        world.client.close()
        async with asyncio.timeout(2):
            while not world.serving.ended.done():
                world.writer.write(b"2")
                await asyncio.sleep(0)
        assert isinstance(world.serving.ended.result(), asyncio.CancelledError)
        world.writer.write(b"3")
        world.writer.fail(TOO_LATE)
