"""The socket under `protocol.nats_bus`: what nats-py's own lacks."""

import asyncio
import ssl
from typing import Any

from nats.aio.transport import TcpTransport


class _Gone(ConnectionResetError, RuntimeError):
    """The connection is closed. nats-py's reconnecting goes on after an OSError only; its pings
    end in silence, and leave the rest to who reads, after a RuntimeError only."""

    def __init__(self) -> None:
        # uvloop's own words hold an address, and would be news to the log each time.
        super().__init__("the connection was reset")


class Wire(TcpTransport):
    """nats-py's socket, made safe to leave and unable to speak plain text where TLS is asked for.

    Leaving never waits: what a frozen server has not taken is thrown away. nats-py leaves a socket
    only after a flush or when it is of no use any more, so nothing is lost that could be saved.

    A transport of uvloop that the server has reset raises RuntimeError where asyncio's says nothing
    until `drain`. nats-py does not expect that, and never connected again: it is `_Gone` here.
    """

    def __init__(self, *, tls_only: bool) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._tls_only = tls_only
        self._secure = False
        self._abandoned = False
        self._tried_at = float("-inf")

    @property
    def is_tried(self) -> bool:
        """Whether any server was asked yet."""
        return self._tried_at > float("-inf")

    def still_s(self) -> float:
        """How long ago nats-py last tried to connect."""
        return asyncio.get_running_loop().time() - self._tried_at

    async def connect(self, uri: Any, buffer_size: int, connect_timeout: int) -> None:
        if self._abandoned:
            raise ConnectionError("this connection was left")
        self._tried_at = asyncio.get_running_loop().time()
        self.close()
        self._secure = False
        await super().connect(uri, buffer_size, connect_timeout)

    async def connect_tls(
        self, uri: Any, ssl_context: ssl.SSLContext, buffer_size: int, connect_timeout: int
    ) -> None:
        if self._io_writer is not None and self._io_writer.is_closing():
            raise _Gone  # uvloop says nothing here, and waits until the time is up
        try:
            await super().connect_tls(uri, ssl_context, buffer_size, connect_timeout)
        except RuntimeError as error:
            raise _Gone from error
        self._secure = True

    def write(self, payload: bytes) -> None:
        if self._tls_only and not self._secure:
            raise ConnectionError("the server offers no TLS")
        if self._abandoned:
            return
        try:
            super().write(payload)  # type: ignore[no-untyped-call]
        except RuntimeError as error:
            raise _Gone from error

    def writelines(self, payload: list[bytes]) -> None:
        if self._abandoned:
            return
        try:
            super().writelines(payload)  # type: ignore[no-untyped-call]
        except RuntimeError as error:
            raise _Gone from error

    async def drain(self) -> None:
        if not self._abandoned:
            await super().drain()  # type: ignore[no-untyped-call]

    def close(self) -> None:
        if self._io_writer is not None:
            self._io_writer.transport.abort()

    async def wait_closed(self) -> None:
        """At once. A transport that was reset as its TLS began would never say that it is closed,
        and nats-py waits here without a bound."""

    def abandon(self) -> None:
        """From here on everything written is thrown away and nothing waits."""
        self._abandoned = True
        self.close()

    def __bool__(self) -> bool:
        return True
