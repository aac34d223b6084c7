"""The bus port without a server: for tests, simulations and single-process use.

As strict as the real one: the same payload limit, parts, queue groups, "no responders", outbound
bound and drops; and it can be broken on purpose. `MemoryHub` is the server, `MemoryBus` one
connection to it. All of one hub lives on one event loop.
"""

import asyncio
import logging
import random
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from itertools import count
from typing import Final

from protocol.bus import BusEvent, Callback, Message
from protocol.delivery import Inlet, Notices, Requests
from protocol.errors import BusError, BusOverflow, BusTimeout, LocalError
from protocol.fragments import header_bytes, split

_log: Final = logging.getLogger("baton.bus")


class MemoryHub:
    """What a server does between connections, and the faults it may have.

    `detect_s` is how long a frozen hub is taken for a slow one.
    """

    def __init__(
        self,
        *,
        max_payload: int = 1 << 20,
        detect_s: float = 3.0,
        rng: random.Random | None = None,
    ) -> None:
        self.max_payload = max_payload
        self.detect_s = detect_s
        self.is_up = True
        self.is_frozen = False
        self._rng = rng or random.Random(0)
        self._buses: list[MemoryBus] = []
        self._drops: list[tuple[str, int]] = []
        self._names = count(1)
        self._detector: asyncio.TimerHandle | None = None

    def down(self) -> None:
        """The server dies: what was not delivered to a connection is lost."""
        self.is_up = False
        for bus in self._buses:
            bus._leave()

    def up(self) -> None:
        """The server is back, and every connection with it."""
        self.is_up, self.is_frozen = True, False
        if self._detector is not None:
            self._detector.cancel()
        for bus in self._buses:
            bus._join()

    def freeze(self) -> None:
        """The server stands still; connections find out after `detect_s`. `up` ends it."""
        self.is_frozen = True
        self._detector = asyncio.get_running_loop().call_later(self.detect_s, self.down)

    def drop_next(self, number: int, subject: str = ">") -> None:
        """The next `number` messages on `subject` (wildcards allowed) vanish without a word."""
        self._drops.append((subject, number))

    def _attach(self, bus: "MemoryBus") -> str:
        self._buses.append(bus)
        return f"_INBOX.{next(self._names)}"

    def _detach(self, bus: "MemoryBus") -> None:
        self._buses.remove(bus)

    def _route(self, sender: "MemoryBus", message: Message) -> None:
        if self._is_dropped(message.subject):
            return
        groups: dict[str, list[_Subscription]] = {}
        plain: list[_Subscription] = []
        for bus in self._buses:
            for subscription in bus._matching(message.subject):
                if subscription.queue:
                    groups.setdefault(subscription.queue, []).append(subscription)
                else:
                    plain.append(subscription)
        chosen = plain + [self._rng.choice(members) for members in groups.values()]
        for subscription in chosen:
            subscription.receive(message)
        if message.reply and not chosen:
            headers = {"Status": "503"}
            nobody = Message(message.reply, b"", headers=headers, no_responders=True)
            for subscription in sender._matching(message.reply):
                subscription.receive(nobody)

    def _is_dropped(self, subject: str) -> bool:
        for index, (pattern, number) in enumerate(self._drops):
            if matches(pattern, subject):
                if number == 1:
                    del self._drops[index]
                else:
                    self._drops[index] = (pattern, number - 1)
                return True
        return False


class _Subscription:
    """One subscription and the messages that wait for their turn on the loop."""

    def __init__(
        self,
        inlet: Inlet,
        queue: str,
        limits: tuple[int, int],
        notices: Notices,
        forget: "Callable[[_Subscription], None]",
    ) -> None:
        self.inlet = inlet
        self.queue = queue
        self._max_pending, self._max_pending_bytes = limits
        self._notices = notices
        self._forget = forget
        self._pending: deque[Message] = deque()
        self._pending_bytes = 0

    def receive(self, message: Message) -> None:
        size = len(message.payload)
        full = len(self._pending) >= self._max_pending
        if full or self._pending_bytes + size >= self._max_pending_bytes:
            self._notices.report_lost(self.inlet.subject, 1)
            return
        if not self._pending:
            asyncio.get_running_loop().call_soon(self._drain)
        self._pending.append(message)
        self._pending_bytes += size

    async def drain(self, *, timeout_s: float) -> None:
        self._forget(self)
        while self._pending and not self.inlet.closed:  # noqa: ASYNC110  each turn delivers some
            await asyncio.sleep(0)
        await self.close()

    async def close(self) -> None:
        if not self.inlet.closed:
            self.inlet.close()
            self._forget(self)
            self._pending.clear()

    def _drain(self) -> None:
        """Only what is here now: what callbacks publish comes with the next turn."""
        for _ in range(len(self._pending)):
            if not self._pending:
                return
            message = self._pending.popleft()
            self._pending_bytes -= len(message.payload)
            self.inlet.feed(message)
        if self._pending:
            asyncio.get_running_loop().call_soon(self._drain)


