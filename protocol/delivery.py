"""What every bus adapter does with what it receives: join, call back, answer requests, report.

Shared by the adapters so that they behave alike. Knows the port and the event loop, no server.
"""

import asyncio
import logging
from collections.abc import Callable
from itertools import count
from typing import Final

from protocol.bus import BusEvent, Callback, Message
from protocol.errors import BusError, BusTimeout, NoResponders
from protocol.fragments import Joiner

_log: Final = logging.getLogger("baton.bus")
_SPEAK_EVERY_S: Final = 10.0

Publish = Callable[[str, bytes, str], None]
"""Subject, payload, reply."""


class Throttle:
    """Lets the first of many equal log lines through, then one every ten seconds."""

    def __init__(self, every_s: float = _SPEAK_EVERY_S) -> None:
        self._every_s = every_s
        self._next = float("-inf")
        self._held = 0

    def due(self, now: float) -> int | None:
        """How many were held back since the last one if this one may be said, else None."""
        if now < self._next:
            self._held += 1
            return None
        self._next = now + self._every_s
        held, self._held = self._held, 0
        return held


class Grumbler:
    """Says what goes wrong: each cause at once, and then every ten seconds while it goes on.

    The cause is the text as far as it quotes nothing: a subject that we may not use is another one
    with each request.
    """

    def __init__(self, max_causes: int = 16) -> None:
        self._max_causes = max_causes
        self._throttles: dict[str, Throttle] = {}

    def complain(self, text: str, now: float) -> None:
        cause = text.partition('"')[0]
        if cause not in self._throttles and len(self._throttles) >= self._max_causes:
            del self._throttles[next(iter(self._throttles))]
        held = self._throttles.setdefault(cause, Throttle()).due(now)
        if held is not None:
            _log.warning("%s%s", text, f" ({held} more before)" if held else "")

    def reset(self) -> None:
        """All is well: what comes next is news."""
        self._throttles.clear()


class Notices:
    """Who wants to hear of `BusEvent`s, and the losses that were not told yet."""

    def __init__(self) -> None:
        self.lost = 0
        self._callbacks: list[Callable[[BusEvent], None]] = []
        self._untold: dict[str, int] = {}
        self._throttle = Throttle()

    def on_event(self, callback: Callable[[BusEvent], None]) -> None:
        self._callbacks.append(callback)

    def emit(self, event: BusEvent) -> None:
        for callback in self._callbacks:
            try:
                callback(event)
            except Exception as error:  # noqa: BLE001  one listener must not harm the rest
                _log.error("a listener of bus events failed: %r", error)

    def report_lost(self, subject: str, number: int) -> None:
        """Messages of a subscription were lost. One event tells all losses of a loop turn."""
        self.lost += number
        if not self._untold:
            asyncio.get_running_loop().call_soon(self._tell)
        self._untold[subject] = self._untold.get(subject, 0) + number

    def _tell(self) -> None:
        untold, self._untold = self._untold, {}
        if self._throttle.due(asyncio.get_running_loop().time()) is not None:
            _log.warning("messages lost, in all %d; now %s", self.lost, untold)
        for subject, number in untold.items():
            self.emit(BusEvent("lost", subject, number))


class Inlet:
    """The receiving side of one subscription."""

    def __init__(
        self,
        subject: str,
        callback: Callback,
        notices: Notices,
        *,
        max_bytes: int,
        max_age_s: float = 30.0,
    ) -> None:
        self.subject = subject
        self._callback = callback
        self._notices = notices
        self._joiner = Joiner(max_bytes=max_bytes, max_age_s=max_age_s)
        self._look_every_s = min(1.0, max_age_s)
        self._told = 0
        self._timer: asyncio.TimerHandle | None = None
        self._throttle = Throttle()
        self.closed = False

    def feed(self, message: Message) -> None:
        """Deliver `message`, or keep it if it is a part. Never raises."""
        if self.closed:
            return
        if message.headers is not None:
            whole = self._joiner.add(message, self._now())
            self._settle()
            if whole is None:
                return
            message = whole
        try:
            self._callback(message)
        except Exception as error:  # noqa: BLE001  one bad message must not end the subscription
            held = self._throttle.due(self._now())
            if held is not None:
                more = f" ({held} more before)" if held else ""
                _log.error("callback of %s failed: %r%s", self.subject, error, more)

    def close(self) -> None:
        self.closed = True
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _now(self) -> float:
        return asyncio.get_running_loop().time()

    def _settle(self) -> None:
        """Report what the joiner gave up; watch it while payloads are incomplete."""
        lost = self._joiner.lost - self._told
        if lost:
            self._told += lost
            self._notices.report_lost(self.subject, lost)
        if len(self._joiner) and self._timer is None and not self.closed:
            self._timer = asyncio.get_running_loop().call_later(self._look_every_s, self._expire)

    def _expire(self) -> None:
        self._timer = None
        self._joiner.expire(self._now())
        self._settle()


class Requests:
    """All open requests of one connection, answered on `<prefix>.<number>`."""

    def __init__(self, prefix: str) -> None:
        self._prefix = prefix
        self._numbers = count(1)
        self._open: dict[str, asyncio.Future[Message]] = {}
        self.subject = f"{prefix}.*"

    def on_reply(self, message: Message) -> None:
        future = self._open.get(message.subject)
        if future is not None and not future.done():
            future.set_result(message)

    async def ask(
        self, publish: Publish, subject: str, payload: bytes, timeout_s: float
    ) -> Message:
        """Raises NoResponders, BusTimeout, and what `publish` raises."""
        reply = f"{self._prefix}.{next(self._numbers)}"
        answer = await self._await_on(reply, publish, (subject, payload, reply), timeout_s)
        if answer.no_responders:
            raise NoResponders(f"nobody listens on {subject}")
        return answer

    async def echo(self, publish: Publish, timeout_s: float) -> None:
        """Wait for a message to ourselves: it comes back behind everything sent before it."""
        reply = f"{self._prefix}.{next(self._numbers)}"
        await self._await_on(reply, publish, (reply, b"", ""), timeout_s)

    def fail_all(self, error: BusError) -> None:
        for future in self._open.values():
            if not future.done():
                future.set_exception(error)

    async def _await_on(
        self, reply: str, publish: Publish, message: tuple[str, bytes, str], timeout_s: float
    ) -> Message:
        future: asyncio.Future[Message] = asyncio.get_running_loop().create_future()
        self._open[reply] = future
        try:
            publish(*message)
            async with asyncio.timeout(timeout_s):
                return await future
        except TimeoutError:
            raise BusTimeout(f"no answer from {message[0]} within {timeout_s:g} s") from None
        finally:
            del self._open[reply]
