"""The floor: a uvloop server that answers chat requests from a constant, and nothing else.

    python -m baton.bench.canned STEP_MS GROUPS

It prints its port. A stream gets one chunk each `STEP_MS`; with 0 everything at once. Streams
belong to groups in turn: those of one are written in one turn of the loop, as those of one decode
worker are, and the groups' steps lie evenly apart. Nothing is parsed but the length, `max_tokens`
and `stream`.
"""

import asyncio
import itertools
import re
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final, cast

import uvloop

from baton.bench.fleet import Process, serving

_LENGTH: Final = re.compile(rb"content-length: *(\d+)", re.IGNORECASE)
_TOKENS: Final = re.compile(rb'"max_tokens":(\d+)')
_EVENT: Final = (
    b'data: {"id":"chatcmpl-0123456789abcdef0123456789abcdef","object":"chat.completion.chunk",'
    b'"created":1790000000,"model":"demo","choices":[{"index":0,"delta":{"content":" word"},'
    b'"finish_reason":null}]}\n\n'
)
_CHUNK: Final = b"%x\r\n%b\r\n" % (len(_EVENT), _EVENT)
_HEAD: Final = (
    b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream; charset=utf-8\r\n"
    b"Cache-Control: no-cache\r\nTransfer-Encoding: chunked\r\n\r\n"
)
_END: Final = b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n"
_BODY: Final = _EVENT[6:-2]
_WHOLE: Final = (
    b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%b"
    % (len(_BODY), _BODY)
)


Group = dict[asyncio.Transport, int]
"""Streams and how many chunks each still gets."""


class Canned(asyncio.Protocol):
    """One connection."""

    def __init__(self, group: Group, step_s: float) -> None:
        self._streams = group
        self._step_s = step_s
        self._buffer = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)  # uvloop's is no subclass

    def connection_lost(self, exc: Exception | None) -> None:
        self._streams.pop(self._transport, None)

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        head, blank, body = self._buffer.partition(b"\r\n\r\n")
        length = _LENGTH.search(head)
        if not blank or length is None or len(body) < int(length[1]):
            return
        self._buffer = b""
        tokens = _TOKENS.search(body)
        count = int(tokens[1]) if tokens else 1
        if b'"stream":true' not in body:
            self._transport.write(_WHOLE)
        else:
            self.begin(count)

    def begin(self, count: int) -> None:
        """A stream of so many chunks is asked for."""
        if self._step_s:
            self._transport.write(_HEAD + _CHUNK)
            self._streams[self._transport] = count - 1
        else:
            self._transport.write(stream(count))


def stream(count: int) -> bytes:
    """A whole one."""
    return _HEAD + _CHUNK * count + _END


async def serve(step_s: float, num_groups: int) -> None:
    """Until killed."""
    loop = asyncio.get_running_loop()
    groups: list[Group] = [{} for _ in range(num_groups)]
    turn = itertools.cycle(groups)
    server = await loop.create_server(lambda: Canned(next(turn), step_s), "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    due = loop.time()
    for group in itertools.cycle(groups):
        due += (step_s or 60.0) / num_groups
        await asyncio.sleep(max(0.0, due - loop.time()))
        step(group)


def step(group: Group) -> None:
    """A chunk to each stream."""
    for transport, left in list(group.items()):
        if left > 0:
            transport.write(_CHUNK)
            group[transport] = left - 1
        else:
            transport.write(_END)
            del group[transport]


@asynccontextmanager
async def floor(step_ms: float, *, groups: int = 1) -> AsyncIterator[tuple[int, Process]]:
    """The server as a process of its own: its port, and what it uses."""
    async with serving("canned", step_ms, groups) as (port, pid):
        yield port, Process(pid)


if __name__ == "__main__":
    uvloop.run(serve(float(sys.argv[1]) / 1e3, int(sys.argv[2])))
