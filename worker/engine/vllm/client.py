"""HTTP to one vLLM server: its model list, its metrics, whole answers and streams.

Every failure leaves here as a `VllmError` that says whose it is. Closing a stream is how vLLM is
told to stop: it aborts what nobody reads. It knows no jobs.
"""

import errno
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from typing import Any, Final, Literal

import aiohttp
import msgspec

from worker.engine.vllm.wire import Answer, ErrorObject, EventLines, WireError, decode_answer

CONNECT_S: Final = 5.0
QUIET_S: Final = 300.0
"""An answer of which no byte comes for so long is lost, however lively the server is else."""
_KEEP_ALIVE_S: Final = 3.0
"""Less than vLLM's own 5 s: a request sent into a connection that it closes would fail."""
_NEVER_SERVED: Final = (401, 403, 404, 405)
_PASSING: Final = (
    errno.EMFILE,
    errno.ENFILE,
    errno.ENOBUFS,
    errno.ENOMEM,
    errno.ENETDOWN,
    errno.ENETUNREACH,
    errno.EHOSTUNREACH,
    errno.EADDRNOTAVAIL,
)
"""Our host or the way there is in trouble; that says nothing about the server."""
MAX_ERROR_CHARS: Final = 500

Fault = Literal["request", "context", "server", "gone", "silent"]
"""The request is bad; it is too long; vLLM failed at it; nobody listens there; no answer came."""


class VllmError(Exception):
    """One line, and whose fault it is."""

    def __init__(self, fault: Fault, message: str) -> None:
        super().__init__(message)
        self.fault: Fault = fault


class VllmClient:
    """Belongs to one event loop. `url` is the server's, without `/v1`."""

    def __init__(self, url: str, *, api_key: str = "", quiet_s: float = QUIET_S) -> None:
        self.url = url.rstrip("/").removesuffix("/v1")
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._session = aiohttp.ClientSession(
            headers=headers,
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=_KEEP_ALIVE_S),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_S, sock_read=quiet_s),
            read_bufsize=1 << 18,
        )

    async def close(self) -> None:
        await self._session.close()

    async def get(self, path: str, *, timeout_s: float) -> bytes:
        """Raises VllmError; its fault is the request's where no later try can help."""
        timeout = aiohttp.ClientTimeout(total=timeout_s)
        with _translated(self.url):
            async with self._session.get(self.url + path, timeout=timeout) as response:
                body = await response.read()
                if response.status in _NEVER_SERVED:
                    raise VllmError("request", f"{self.url}{path} answered {response.status}")
                if response.status != 200:
                    raise _refusal(response.status, body)
                return body

    async def complete(self, body: Mapping[str, Any], request_id: str) -> Answer:
        """A whole answer. Raises VllmError."""
        async with self._post(body, request_id) as response:
            with _translated(self.url):
                return decode_answer(await response.read())

    async def stream(
        self, body: Mapping[str, Any], request_id: str, take: Callable[[Answer], bool]
    ) -> None:
        """Give `take` each chunk as it comes; with True it has enough, and vLLM is made to stop.
        Else all is read to the very end, or the connection could serve no other request.
        Raises VllmError."""
        lines = EventLines()
        async with self._post(body, request_id) as response:
            with _translated(self.url):
                while data := await response.content.readany():
                    for payload in lines.feed(data):
                        chunk = decode_answer(payload)
                        if chunk.error is not None:
                            raise VllmError("server", _said(chunk.error))
                        if take(chunk):
                            return
        if not lines.is_done:
            raise VllmError("server", f"{self.url}: the stream ended before its end")

    @asynccontextmanager
    async def _post(
        self, body: Mapping[str, Any], request_id: str
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        headers = {"Content-Type": "application/json", "X-Request-Id": request_id}
        with _translated(self.url):
            response = await self._session.post(
                self.url + "/v1/completions", data=msgspec.json.encode(body), headers=headers
            )
        try:
            if response.status != 200:
                with _translated(self.url):
                    raise _refusal(response.status, await response.read())
            yield response
        finally:
            response.close()


@contextmanager
def _translated(url: str) -> Iterator[None]:
    """The library's errors as ours."""
    try:
        yield
    except TimeoutError:
        raise VllmError("silent", f"{url}: no answer in time") from None
    except aiohttp.ClientConnectorError as error:
        is_passing = isinstance(error, aiohttp.ClientConnectorDNSError)
        is_passing = is_passing or error.errno in _PASSING
        fault: Fault = "silent" if is_passing else "gone"
        raise VllmError(fault, f"{url}: {error.strerror or error}") from None
    except aiohttp.InvalidURL:
        raise VllmError("request", f"{url} is no URL") from None
    except aiohttp.ClientError as error:
        raise VllmError("server", f"{url}: {type(error).__name__} {error}") from None
    except WireError as error:
        raise VllmError("server", str(error)) from None


def _refusal(status: int, body: bytes) -> VllmError:
    """What a status other than 200 means."""
    try:
        error = decode_answer(body).error or ErrorObject()
    except WireError:
        error = ErrorObject(body[:MAX_ERROR_CHARS].decode(errors="replace"))
    message = f"vLLM answered {status}: {_said(error)}"
    if status in (400, 413, 422):
        fault: Fault = "context" if error.param in ("input_tokens", "max_tokens") else "request"
        return VllmError(fault, message)
    return VllmError("server", message)


def _said(error: ErrorObject) -> str:
    return " ".join(error.message.split())[:MAX_ERROR_CHARS] or "no reason given"
