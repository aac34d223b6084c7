"""The bus port: what Baton needs of a message bus, and what it may not expect.

Promised: messages of one publisher on one subject arrive in order, at most once. Not promised: that
they arrive. A subscriber that is slow, a reconnect or a full buffer loses messages; the bus says so
when it knows (`BusEvent`), and everything above it can ask again (sequence numbers, replay).
Payloads of any size pass: the adapter splits and joins what the server would refuse.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

from msgspec import Struct


class Message(Struct, frozen=True, gc=False):
    """One delivered message."""

    subject: str
    payload: bytes
    reply: str = ""
    headers: Mapping[str, str] | None = None
    no_responders: bool = False
    """Not a message: the bus says that nobody listened on the subject whose reply this is."""


Callback = Callable[[Message], None]
"""Called on the loop, one message after the other. Must not block; its exceptions are logged."""


@dataclass(frozen=True, slots=True)
class BusEvent:
    """`up` after (re)connecting, `down` when the connection is lost, `lost` when messages were."""

    kind: Literal["up", "down", "lost"]
    subject: str = ""
    """For `lost`: the subscription that dropped messages."""
    count: int = 0


class Subscription(Protocol):
    async def close(self) -> None:
        """No callback is called afterwards."""

    async def drain(self, *, timeout_s: float) -> None:
        """Close, but deliver first what the bus had already sent here: a queue group that loses
        this member loses no message. After `timeout_s`, or without a connection, only close."""


class Bus(Protocol):
    """A connection to the bus. It reconnects for ever; nothing exits because the bus is away."""

    @property
    def connected(self) -> bool: ...

    @property
    def lost(self) -> int:
        """Messages this side knows to have lost (slow subscriptions, incomplete joins)."""

    @property
    def num_malformed(self) -> int:
        """Messages that were dropped because they are none, whoever sent them."""

    async def start(self) -> None:
        """Connect; while the server is away keep trying, saying so in the log. Cancellable."""

    def on_event(self, callback: Callable[[BusEvent], None]) -> None:
        """Be told of `BusEvent`s, on the loop."""

    def publish(
        self,
        subject: str,
        payload: bytes,
        *,
        reply: str = "",
        headers: Mapping[str, str] | None = None,
    ) -> None:
        """Send without waiting. If nobody listens and `reply` is set, a message with
        `no_responders` arrives on `reply`. Raises BusOverflow if the outbound buffer is full."""

    async def subscribe(
        self,
        subject: str,
        callback: Callback,
        *,
        queue: str = "",
        max_pending: int = 65_536,
        max_pending_bytes: int = 256 << 20,
    ) -> Subscription:
        """Deliver messages on `subject` (wildcards `*` and `>`). Beyond the limits messages are
        dropped and reported as a `lost` event."""

    async def request(self, subject: str, payload: bytes, *, timeout_s: float) -> Message:
        """Send and wait for one reply. Raises NoResponders, BusTimeout, BusOverflow."""

    async def flush(self, *, timeout_s: float) -> None:
        """Wait until the server has all that was published. Raises BusTimeout."""

    async def close(self) -> None:
        """Send what is buffered if the server is there (bounded wait), then disconnect."""
