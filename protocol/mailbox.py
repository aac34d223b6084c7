"""One envelope per destination per turn of the loop.

What is posted during one turn of the event loop leaves as one message for each destination when the
turn is over. `lazy` posts do not cause a message of their own at once: they ride with the next
envelope to their destination, or leave after `lazy_s`. Knows the bus port, not what an envelope is.
"""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from protocol.bus import Bus
from protocol.errors import BusError

T = TypeVar("T")


@dataclass(slots=True)
class _Box(Generic[T]):
    """What waits for one destination."""

    reply: str = ""
    messages: list[T] = field(default_factory=list)


class Mailer(Generic[T]):
    """Collects messages and sends envelopes. Belongs to one event loop.

    `envelope(subject, messages)` makes the bytes, and may number them: a number is used up even if
    the bus then refuses the envelope, so that the reader sees the gap. `on_overflow(subject,
    messages)` is told what the bus refused; it may post again, lazily. An envelope has at most
    `max_messages` messages: a fuller box leaves at once, so nothing grows within a turn.
    """

    def __init__(
        self,
        bus: Bus,
        *,
        envelope: Callable[[str, list[T]], bytes],
        on_overflow: Callable[[str, list[T]], None],
        lazy_s: float = 0.05,
        max_messages: int = 4096,
    ) -> None:
        self._bus = bus
        self._envelope = envelope
        self._on_overflow = on_overflow
        self._lazy_s = lazy_s
        self._max_messages = max_messages
        self._loop = asyncio.get_running_loop()
        self._boxes: dict[str, _Box[T]] = {}
        self._urgent: dict[str, None] = {}
        self._turn: asyncio.Handle | None = None
        self._timer: asyncio.TimerHandle | None = None

    def __len__(self) -> int:
        """Messages that wait."""
        return sum(len(box.messages) for box in self._boxes.values())

    def post(self, subject: str, message: T, *, reply: str = "", lazy: bool = False) -> None:
        """Send `message` to `subject`, in order with what was posted there before.

        An envelope has one reply subject; a post with another one starts another envelope.
        """
        box = self._boxes.get(subject)
        if box is not None and reply and box.reply and reply != box.reply:
            self._send(subject)
            box = None
        if box is None:
            box = self._boxes[subject] = _Box()
        box.reply = box.reply or reply
        box.messages.append(message)
        if len(box.messages) >= self._max_messages:
            self._send(subject)
            self._settle()
        elif not lazy:
            self._urgent[subject] = None
            if self._turn is None:
                self._turn = self._loop.call_soon(self._flush)
        elif subject not in self._urgent and self._timer is None:
            self._timer = self._loop.call_later(self._lazy_s, self._on_timer)

    def flush_now(self) -> None:
        """Send everything that waits, lazy messages included."""
        self._urgent.update(dict.fromkeys(self._boxes))
        self._flush()

    def _on_timer(self) -> None:
        self._timer = None
        self.flush_now()

    def _flush(self) -> None:
        if self._turn is not None:
            self._turn.cancel()
            self._turn = None
        urgent, self._urgent = self._urgent, {}
        try:
            while urgent:
                subject = next(iter(urgent))
                del urgent[subject]
                self._send(subject)
        finally:
            # Only a bug in `envelope` or `on_overflow` leaves some: the others still get theirs.
            if urgent:
                self._urgent.update(urgent)
                self._turn = self._turn or self._loop.call_soon(self._flush)
            self._settle()

    def _settle(self) -> None:
        """The timer runs only while something lazy waits."""
        if self._timer is not None and not (self._boxes.keys() - self._urgent.keys()):
            self._timer.cancel()
            self._timer = None

    def _send(self, subject: str) -> None:
        self._urgent.pop(subject, None)
        box = self._boxes.pop(subject, None)
        if box is None:
            return
        try:
            self._bus.publish(subject, self._envelope(subject, box.messages), reply=box.reply)
        except BusError:
            self._on_overflow(subject, box.messages)
