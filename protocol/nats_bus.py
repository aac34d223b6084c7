"""The bus port on a NATS server. Only this file, `nats_client` and `nats_wire` know nats-py.

What nats-py leaves to us, and where it is done:
- Its connection closes for good on some server errors (revoked credentials), and its reconnecting
  dies, without a word, of an exception that it did not foresee: `_keep_open` makes a new one, for
  ever.
- A frozen server blocks its socket, and then its own reconnect: `Wire` leaves sockets at once.
- A `flush` that times out kills the connection when the answer comes late: we wait for a message
  to our own inbox instead.
- Its `unsubscribe` forgets what the server still sends us, its `drain` flushes: we go by steps.
- Its outbound bound suspends the publisher after the message was taken: we check before.
- It reads no more after a message that cannot be decoded: `HardyClient` drops that one.
- It may swallow a cancel while it connects (its `asyncio.wait_for` does, before Python 3.12, when
  the line it waits for comes in the same turn) and then connects for ever: `_stop` asks again.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from itertools import count
from secrets import token_hex
from typing import Final

from nats import errors
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription as NativeSubscription

from protocol.bus import BusEvent, Callback, Message
from protocol.delivery import Grumbler, Inlet, Notices, Requests
from protocol.errors import BusError, BusOverflow, BusTimeout, ConfigError, LocalError
from protocol.fragments import header_bytes, split
from protocol.nats_client import HardyClient, Malformed, send
from protocol.nats_config import NatsConfig as NatsConfig
from protocol.nats_config import connect_options, place
from protocol.nats_wire import Wire

_log: Final = logging.getLogger("baton.bus")
_PROTOCOL_LINE: Final = 64
"""What a PUB line takes beside subject and reply, generously."""
_STILL_AFTER: Final = 10
"""Connecting stands still if it tries no address for so many times the connect timeout. One
attempt takes up to five: TCP, TLS, and three lines."""


@dataclass(slots=True, eq=False)
class _Subscription:
    """What was subscribed, so that it can be again on another connection."""

    inlet: Inlet
    queue: str
    max_pending: int
    max_pending_bytes: int
    forget: Callable[["_Subscription"], None]
    flush: Callable[..., Awaitable[None]]
    client: Client | None = None
    native: NativeSubscription | None = field(default=None)

    async def close(self) -> None:
        self.inlet.close()
        self.forget(self)
        native, self.native = self.native, None
        if native is not None:
            try:
                await native.unsubscribe()
            except (errors.Error, OSError):
                pass  # The connection is closed, and the subscription with it.

    async def drain(self, *, timeout_s: float) -> None:
        client, native = self.client, self.native
        if client is not None and native is not None and client.is_connected:
            try:
                async with asyncio.timeout(timeout_s):
                    await client._send_unsubscribe(native._id)
                    await self.flush(timeout_s=timeout_s)
                    while native.pending_msgs:  # noqa: ASYNC110  They are here; their turn comes.
                        await asyncio.sleep(0)
            except (TimeoutError, BusError, errors.Error, OSError):
                pass  # The connection went, and what was on its way with it.
        await self.close()


class NatsBus:
    """See `protocol.bus.Bus`. Belongs to one event loop; `start` it before anything else."""

    def __init__(self, config: NatsConfig) -> None:
        self._config = config
        self._notices = Notices()
        self._requests = Requests(f"{config.inbox_prefix}.{token_hex(8)}")
        self._subscriptions: set[_Subscription] = set()
        self._malformed = Malformed()
        self._client: HardyClient | None = None
        self._wire: Wire | None = None
        self._keeper: asyncio.Task[None] | None = None
        self._leaving: set[asyncio.Task[None]] = set()
        """Held, because the loop does not promise to."""
        self._up = False
        self._closed = False
        self._still_s = _STILL_AFTER * config.connect_timeout_s + config.reconnect_wait_s
        self._grumbler = Grumbler()
        self._part_ids = (f"{token_hex(6)}.{number}" for number in count())

    @property
    def connected(self) -> bool:
        return self._up and self._client is not None and self._client.is_connected

    @property
    def lost(self) -> int:
        return self._notices.lost

    @property
    def num_malformed(self) -> int:
        """Messages that were dropped because subject, reply or headers are none."""
        return self._malformed.number

    def on_event(self, callback: Callable[[BusEvent], None]) -> None:
        self._notices.on_event(callback)

    async def start(self) -> None:
        """As the port says. Raises ConfigError for what waiting cannot heal (missing files)."""
        if self._keeper is not None or self._closed:
            raise LocalError("a bus is started once")
        await self.subscribe(self._requests.subject, self._requests.on_reply)
        while not await self._try_open():  # noqa: ASYNC110  a try is no event
            await asyncio.sleep(self._config.reconnect_wait_s)
        self._keeper = asyncio.create_task(self._keep_open(), name="bus-keeper")

    def publish(
        self,
        subject: str,
        payload: bytes,
        *,
        reply: str = "",
        headers: Mapping[str, str] | None = None,
    ) -> None:
        client = self._client
        if self._closed:
            raise BusError("the bus is closed")
        if client is None or client.is_closed:
            raise BusOverflow("there is no connection, and no buffer until there is one")
        size = len(payload) + header_bytes(headers)
        if client.pending_data_size + size + _PROTOCOL_LINE > self._config.pending_bytes:
            raise BusOverflow(f"{client.pending_data_size} bytes wait for the server")
        if size <= client.max_payload:
            send(client, subject, payload, reply, headers)
            return
        parts = split(
            payload, headers, max_payload=client.max_payload, part_id=next(self._part_ids)
        )
        for part, part_headers in parts:
            send(client, subject, part, reply, part_headers)
            reply = ""

    async def subscribe(
        self,
        subject: str,
        callback: Callback,
        *,
        queue: str = "",
        max_pending: int = 65_536,
        max_pending_bytes: int = 256 << 20,
    ) -> _Subscription:
        """As the port says. While the server is there, it knows the subscription on return."""
        if self._closed:
            raise BusError("the bus is closed")
        inlet = Inlet(subject, callback, self._notices, max_bytes=max_pending_bytes)
        subscription = _Subscription(
            inlet, queue, max_pending, max_pending_bytes, self._subscriptions.discard, self.flush
        )
        self._subscriptions.add(subscription)
        if self._client is not None:
            await self._bind(subscription, self._client)
            if self.connected:
                try:
                    await self.flush(timeout_s=self._config.connect_timeout_s)
                except (BusTimeout, BusOverflow):
                    pass  # The next connection will have it.
        return subscription

    async def request(self, subject: str, payload: bytes, *, timeout_s: float) -> Message:
        return await self._requests.ask(self._publish, subject, payload, timeout_s)

    async def flush(self, *, timeout_s: float) -> None:
        await self._requests.echo(self._publish, timeout_s)

    async def close(self) -> None:
        if self._closed:
            return
        if self._keeper is not None:
            await _stop(self._keeper)
        if self.connected:
            try:
                await self.flush(timeout_s=self._config.close_timeout_s)
            except BusError:
                _log.warning("bus closed without knowing that everything was sent")
        self._closed = True
        self._requests.fail_all(BusError("the bus is closed"))
        for subscription in self._subscriptions:
            subscription.inlet.close()
        await self._leave()
        self._up = False

    def _publish(self, subject: str, payload: bytes, reply: str) -> None:
        self.publish(subject, payload, reply=reply)

    async def _open(self) -> None:
        """Connect, for as long as it takes, and subscribe to everything again."""
        await self._leave()
        client = HardyClient(self._malformed.drop)
        try:
            options = connect_options(self._config)
            self._wire = client._transport = Wire(tls_only="tls" in options)
            connecting = asyncio.ensure_future(
                client.connect(
                    error_cb=self._on_error,
                    disconnected_cb=self._on_down,
                    reconnected_cb=self._on_up,
                    **options,
                )
            )
            try:
                while not (await asyncio.wait([connecting], timeout=self._still_s))[0]:
                    if self._wire.still_s() > self._still_s:
                        await _stop(connecting)
                        raise RuntimeError("connecting stands still")
            except asyncio.CancelledError:
                self._client = client  # it may have connected all the same: `close` leaves it
                try:
                    await _stop(connecting)
                finally:
                    self._wire.abandon()
                raise
            connecting.result()
        except (errors.Error, OSError, ImportError, ValueError) as error:
            raise ConfigError(f"bus: {error}") from error
        self._client = client
        for subscription in list(self._subscriptions):
            await self._bind(subscription, client)
        await self._on_up()

    async def _try_open(self) -> bool:
        """`_open`. False if it failed of what neither nats-py nor we foresaw."""
        try:
            await self._open()
        except (ConfigError, LocalError):
            raise
        except Exception as error:
            if self._wire is None or not self._wire.is_tried:
                raise ConfigError(f"bus: {error!r}") from error  # before any server was asked
            self._complain(f"unforeseen, trying again: {error!r}")
            await self._leave()
            return False
        return True

    async def _leave(self) -> None:
        """Drop the connection, whatever state it is in."""
        client, self._client = self._client, None
        if self._wire is not None:
            self._wire.abandon()
        if client is None:
            return
        try:
            reconnecting = client.reconnecting
            if reconnecting is not None:
                # On its own: it has to end even if we are cancelled here, or will wait no longer.
                stopping = asyncio.create_task(_stop(reconnecting), name="bus-leave")
                self._leaving.add(stopping)
                stopping.add_done_callback(self._leaving.discard)
                await asyncio.wait([stopping], timeout=self._config.close_timeout_s)
        finally:
            await self._close(client)

    async def _close(self, client: Client) -> None:
        try:
            async with asyncio.timeout(self._config.close_timeout_s):
                await client.close()
        except Exception as error:  # noqa: BLE001  it is of no use any more, whatever it says
            _log.warning("bus: while closing: %r", error)
        for _ in range(3):  # What nats-py has cancelled needs turns of the loop to end.
            await asyncio.sleep(0)

    async def _keep_open(self) -> None:
        """nats-py reconnects by itself, but gives up on some errors and dies of others. Not we."""
        now = asyncio.get_running_loop().time
        alive_at = now()
        while True:
            await asyncio.sleep(self._config.ping_interval_s)
            if self.connected:
                alive_at = now()
            elif self._is_given_up(down_s=now() - alive_at):
                await self._on_down()
                try:
                    await self._try_open()
                except (ConfigError, LocalError) as error:
                    await self._on_error(error)
                    await self._leave()  # nor is half a connection one
                alive_at = now()

    def _is_given_up(self, *, down_s: float) -> bool:
        """Whether nobody will connect our client again."""
        client = self._client
        if client is None or client.is_closed or self._wire is None:
            return True
        reconnecting = client.reconnecting
        if reconnecting is not None and reconnecting.done():
            died_of = None if reconnecting.cancelled() else reconnecting.exception()
            self._complain(f"reconnecting has died: {died_of!r}")
            return True
        if min(down_s, self._wire.still_s()) > self._still_s:
            self._complain("reconnecting stands still")
            return True
        return False

    async def _bind(self, subscription: _Subscription, client: Client) -> None:
        if subscription.client is client:
            return
        subscription.client = client
        try:
            subscription.native = await client.subscribe(
                subscription.inlet.subject,
                queue=subscription.queue,
                cb=_receiver(subscription.inlet),
                pending_msgs_limit=subscription.max_pending,
                pending_bytes_limit=subscription.max_pending_bytes,
            )
        except errors.BadSubjectError:
            self._subscriptions.discard(subscription)
            raise LocalError(f"{subscription.inlet.subject!r} is no subject") from None
        except errors.Error:
            subscription.client = None  # Closed meanwhile: the next connection will have it.

    async def _on_up(self) -> None:
        if self._up or self._closed:
            return
        self._up = True
        self._grumbler.reset()
        url = self._client.connected_url if self._client is not None else None
        _log.info("bus up: %s", url.netloc.rpartition("@")[2] if url is not None else "")
        self._notices.emit(BusEvent("up"))

    async def _on_down(self) -> None:
        if not self._up or self._closed:
            return
        self._up = False
        _log.warning("bus down; reconnecting")
        self._notices.emit(BusEvent("down"))

    async def _on_error(self, error: Exception) -> None:
        """nats-py's word on anything that went wrong: slow subscriptions, failed attempts."""
        if isinstance(error, errors.SlowConsumerError):
            self._notices.report_lost(error.sub.subject, 1)
            return
        if self._closed:
            return
        text = str(error) or type(error).__name__
        if "authorization violation" in text.lower():
            text = "the server refuses our credentials"
        self._complain(text)

    def _complain(self, text: str) -> None:
        where = ", ".join(map(place, self._config.urls))
        self._grumbler.complain(f"bus at {where}: {text}", asyncio.get_running_loop().time())


async def _stop(task: asyncio.Future[None]) -> None:
    """Cancel it until it has ended, however it ends and whoever cancels us meanwhile."""
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        task.cancel()
        try:
            await asyncio.wait([task], timeout=0.5)
        except asyncio.CancelledError as error:
            cancelled = error
    if not task.cancelled():
        task.exception()  # Nobody is left to whom it would matter.
    if cancelled is not None:
        raise cancelled


def _receiver(inlet: Inlet) -> Callable[[Msg], Awaitable[None]]:
    async def receive(msg: Msg) -> None:
        headers = msg.headers
        nobody = headers is not None and not msg.data and headers.get("Status") == "503"
        inlet.feed(Message(msg.subject, msg.data, msg.reply, headers, nobody))

    return receive
