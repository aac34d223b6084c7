"""Calls to etcd over gRPC: end points in turn, tokens, time limits, and errors in our own words.

It must not know what the calls are for. Every call is one try (two if the token was stale); a
failure turns to the next end point. An end point that fails three times in a row gets a fresh
connection: a dead one, of which nobody told us, would swallow calls for many minutes.
"""

import asyncio
import logging
import os
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from discovery import etcd_pb2 as pb
from discovery.etcd_config import EtcdConfig, split_endpoint
from discovery.store import LeaseGone, StoreDenied, StoreError, StoreUnavailable

# gRPC prints every failed TLS handshake to stderr; it reads this once, when it is imported. Whoever
# set it, or imported gRPC before, keeps what they chose; the environment is left as it was.
_QUIET = "GRPC_VERBOSITY" not in os.environ
if _QUIET:
    os.environ["GRPC_VERBOSITY"] = "NONE"
import grpc  # noqa: E402
import grpc.aio  # noqa: E402

if _QUIET:
    del os.environ["GRPC_VERBOSITY"]

logger = logging.getLogger(__name__)

OPTIONS: list[tuple[str, int]] = [
    ("grpc.enable_http_proxy", 0),
    ("grpc.max_receive_message_length", -1),
    # After an outage of 40 s the defaults need 22 s to come back: longer than a lease.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 1000),
    ("grpc.max_reconnect_backoff_ms", 1000),
    # A fresh channel must mean a fresh connection.
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
]
FAILURES_BEFORE_RECONNECT = 3
STALE_TOKEN = ("invalid auth token", "revision of auth store is old", "user name is empty")
NO_AUTH = "authentication is not enabled"
END = grpc.aio.EOF
HAS_LEADER = ("hasleader", "true")
UNAVAILABLE_CODES = frozenset(
    {
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.DEADLINE_EXCEEDED,
        grpc.StatusCode.CANCELLED,
        grpc.StatusCode.ABORTED,
        grpc.StatusCode.INTERNAL,
        grpc.StatusCode.UNKNOWN,
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        grpc.StatusCode.DATA_LOSS,
    }
)

Metadata = tuple[tuple[str, str], ...]


class Message(Protocol):
    """A protobuf message, as far as a call needs it."""

    def SerializeToString(self) -> bytes:  # noqa: N802
        """The bytes for the wire."""
        ...


class Method(NamedTuple):
    """A method of etcd's API and how to read its answer."""

    path: str
    answer: Any


RANGE = Method("/etcdserverpb.KV/Range", pb.RangeResponse)
TXN = Method("/etcdserverpb.KV/Txn", pb.TxnResponse)
WATCH = Method("/etcdserverpb.Watch/Watch", pb.WatchResponse)
GRANT = Method("/etcdserverpb.Lease/LeaseGrant", pb.LeaseGrantResponse)
REVOKE = Method("/etcdserverpb.Lease/LeaseRevoke", pb.LeaseRevokeResponse)
KEEP_ALIVE = Method("/etcdserverpb.Lease/LeaseKeepAlive", pb.LeaseKeepAliveResponse)
AUTHENTICATE = Method("/etcdserverpb.Auth/Authenticate", pb.AuthenticateResponse)


class StaleToken(StoreError):
    """etcd does not know our token (any more)."""


class Link:
    """One end point and its present connection."""

    def __init__(self, endpoint: str, connect: Callable[[str], Any]) -> None:
        self.endpoint = endpoint
        self._connect = connect
        self.num_failures = 0
        self.channel: Any = None

    def open(self) -> Any:
        """The connection; made when first needed. Raises `StoreDenied` if our files are unfit."""
        if self.channel is None:
            try:
                self.channel = self._connect(self.endpoint)
            except OSError as error:
                raise StoreDenied(f"{self.endpoint}: {error}") from error
        return self.channel

    async def drop(self) -> None:
        """Close the connection; the next call makes a new one. Its open calls fail."""
        channel, self.channel = self.channel, None
        if channel is not None:
            await channel.close()


