"""Server-sent events straight to the socket: the one place that writes past aiohttp.

Up to the first chunk nothing is sent, so that an error keeps its HTTP status. The head goes with
the first chunks through aiohttp's `write`; from then on every chunk is framed here and given to
`request.transport`, so that a token wakes no task. The end goes through `write_eof` again, with
the last chunks. Nothing is ever compressed.

`transport.write` never pushes back, so the reader's pace is checked at each write: above
`HIGH_BYTES` chunks are held and joined. A client that takes nothing for `stall_s`, or lets more
than `MAX_HELD` pile up, is aborted.
"""

import asyncio
import fcntl
import logging
import sys
import termios
from collections.abc import Awaitable, Callable, Mapping
from typing import Final

from aiohttp import web

from protocol.errors import ClientError
from router.answers import DONE
from router.sinks import error_json

_log = logging.getLogger("baton.router")

HIGH_BYTES: Final = 64 * 1024
LOW_BYTES: Final = 16 * 1024
"""At most this much waiting never pauses the transport: aiohttp's writes do not wait then."""
MAX_HELD: Final = 32 << 20
"""Bytes that one client may keep us waiting with: some hundred thousand tokens."""
SWEEP_S: Final = 0.25
_SIZES: Final = tuple(b"%x\r\n" % size for size in range(1024))
"""Sizes of chunks as HTTP wants them."""
_PING: Final = b": ping\n\n"
_DONE: Final = b"data: " + DONE + b"\n\n"

SSE_HEADERS: Final = {
    "Content-Type": "text/event-stream; charset=utf-8",
    "Cache-Control": "no-cache",
    "X-Accel-Buffering": "no",
}


class _Response(web.StreamResponse):
    """Its head waits for the first chunk and shares a write with it, as that of an answer in a
    piece does. An aiohttp that does not know this name sends the head alone."""

    _send_headers_immediately = False


