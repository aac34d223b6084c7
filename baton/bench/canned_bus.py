"""Floors with a bus under them: uvloop servers that write a constant when NATS tells them to.

    python -m baton.bench.canned_bus steps NATS_PORT GROUPS
    python -m baton.bench.canned_bus publish NATS_PORT GROUPS STEP_MS FRAME_BYTES

`steps` is `baton.bench.canned` whose steps are told by a message, as a router's are; `publish` is
the workers: one message a step for each group, evenly apart.

    python -m baton.bench.canned_bus ask NATS_PORT
    python -m baton.bench.canned_bus answer NATS_PORT

`ask` sends a message for each request, and answers when `answer` has sent one back: the way of a
first token. All speak NATS by hand and decode nothing: what they and the server use here is what
waking up, reading and writing cost.
"""

import asyncio
import itertools
import re
import sys
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Final, cast

import uvloop

from baton.bench.canned import Canned, Group, step, stream
from baton.bench.fleet import Process, serving

_CONNECT: Final = b'CONNECT {"verbose":false,"pedantic":false}\r\n'
_FRAMES: Final = b"baton-bench.floor.frames."
_ASKED: Final = b"baton-bench.floor.asked"
_ANSWERED: Final = b"baton-bench.floor.answered"
_MESSAGE: Final = re.compile(rb"MSG baton-bench\.floor\.(?:frames\.)?(\w+) 1 ")


class Wire(asyncio.Protocol):
    """One connection to nats-server. `heard` gets the last name of each message's subject."""

    def __init__(self, subject: bytes = b"", heard: Callable[[bytes], None] | None = None) -> None:
        self._subject = subject
        self._heard = heard

    @classmethod
    async def open(
        cls, port: int, subject: bytes = b"", heard: Callable[[bytes], None] | None = None
    ) -> "Wire":
        loop = asyncio.get_running_loop()
        _, wire = await loop.create_connection(lambda: cls(subject, heard), "127.0.0.1", port)
        return wire

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)  # uvloop's is no subclass
        self.transport.write(_CONNECT)
        if self._subject:
            self.transport.write(b"SUB " + self._subject + b" 1\r\n")

    def data_received(self, data: bytes) -> None:
        # A head that two reads share is missed; frames are one read each, and few.
        if self._heard is not None:
            for message in _MESSAGE.finditer(data):
                self._heard(message[1])
        if data.startswith(b"PING"):
            self.transport.write(b"PONG\r\n")


class Asking(Canned):
    """A connection whose streams wait for an answer."""

    def __init__(self, wire: Wire, waiting: deque[tuple[asyncio.Transport, int]]) -> None:
        super().__init__({}, 0.0)
        self._wire = wire
        self._waiting = waiting

    def begin(self, count: int) -> None:
        self._waiting.append((self._transport, count))
        self._wire.transport.write(b"PUB " + _ASKED + b" 0\r\n\r\n")


async def steps(nats_port: int, num_groups: int) -> None:
    """Until killed; prints the port, as all do."""
    groups: list[Group] = [{} for _ in range(num_groups)]
    turn = itertools.cycle(groups)
    await Wire.open(nats_port, _FRAMES + b"*", lambda group: step(groups[int(group)]))
    await _listen(lambda: Canned(next(turn), 1.0))


async def ask(nats_port: int) -> None:
    waiting: deque[tuple[asyncio.Transport, int]] = deque()

    def answered(_: bytes) -> None:
        transport, count = waiting.popleft()
        transport.write(stream(count))

    wire = await Wire.open(nats_port, _ANSWERED, answered)
    await _listen(lambda: Asking(wire, waiting))


async def answer(nats_port: int) -> None:
    wire = await Wire.open(
        nats_port, _ASKED, lambda _: wire.transport.write(b"PUB " + _ANSWERED + b" 0\r\n\r\n")
    )
    print(nats_port, flush=True)
    await asyncio.Event().wait()


async def _listen(connection: Callable[[], Canned]) -> None:
    server = await asyncio.get_running_loop().create_server(connection, "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


async def publish(nats_port: int, num_groups: int, step_s: float, num_bytes: int) -> None:
    loop = asyncio.get_running_loop()
    wire = await Wire.open(nats_port)
    messages = [
        b"PUB %b%d %d\r\n%b\r\n" % (_FRAMES, number, num_bytes, b"." * num_bytes)
        for number in range(num_groups)
    ]
    print(nats_port, flush=True)
    due = loop.time()
    for message in itertools.cycle(messages):
        due += step_s / num_groups
        await asyncio.sleep(max(0.0, due - loop.time()))
        wire.transport.write(message)


@asynccontextmanager
async def bus_floor(
    nats_port: int, step_ms: float, *, groups: int, frame_bytes: int
) -> AsyncIterator[tuple[int, Process]]:
    """Server and publisher as processes of their own: the server's port, and what it uses."""
    async with (
        serving("canned_bus", "steps", nats_port, groups) as (port, pid),
        serving("canned_bus", "publish", nats_port, groups, step_ms, frame_bytes),
    ):
        yield port, Process(pid)


@asynccontextmanager
async def bus_way(nats_port: int) -> AsyncIterator[int]:
    """The port of a server whose every answer went over NATS and back."""
    async with (
        serving("canned_bus", "ask", nats_port) as (port, _),
        serving("canned_bus", "answer", nats_port),
    ):
        yield port


def main(what: str, nats_port: str, *rest: str) -> None:
    port = int(nats_port)
    match what, rest:
        case "steps", (groups,):
            uvloop.run(steps(port, int(groups)))
        case "publish", (groups, step_ms, frame_bytes):
            uvloop.run(publish(port, int(groups), float(step_ms) / 1e3, int(frame_bytes)))
        case "ask", ():
            uvloop.run(ask(port))
        case _:
            uvloop.run(answer(port))


if __name__ == "__main__":
    main(*sys.argv[1:])