class MemoryBus:
    """See `protocol.bus.Bus`."""

    def __init__(
        self, hub: MemoryHub, *, pending_bytes: int = 64 << 20, close_timeout_s: float = 2.0
    ) -> None:
        self._hub = hub
        self._pending_bytes = pending_bytes
        self._close_timeout_s = close_timeout_s
        self._notices = Notices()
        self._subscriptions: list[_Subscription] = []
        self._outbound: deque[Message] = deque()
        self._outbound_bytes = 0
        self._sending: asyncio.Handle | None = None
        self._here = asyncio.Event()
        self._started = self._closed = False
        prefix = hub._attach(self)
        self._requests = Requests(prefix)
        self._part_ids = (f"{prefix[7:]}.{number}" for number in count())

    @property
    def connected(self) -> bool:
        return self._here.is_set()

    @property
    def lost(self) -> int:
        return self._notices.lost

    @property
    def num_malformed(self) -> int:
        return 0

    def on_event(self, callback: Callable[[BusEvent], None]) -> None:
        self._notices.on_event(callback)

    async def start(self) -> None:
        if self._started or self._closed:
            raise LocalError("a bus is started once")
        self._started = True
        self._add(self._requests.subject, self._requests.on_reply, "", (65_536, 256 << 20))
        if self._hub.is_up and not self._hub.is_frozen:
            self._join()
        else:
            _log.warning("bus away; waiting for it")
        await self._here.wait()

    def publish(
        self,
        subject: str,
        payload: bytes,
        *,
        reply: str = "",
        headers: Mapping[str, str] | None = None,
    ) -> None:
        if self._closed:
            raise BusError("the bus is closed")
        _check_subject(subject)
        size = len(payload) + header_bytes(headers)
        if not self._started or self._outbound_bytes + size > self._pending_bytes:
            raise BusOverflow(f"{self._outbound_bytes} bytes wait for the server")
        parts = split(
            payload, headers, max_payload=self._hub.max_payload, part_id=next(self._part_ids)
        )
        for part, part_headers in parts:
            copied = dict(part_headers) if part_headers else None
            self._outbound.append(Message(subject, bytes(part), reply, copied))
            reply = ""
        self._outbound_bytes += size
        self._arm()

    async def subscribe(
        self,
        subject: str,
        callback: Callback,
        *,
        queue: str = "",
        max_pending: int = 65_536,
        max_pending_bytes: int = 256 << 20,
    ) -> _Subscription:
        if self._closed:
            raise BusError("the bus is closed")
        _check_subject(subject)
        return self._add(subject, callback, queue, (max_pending, max_pending_bytes))

    async def request(self, subject: str, payload: bytes, *, timeout_s: float) -> Message:
        return await self._requests.ask(self._publish, subject, payload, timeout_s)

    async def flush(self, *, timeout_s: float) -> None:
        await self._requests.echo(self._publish, timeout_s)

    async def close(self) -> None:
        if self._closed:
            return
        if self.connected:
            try:
                await self.flush(timeout_s=self._close_timeout_s)
            except (BusTimeout, BusOverflow):
                _log.warning("bus closed without knowing that everything was sent")
        self._closed = True
        self._here.clear()
        self._requests.fail_all(BusError("the bus is closed"))
        for subscription in list(self._subscriptions):
            await subscription.close()
        self._hub._detach(self)
        self._outbound.clear()

    def _publish(self, subject: str, payload: bytes, reply: str) -> None:
        self.publish(subject, payload, reply=reply)

    def _add(
        self, subject: str, callback: Callback, queue: str, limits: tuple[int, int]
    ) -> _Subscription:
        inlet = Inlet(subject, callback, self._notices, max_bytes=limits[1])
        subscription = _Subscription(inlet, queue, limits, self._notices, self._forget)
        self._subscriptions.append(subscription)
        return subscription

    def _forget(self, subscription: _Subscription) -> None:
        if subscription in self._subscriptions:  # one that drains is forgotten before it closes
            self._subscriptions.remove(subscription)

    def _matching(self, subject: str) -> "Iterator[_Subscription]":
        """The subscriptions on `subject`, while the server has them."""
        if self.connected:
            yield from (s for s in self._subscriptions if matches(s.inlet.subject, subject))

    def _arm(self) -> None:
        """Hand over what is outbound at the next turn, if there is a server to take it."""
        if self._outbound and self._sending is None and self.connected:
            self._sending = asyncio.get_running_loop().call_soon(self._send)

    def _send(self) -> None:
        self._sending = None
        if not self.connected or self._hub.is_frozen:
            return
        outbound, self._outbound, self._outbound_bytes = self._outbound, deque(), 0
        for message in outbound:
            self._hub._route(self, message)

    def _join(self) -> None:
        """The server is there."""
        if not self._started or self._closed:
            return
        if not self.connected:
            self._here.set()
            self._notices.emit(BusEvent("up"))
        self._arm()

    def _leave(self) -> None:
        """The server is gone, and what was already on its way to it."""
        if self.connected:
            self._here.clear()
            self._outbound.clear()
            self._outbound_bytes = 0
            self._notices.emit(BusEvent("down"))


def matches(pattern: str, subject: str) -> bool:
    """Whether `subject` is one of those that `pattern` (wildcards `*` and `>`) names."""
    if pattern == subject:
        return True
    wanted, given = pattern.split("."), subject.split(".")
    for index, token in enumerate(wanted):
        if token == ">":
            return len(given) > index
        if index >= len(given) or token not in ("*", given[index]):
            return False
    return len(wanted) == len(given)


def _check_subject(subject: str) -> None:
    if not subject or any(c.isspace() for c in subject) or "" in subject.split("."):
        raise LocalError(f"{subject!r} is no subject")
