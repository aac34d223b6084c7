"""The floor: a uvloop server that answers chat requests from a constant, and nothing else.

    python -m baton.bench.canned STEP_MS

It prints its port. A stream gets one chunk each `STEP_MS`, all streams in the same turn of the
loop; with 0 everything at once. Nothing is parsed but the length, `max_tokens` and `stream`.
"""

import asyncio
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


class Canned(asyncio.Protocol):
    """One connection."""

    def __init__(self, streams: "dict[asyncio.Transport, int]", step_s: float) -> None:
        self._streams = streams
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
        elif self._step_s:
            self._transport.write(_HEAD + _CHUNK)
            self._streams[self._transport] = count - 1
        else:
            self._transport.write(_HEAD + _CHUNK * count + _END)


async def serve(step_s: float) -> None:
    """Until killed."""
    loop = asyncio.get_running_loop()
    streams: dict[asyncio.Transport, int] = {}
    server = await loop.create_server(lambda: Canned(streams, step_s), "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    due = loop.time()
    while True:
        due += step_s or 60.0
        await asyncio.sleep(max(0.0, due - loop.time()))
        for transport, left in list(streams.items()):
            if left > 0:
                transport.write(_CHUNK)
                streams[transport] = left - 1
            else:
                transport.write(_END)
                del streams[transport]


@asynccontextmanager
async def floor(step_ms: float) -> AsyncIterator[tuple[int, Process]]:
    """The server as a process of its own: its port, and what it uses."""
    async with serving("canned", step_ms) as (port, pid):
        yield port, Process(pid)


if __name__ == "__main__":
    uvloop.run(serve(float(sys.argv[1]) / 1e3))