class SseWriter:
    """A `ChunkWriter` over one HTTP response.

    `on_stall` is called when the client was too slow and was aborted.
    """

    def __init__(
        self, request_id: str, *, stall_s: float, ping_s: float, on_stall: Callable[[], None]
    ) -> None:
        self._request_id = request_id
        self._stall_s = stall_s
        self._ping_s = ping_s
        self._on_stall = on_stall
        self._loop = asyncio.get_running_loop()
        self._ready = asyncio.Event()
        self._finished = asyncio.Event()
        self._error: ClientError | None = None
        self._held: list[bytes] = []
        self._held_bytes = 0
        self._peer: asyncio.Transport | None = None
        """The client's connection."""
        self._transport: asyncio.Transport | None = None
        """The same while chunks may go there directly."""
        self._prepared = False
        self._chunked = False
        self._sweeper: asyncio.TimerHandle | None = None
        self._smallest = 0
        self._moved_at = 0.0

    # --- the sink's side ---

    def write(self, chunk: bytes) -> None:
        """Goes at the end of this turn of the loop, for the last chunk is followed by the end: a
        write is a system call here and one at the client."""
        data = b"data: " + chunk + b"\n\n"
        transport = self._transport
        if transport is None or self._held or transport.is_closing():
            self.send(data)
        else:
            self._hold(data)
            self._loop.call_soon(self._flush)

    def splice(self, before: bytes, after: bytes) -> Callable[[bytes], None]:
        return _Splice(self, b"data: " + before, after + b"\n\n").write

    def fail(self, error: ClientError) -> None:
        if self._prepared or self._ready.is_set():
            self.write(error_json(error, self._request_id))
        else:
            self._error = error
        self.finish()

    def finish(self) -> None:
        self._ready.set()
        self._finished.set()

    # --- the socket ---

    def room(self) -> asyncio.Transport | None:
        """Where a chunk may be written at once, framed by the caller; None: it has to wait, or is
        not to be framed, or nobody would get it."""
        transport = self._transport
        if (
            transport is None
            or self._held
            or not self._chunked
            or transport.is_closing()  # uvloop raises on a write to a closed transport
            or transport.get_write_buffer_size() > HIGH_BYTES
        ):
            return None
        return transport

    def send(self, data: bytes) -> None:
        """One event; never waits."""
        transport = self._transport
        if transport is None:
            self._hold(data)
            self._ready.set()
        elif transport.is_closing():
            return
        elif self._held:
            self._hold(data)
        elif transport.get_write_buffer_size() > HIGH_BYTES:
            self._hold(data)
            self._start_sweep(transport)
        else:
            transport.write(self._framed(data))

    def _hold(self, data: bytes) -> None:
        self._held.append(data)
        self._held_bytes += len(data)
        if self._held_bytes > MAX_HELD and self._peer is not None:
            self._abort(self._peer)
            self._finished.set()

    def _framed(self, data: bytes) -> bytes:
        return b"%x\r\n%b\r\n" % (len(data), data) if self._chunked else data

    def _take(self) -> bytes:
        data = b"".join(self._held)
        self._let_go()
        return data

    def _let_go(self) -> None:
        self._held.clear()
        self._held_bytes = 0

    def _flush(self) -> None:
        """What `write` held back, unless the end takes it along."""
        transport = self._transport
        if (
            transport is None
            or transport.is_closing()
            or self._finished.is_set()
            or not self._held  # an empty chunk would be the end
        ):
            return
        if transport.get_write_buffer_size() > HIGH_BYTES:
            self._start_sweep(transport)
        else:
            transport.write(self._framed(self._take()))

    def _start_sweep(self, transport: asyncio.Transport) -> None:
        self._smallest = _untaken(transport)
        self._moved_at = self._loop.time()
        self._sweeper = self._loop.call_later(SWEEP_S, self._sweep)

    def _sweep(self) -> None:
        """While chunks are held: hand them over when the socket took some, or give up."""
        transport = self._transport
        if transport is None or transport.is_closing() or not self._held:
            return
        if transport.get_write_buffer_size() <= LOW_BYTES:
            transport.write(self._framed(self._take()))
            return
        size, now = _untaken(transport), self._loop.time()
        if size < self._smallest:
            self._smallest, self._moved_at = size, now
        elif now - self._moved_at >= self._stall_s:
            self._abort(transport)
            self._finished.set()
            return
        self._sweeper = self._loop.call_later(SWEEP_S, self._sweep)

    def _abort(self, transport: asyncio.Transport) -> None:
        """The client stopped reading: drop the connection and what it would have got."""
        transport.abort()
        self._let_go()
        self._on_stall()

    def _close(self) -> None:
        """The handler is over, whichever way."""
        if self._sweeper is not None:
            self._sweeper.cancel()
        self._transport = self._peer = None
        self._let_go()

    # --- the handler's side ---

    async def serve(self, request: web.Request, headers: Mapping[str, str]) -> web.StreamResponse:
        """Send everything until the sink has finished. Raises the ClientError that came before the
        first byte, ConnectionError when the connection broke, CancelledError when the client went.
        """
        self._peer = request.transport
        try:
            response = await self._until_ready(request, headers)
            if self._error is not None:
                raise self._error
            if response is None:
                response = await self._prepare(request, headers)
            await self._stream(request, response)
            return response
        except (ClientError, ConnectionError):
            raise
        except Exception as error:
            if not self._prepared:
                raise
            # The status is gone: all that is left to say is that the answer is not whole.
            _log.exception("stream failed request_id=%s", self._request_id)
            if request.transport is not None:
                request.transport.abort()
            raise ConnectionResetError("the stream was aborted") from error
        finally:
            self._close()

    async def _until_ready(
        self, request: web.Request, headers: Mapping[str, str]
    ) -> web.StreamResponse | None:
        response = None
        while not self._ready.is_set():
            try:
                async with asyncio.timeout(self._ping_s):
                    await self._ready.wait()
            except TimeoutError:
                if self._ready.is_set():
                    break
                if response is None:
                    response = await self._prepare(request, headers)
                await self._paced(request, _PING, response.write)
        return response

    async def _prepare(
        self, request: web.Request, headers: Mapping[str, str]
    ) -> web.StreamResponse:
        response = _Response(headers={**SSE_HEADERS, **headers})
        self._chunked = request.version >= (1, 1)
        if self._chunked:
            response.enable_chunked_encoding()
        else:
            response.force_close()
        self._prepared = True
        await response.prepare(request)
        return response

    async def _stream(self, request: web.Request, response: web.StreamResponse) -> None:
        if not self._finished.is_set():
            await self._paced(request, self._take(), response.write)
            transport = _transport(request)
            if self._held:
                transport.write(self._framed(self._take()))
            self._transport = transport
            await self._finished.wait()
            if self._sweeper is not None:
                self._sweeper.cancel()
        await self._paced(request, self._take() + _DONE, response.write_eof)

    async def _paced(
        self, request: web.Request, data: bytes, write: Callable[[bytes], Awaitable[None]]
    ) -> None:
        """aiohttp's write waits for ever on a client that stopped reading: this one as long as the
        client takes something. Raises ConnectionResetError."""
        transport = _transport(request)
        size = transport.get_write_buffer_size()
        if size + len(data) <= LOW_BYTES:
            await write(data)
            return
        try:
            async with asyncio.timeout(self._stall_s) as limit:
                watch = self._loop.call_later(SWEEP_S, self._watch, transport, limit, 1 << 62)
                self._sweeper = watch
                await write(data)
        except TimeoutError:
            self._abort(transport)
            raise ConnectionResetError("the client took nothing") from None
        finally:
            if self._sweeper is not None:
                self._sweeper.cancel()

    def _watch(self, transport: asyncio.Transport, limit: asyncio.Timeout, smallest: int) -> None:
        """Put the limit off while the client takes something."""
        size = _untaken(transport)
        if size < smallest and not limit.expired():
            limit.reschedule(self._loop.time() + self._stall_s)
        arguments = (transport, limit, min(size, smallest))
        self._sweeper = self._loop.call_later(SWEEP_S, self._watch, *arguments)


class _Splice:
    """Chunks of one choice, of which only the middle is new: most tokens go this way."""

    __slots__ = ("_after", "_before", "_size", "_writer")

    def __init__(self, writer: SseWriter, before: bytes, after: bytes) -> None:
        self._writer = writer
        self._before = before
        self._after = after + b"\r\n"
        self._size = len(before) + len(after)

    def write(self, middle: bytes) -> None:
        transport = self._writer.room()
        size = self._size + len(middle)
        if transport is None or size >= len(_SIZES):
            self._writer.send(b"".join((self._before, middle, self._after[:-2])))
        else:
            transport.write(b"".join((_SIZES[size], self._before, middle, self._after)))


def _transport(request: web.Request) -> asyncio.Transport:
    transport = request.transport
    if transport is None or transport.is_closing():
        raise ConnectionResetError("the client is gone")
    return transport


def _untaken(transport: asyncio.Transport) -> int:
    """Bytes the client has not taken: ours, and those in the kernel. The kernel asks for more only
    after a third of its megabytes have gone, which a slow client may need minutes for."""
    size = transport.get_write_buffer_size()
    connection = transport.get_extra_info("socket")
    try:
        waiting = fcntl.ioctl(connection.fileno(), termios.TIOCOUTQ, bytes(4))
    except (OSError, AttributeError):
        return size
    return size + int.from_bytes(waiting, sys.byteorder)
