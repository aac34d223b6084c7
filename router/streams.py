"""Server-sent events straight to the socket: the one place that writes past aiohttp.

Up to the first chunk nothing is sent, so that an error keeps its HTTP status. The head and the
first chunks go through aiohttp's `write`; from then on every chunk is framed here and given to
`request.transport`, so that a token wakes no task. The end goes through `write_eof` again. Nothing
is ever compressed.

`transport.write` never pushes back, so the reader's pace is checked at each write: above
`HIGH_BYTES` chunks are held and joined; a client that takes nothing for `stall_s` is aborted.
"""

import asyncio
from collections.abc import Callable, Mapping
from typing import Final

from aiohttp import web

from protocol.errors import ClientError
from router.answers import DONE
from router.sinks import error_json

HIGH_BYTES: Final = 64 * 1024
LOW_BYTES: Final = 16 * 1024
SWEEP_S: Final = 0.25
PING_S: Final = 15.0
_PING: Final = b": ping\n\n"
_DONE: Final = b"data: " + DONE + b"\n\n"

SSE_HEADERS: Final = {
    "Content-Type": "text/event-stream; charset=utf-8",
    "Cache-Control": "no-cache",
    "X-Accel-Buffering": "no",
}


class ClientStalled(Exception):
    """The client took nothing for too long; its connection was aborted."""


class SseWriter:
    """A `ChunkWriter` over one HTTP response."""

    def __init__(self, request_id: str, *, stall_s: float, ping_s: float = PING_S) -> None:
        self._request_id = request_id
        self._stall_s = stall_s
        self._ping_s = ping_s
        self._loop = asyncio.get_running_loop()
        self._ready = asyncio.Event()
        self._finished = asyncio.Event()
        self._error: ClientError | None = None
        self._held: list[bytes] = []
        self._transport: asyncio.Transport | None = None
        self._chunked = False
        self._sweeper: asyncio.TimerHandle | None = None
        self._smallest = 0
        self._moved_at = 0.0
        self.on_stall: Callable[[], None] = lambda: None

    # --- the sink's side ---

    def write(self, chunk: bytes) -> None:
        self._send(b"data: " + chunk + b"\n\n")

    def fail(self, error: ClientError) -> None:
        if not self._ready.is_set():
            self._error = error
        else:
            self._send(b"data: " + error_json(error, self._request_id) + b"\n\n")
        self.finish()

    def finish(self) -> None:
        self._ready.set()
        self._finished.set()

    # --- the socket ---

    def _send(self, data: bytes) -> None:
        transport = self._transport
        if transport is None or self._held:
            self._held.append(data)
            self._ready.set()
        elif transport.get_write_buffer_size() > HIGH_BYTES:
            self._held.append(data)
            self._start_sweep(transport)
        else:
            transport.write(self._framed(data))

    def _framed(self, data: bytes) -> bytes:
        return b"%x\r\n%b\r\n" % (len(data), data) if self._chunked else data

    def _flush(self, transport: asyncio.Transport) -> None:
        if self._held:
            transport.write(self._framed(b"".join(self._held)))
            self._held.clear()

    def _start_sweep(self, transport: asyncio.Transport) -> None:
        self._smallest = transport.get_write_buffer_size()
        self._moved_at = self._loop.time()
        self._sweeper = self._loop.call_later(SWEEP_S, self._sweep)

    def _sweep(self) -> None:
        """While chunks are held: hand them over when the socket took some, or give up."""
        transport = self._transport
        if transport is None or transport.is_closing():
            return
        size = transport.get_write_buffer_size()
        if size <= LOW_BYTES:
            self._flush(transport)
            return
        now = self._loop.time()
        if size < self._smallest:
            self._smallest, self._moved_at = size, now
        elif now - self._moved_at >= self._stall_s:
            self.abort()
            return
        self._sweeper = self._loop.call_later(SWEEP_S, self._sweep)

    def abort(self) -> None:
        """The client stopped reading: drop the connection and what it would have got."""
        if self._transport is not None:
            self._transport.abort()
        self._held.clear()
        self.on_stall()
        self._finished.set()

    def close(self) -> None:
        """The handler is over, whichever way."""
        if self._sweeper is not None:
            self._sweeper.cancel()
        self._transport = None
        self._held.clear()

    # --- the handler's side ---

    async def serve(self, request: web.Request, headers: Mapping[str, str]) -> web.StreamResponse:
        """Send everything until the sink has finished. Raises the ClientError that came before the
        first byte, ClientStalled, and CancelledError when the client went."""
        try:
            response = await self._until_ready(request, headers)
            if self._error is not None and response is None:
                raise self._error
            if response is None:
                response = await self._prepare(request, headers)
            if self._error is not None:  # pings were sent: the status is gone
                self._held.append(b"data: " + error_json(self._error, self._request_id) + b"\n\n")
            await self._stream(request, response)
            return response
        finally:
            self.close()

    async def _until_ready(
        self, request: web.Request, headers: Mapping[str, str]
    ) -> web.StreamResponse | None:
        response = None
        while not self._ready.is_set():
            try:
                async with asyncio.timeout(self._ping_s):
                    await self._ready.wait()
            except TimeoutError:
                response = response or await self._prepare(request, headers)
                await response.write(_PING)
        return response

    async def _prepare(
        self, request: web.Request, headers: Mapping[str, str]
    ) -> web.StreamResponse:
        response = web.StreamResponse(headers={**SSE_HEADERS, **headers})
        self._chunked = request.version >= (1, 1)
        if self._chunked:
            response.enable_chunked_encoding()
        else:
            response.force_close()
        await response.prepare(request)
        return response

    async def _stream(self, request: web.Request, response: web.StreamResponse) -> None:
        if not self._finished.is_set():
            first = b"".join(self._held)
            self._held.clear()
            await response.write(first)
            transport = request.transport
            if transport is None:
                raise ConnectionResetError("the client is gone")
            self._transport = transport
            self._flush(transport)
            await self._finished.wait()
            await self._until_taken(transport)
        rest = b"".join(self._held)
        self._held.clear()
        await self._write_eof(request, response, rest + _DONE)

    async def _until_taken(self, transport: asyncio.Transport) -> None:
        """`write_eof` waits for ever on a client that stopped reading: let the sweep watch it."""
        smallest = transport.get_write_buffer_size()
        moved_at = self._loop.time()
        while not transport.is_closing() and transport.get_write_buffer_size() > HIGH_BYTES:
            await asyncio.sleep(SWEEP_S)
            size = transport.get_write_buffer_size()
            if size < smallest:
                smallest, moved_at = size, self._loop.time()
            elif self._loop.time() - moved_at >= self._stall_s:
                self.abort()
        if transport.is_closing():
            raise ClientStalled
        if self._sweeper is not None:
            self._sweeper.cancel()

    async def _write_eof(
        self, request: web.Request, response: web.StreamResponse, data: bytes
    ) -> None:
        try:
            async with asyncio.timeout(self._stall_s):
                await response.write_eof(data)
        except TimeoutError:
            if request.transport is not None:
                request.transport.abort()
            self.on_stall()
            raise ClientStalled from None