class EtcdChannel:
    """All connections of one process to one etcd cluster. Belongs to one event loop."""

    def __init__(self, config: EtcdConfig) -> None:
        self._config = config
        self._links = [Link(endpoint, self._connect) for endpoint in config.endpoints]
        self._index = 0
        self._token: str | None = None
        self._login = asyncio.Lock()
        self._warned_no_auth = False
        self._closed = False

    async def call(self, method: Method, request: Message) -> Any:
        """One unary call. Raises `StoreUnavailable`, `StoreDenied`, `LeaseGone`."""

        async def unary(link: Link, metadata: Metadata) -> Any:
            send = link.open().unary_unary(
                method.path,
                request_serializer=_serialize,
                response_deserializer=method.answer.FromString,
            )
            return await send(request, timeout=self._config.call_timeout_s, metadata=metadata)

        return await self._with_token(unary)

    async def exchange(self, method: Method, request: Message) -> Any:
        """The first answer of a streaming method to one request. Raises as `call`."""

        async def first_answer(link: Link, metadata: Metadata) -> Any:
            stream = _stream(link, method, metadata, self._config.call_timeout_s)
            try:
                await stream.write(request)
                answer = await stream.read()
                if answer is not END:
                    await stream.done_writing()
                    await stream.read()  # the regular end
                    return answer
                await _raise_status(stream)
            finally:
                stream.cancel()

        return await self._with_token(first_answer)

    @asynccontextmanager
    async def stream(self, method: Method) -> AsyncIterator[Any]:
        """An open stream without a time limit. Errors inside the block are translated."""
        link = self._link
        metadata = (*await self._metadata(), HAS_LEADER)
        async with self._translated(link):
            stream = _stream(link, method, metadata, None)
            try:
                yield stream
            finally:
                stream.cancel()

    async def close(self) -> None:
        """Close all connections; open calls fail."""
        self._closed = True
        for link in self._links:
            await link.drop()

    @property
    def _link(self) -> Link:
        if self._closed:
            raise StoreUnavailable("closed")
        return self._links[self._index]

    async def _with_token(self, work: Callable[[Link, Metadata], Any]) -> Any:
        try:
            return await self._try(work, await self._metadata())
        except StaleToken:
            self._token = None
        try:
            return await self._try(work, await self._metadata())
        except StaleToken as error:
            raise StoreDenied(f"not logged in: {error}") from error

    async def _try(self, work: Callable[[Link, Metadata], Any], metadata: Metadata) -> Any:
        link = self._link
        async with self._translated(link):
            answer = await work(link, metadata)
            link.num_failures = 0
            return answer

    async def _metadata(self) -> Metadata:
        if not self._config.username:
            return ()
        async with self._login:
            if self._token is None:
                self._token = await self._authenticate()
            return (("token", self._token),) if self._token else ()

    async def _authenticate(self) -> str:
        request = pb.AuthenticateRequest(name=self._config.username, password=self._config.password)

        async def ask(link: Link, metadata: Metadata) -> Any:
            send = link.open().unary_unary(
                AUTHENTICATE.path,
                request_serializer=_serialize,
                response_deserializer=AUTHENTICATE.answer.FromString,
            )
            return await send(request, timeout=self._config.call_timeout_s, metadata=metadata)

        try:
            return str((await self._try(ask, ())).token)
        except StoreDenied as error:
            if NO_AUTH not in str(error):
                raise
            if not self._warned_no_auth:
                logger.warning("etcd asks for no user: going on without one")
                self._warned_no_auth = True
            return ""

    @asynccontextmanager
    async def _translated(self, link: Link) -> AsyncIterator[None]:
        try:
            yield
        except grpc.aio.AioRpcError as error:
            trouble = _translate(link.endpoint, error.code(), error.details() or "")
        except grpc.aio.UsageError as error:  # the channel was closed under us
            trouble = StoreUnavailable(f"{link.endpoint}: {error}")
        except asyncio.InvalidStateError as error:
            trouble = StoreUnavailable(f"{link.endpoint}: {error}")
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            # Nobody cancelled this task: the call lost its channel.
            trouble = StoreUnavailable(f"{link.endpoint}: connection closed")
        except StoreUnavailable as error:
            trouble = error
        else:
            return
        if isinstance(trouble, StoreUnavailable):
            await self._failed(link)
        raise trouble

    async def _failed(self, link: Link) -> None:
        link.num_failures += 1
        if self._links[self._index] is link:
            self._index = (self._index + 1) % len(self._links)
        if link.num_failures % FAILURES_BEFORE_RECONNECT == 0:
            await link.drop()

    def _connect(self, endpoint: str) -> Any:
        secure, address = split_endpoint(endpoint)
        if not secure:
            return grpc.aio.insecure_channel(address, options=OPTIONS)
        # Read anew for every connection: certificates are renewed while we live.
        credentials = grpc.ssl_channel_credentials(
            _read(self._config.ca_cert), _read(self._config.key), _read(self._config.cert)
        )
        return grpc.aio.secure_channel(address, credentials, options=OPTIONS)


def _read(path: str) -> bytes | None:
    return Path(path).read_bytes() if path else None


def _serialize(message: Message) -> bytes:
    return message.SerializeToString()


def _stream(link: Link, method: Method, metadata: Metadata, timeout_s: float | None) -> Any:
    make = link.open().stream_stream(
        method.path,
        request_serializer=_serialize,
        response_deserializer=method.answer.FromString,
    )
    return make(timeout=timeout_s, metadata=metadata)


async def _raise_status(stream: Any) -> None:
    code, details = await stream.code(), await stream.details()
    raise StoreUnavailable(f"stream ended: {code.name} {details}")


def _translate(endpoint: str, code: Any, details: str) -> StoreError:
    if any(phrase in details for phrase in STALE_TOKEN):
        return StaleToken(details)
    if "lease not found" in details:
        return LeaseGone(details)
    text = f"{endpoint}: {code.name} {details}"
    if code in UNAVAILABLE_CODES:
        return StoreUnavailable(text)
    return StoreDenied(text)
