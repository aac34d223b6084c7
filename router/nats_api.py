"""OpenAI's bodies on the bus: `baton.<ns>.api.<endpoint>`, served by a queue group.

Chunks (or one whole body) come back on the reply inbox, each as plain JSON; an empty message with a
`Baton-Status` header ends the answer. Errors are a JSON error object and their status in that last
header. A client that stops listening is noticed by the bus and cancelled.

After an outage of the bus nobody listens for a while: clients come back later than we. A stream
that was open has lost who knows what and ends with an error; ends are said until they are heard.
"""

import asyncio
import itertools
import logging
from collections.abc import Callable
from functools import partial
from typing import Final

from protocol.bus import Bus, BusEvent, Message, Subscription
from protocol.errors import BadMessage, BusError, BusOverflow, ClientError, LocalError
from protocol.subjects import Subjects
from router.answers import to_json
from router.dispatch import Dispatch
from router.requests import Front, Prepared
from router.running import Running
from router.sinks import collect_sink, error_json, stream_sink

_log = logging.getLogger("baton.router")

STATUS: Final = "Baton-Status"
REQUEST_ID: Final = "x-request-id"
QUEUE: Final = "baton-routers"
MAX_OPEN: Final = 65_536
MAX_REPLY: Final = 512
"""Characters of an inbox. With more, our own line may be too long for the server, which then closes
the connection of everybody."""
DRAIN_S: Final = 5.0
"""For one round trip to NATS; without it nothing can be on its way to us either."""
GRACE_S: Final = 8.0
"""After an outage: whom nobody hears so long may be a client that has not come back yet."""
PAUSES: Final = (0.25, 0.5, 1.0, 2.0, 4.0)
"""Between two attempts to say what nobody heard."""
FLUSH_S: Final = 2.0
"""Longer than the bus needs to notice that the server stands still."""
SMALL: Final = 64 * 1024
"""A message of fewer bytes is not what a full bus has no room for."""

_Said = tuple[bytes, dict[str, str] | None]
"""A message of an answer: payload and headers."""


class _TooLarge(BusError):
    """The bus has taken everything else, but not this."""


class ReplyWriter:
    """A `ChunkWriter` over the reply inbox of one request. How the answer ends is kept here until
    the request's task says it."""

    def __init__(self, bus: Bus, reply: str, request_id: str) -> None:
        self._publish: Callable[..., None] = bus.publish
        self.reply = reply
        self.request_id = request_id
        self.watch = ""
        self.body = b""
        """Of an answer in a piece."""
        self.error: ClientError | None = None
        self.over = asyncio.Event()
        """Nothing more will be written, or it makes no sense."""
        self.has_ended = False
        self.has_gone = False
        """The client stopped listening."""
        self.is_broken = False

    def write(self, chunk: bytes) -> None:
        try:
            self._publish(self.reply, chunk, reply=self.watch)
        except BusError:
            self.interrupt()

    def splice(self, before: bytes, after: bytes) -> Callable[[bytes], None]:
        return lambda middle: self.write(before + middle + after)

    def fail(self, error: ClientError) -> None:
        self.error = error
        self.finish()

    def finish(self) -> None:
        self.has_ended = True
        self.over.set()

    def interrupt(self) -> None:
        """There is a hole in the stream, or may be: what comes now is of no use."""
        self.is_broken = True
        self._publish = _discard  # so that no chunk has to look whether it is the one after
        self.over.set()

    def leave(self) -> None:
        """The client has gone."""
        self.has_gone = True
        self.over.set()

    @property
    def status(self) -> int:
        return 200 if self.error is None else self.error.status

    def ending(self) -> list[_Said]:
        """The messages that end the answer."""
        if self.is_broken and self.error is None:
            self.error = _interrupted()
        headers = {STATUS: str(self.status), REQUEST_ID: self.request_id}
        if self.error is None:
            body = self.body
        else:
            body = error_json(self.error, self.request_id)
            if self.error.retry_after_s is not None:
                headers["Retry-After"] = str(self.error.retry_after_s)
        return [(body, None), (b"", headers)] if body else [(b"", headers)]


class NatsApi:
    """Serves the api subjects of one router process."""

    def __init__(
        self,
        *,
        bus: Bus,
        subjects: Subjects,
        front: Front,
        dispatch: Dispatch,
        running: Running,
        tasks: asyncio.TaskGroup,
        max_body_bytes: int,
        models: Callable[[], bytes],
    ) -> None:
        self._bus = bus
        self._subjects = subjects
        self._front = front
        self._dispatch = dispatch
        self._tasks = tasks
        self._running = running
        self._max_body_bytes = max_body_bytes
        self._models = models
        self._tokens = itertools.count(1)
        self._open = 0
        self._subscription: Subscription | None = None
        self._now = asyncio.get_running_loop().time
        self._streams: set[ReplyWriter] = set()
        self._outages = 0
        self._steady_at = float("-inf")
        self._bus_news = asyncio.Event()

    async def start(self) -> None:
        self._bus.on_event(self._on_bus_event)
        self._subscription = await self._bus.subscribe(
            self._subjects.all_api, self._on_request, queue=QUEUE
        )

    async def close(self) -> None:
        """Take no new requests; those running, and those that NATS has given us, go on."""
        subscription, self._subscription = self._subscription, None
        if subscription is not None:
            await subscription.drain(timeout_s=DRAIN_S)

    # --- requests ---

    def _on_request(self, message: Message) -> None:
        if message.no_responders:
            return
        if not _is_answerable(message.reply):
            problem = BadMessage("no inbox for the answer")
            self._dispatch.inbox.bad_message(message.subject, problem, "no_inbox")
            return
        refusal = self._running.leaving
        if refusal is None and self._open >= MAX_OPEN:
            refusal = ClientError(503, "too many open requests", code="queue_full", retry_after_s=1)
        if refusal is not None:
            writer = ReplyWriter(self._bus, message.reply, self._running.new_id())
            writer.fail(refusal)
            self._say_once(writer)
            self._dispatch.stories.answered(
                writer.request_id, message.subject, refusal.status, refusal, has_begun=False
            )
            return
        self._open += 1
        self._tasks.create_task(self._serve(message), name="api request")

    async def _serve(self, message: Message) -> None:
        headers = message.headers or {}
        asked = headers.get(REQUEST_ID, "") or headers.get("X-Request-Id", "")
        request_id = self._running.begin(asked)
        writer = ReplyWriter(self._bus, message.reply, request_id)
        status = 0
        try:
            await self._answer(message, writer)
            if not writer.has_gone:
                status = await self._end(writer)
        except asyncio.CancelledError:
            if not writer.has_gone:
                if not writer.has_ended:
                    writer.fail(self._running.leaving or _leaving())
                self._say_once(writer)
                status = writer.status
            raise
        except Exception:  # noqa: BLE001 - an answer that cannot be said must not end the others
            _log.exception("api answer failed request_id=%s", request_id)
        finally:
            self._open -= 1
            self._streams.discard(writer)
            if status:
                door = message.subject
                self._dispatch.stories.answered(request_id, door, status, writer.error)
            self._running.end(request_id)

    async def _answer(self, message: Message, writer: ReplyWriter) -> None:
        """Everything but the end."""
        try:
            await self._run(message, writer)
        except ClientError as error:
            writer.fail(error)
        except Exception:  # noqa: BLE001 - the edge: a bug here must not be a hang there
            _log.exception("api request failed request_id=%s", writer.request_id)
            writer.fail(ClientError(500, "internal error", code="internal_error"))

    async def _run(self, message: Message, writer: ReplyWriter) -> None:
        """Raises ClientError."""
        endpoint = self._subjects.endpoint_of(message.subject)
        if endpoint == "models":
            writer.body = self._models()
            writer.finish()
            return
        if endpoint not in ("chat.completions", "completions"):
            raise ClientError(404, f"no endpoint `{endpoint}`", code="not_found")
        if len(message.payload) > self._max_body_bytes:
            text = f"the body is larger than {self._max_body_bytes} bytes"
            raise ClientError(413, text, code="body_too_large")
        prepare = self._front.chat if endpoint == "chat.completions" else self._front.completion
        prepared = await prepare(message.payload, writer.request_id)
        if prepared.stream:
            await self._stream(prepared, writer)
            return
        whole = collect_sink(prepared, self._dispatch.cancel)
        self._running.start(writer.request_id, prepared, whole)
        await whole.done.wait()
        writer.body = await whole.rendered()
        writer.finish()

    async def _stream(self, prepared: Prepared, writer: ReplyWriter) -> None:
        token = str(next(self._tokens))
        writer.watch = self._dispatch.watch_client(token, partial(self._on_unheard, writer))
        self._streams.add(writer)
        sink = stream_sink(prepared, self._dispatch.cancel, writer)
        try:
            self._running.start(writer.request_id, prepared, sink)
            await writer.over.wait()
            if writer.is_broken:
                sink.abort(_interrupted())
        finally:
            self._dispatch.inbox.unwatch_client(token)

    # --- the bus ---

    def _on_bus_event(self, event: BusEvent) -> None:
        if event.kind == "down":
            self._outages += 1
        elif event.kind == "up":
            self._steady_at = self._now() + GRACE_S
            for writer in self._streams:
                writer.interrupt()
        self._bus_news.set()

    def _on_unheard(self, writer: ReplyWriter) -> None:
        """Nobody heard a chunk."""
        if self._is_steady():
            writer.leave()
        else:
            writer.interrupt()

    def _is_steady(self) -> bool:
        """Whether who does not listen has gone."""
        return self._bus.connected and self._now() >= self._steady_at

    async def _until_up(self) -> None:
        while not self._bus.connected:
            self._bus_news.clear()
            await self._bus_news.wait()

    # --- the end of an answer ---

    def _say_once(self, writer: ReplyWriter) -> None:
        """For who cannot wait."""
        try:
            for payload, headers in writer.ending():
                self._bus.publish(writer.reply, payload, headers=headers)
        except (BusError, LocalError):
            pass

    async def _end(self, writer: ReplyWriter) -> int:
        """Say the end. Returns the status that the client was told; 0 if it was not."""
        while True:
            await self._until_up()
            outages = self._outages
            try:
                for said in writer.ending():
                    if not await self._say(writer.reply, *said):
                        break
                else:
                    return writer.status
            except _TooLarge:
                text = "the answer is too large for the bus; ask for less, or for a stream"
                writer.fail(ClientError(413, text, code="answer_too_large"))
                continue
            except BusError:
                if writer.error is not None:
                    return 0
                writer.fail(_interrupted())
                continue
            if outages == self._outages:
                return 0

    async def _say(self, reply: str, payload: bytes, headers: dict[str, str] | None) -> bool:
        """Publish it; in doubt until somebody hears it. False if nobody does, or if there is an
        outage, after which something else may have to be said. Raises BusError."""
        if self._is_steady():
            try:
                self._bus.publish(reply, payload, headers=headers)
                return True
            except BusError:
                pass
        outages = self._outages
        refused: BusError | None = None
        num_overflows = 0
        for pause in (0.0, *PAUSES):
            await asyncio.sleep(pause)
            if outages != self._outages:
                return False
            try:
                refused = None
                if await self._is_heard(reply, payload, headers):
                    return True
            except BusOverflow as error:
                refused, num_overflows = error, num_overflows + 1
            except BusError as error:
                refused = error
        if num_overflows > len(PAUSES) and len(payload) >= SMALL:
            raise _TooLarge  # others' bytes have had seconds to go
        if refused is not None:
            raise refused
        return False

    async def _is_heard(self, reply: str, payload: bytes, headers: dict[str, str] | None) -> bool:
        """Publish it, and wait for the word that nobody listens: it would come before the flush is
        done. Raises BusError."""
        unheard = asyncio.Event()
        token, outages = str(next(self._tokens)), self._outages
        watch = self._dispatch.watch_client(token, unheard.set)
        publish = partial(self._bus.publish, reply, payload, reply=watch, headers=headers)
        try:
            try:
                publish()
            except BusOverflow:
                await self._bus.flush(timeout_s=FLUSH_S)
                publish()
            await self._bus.flush(timeout_s=FLUSH_S)
            return not unheard.is_set() and outages == self._outages
        finally:
            self._dispatch.inbox.unwatch_client(token)


def _discard(*_: object, **__: object) -> None:
    """In place of `publish`."""


def _interrupted() -> ClientError:
    text = "NATS was interrupted: the answer may be incomplete"
    return ClientError(503, text, code="interrupted", retry_after_s=1)


def _leaving() -> ClientError:
    text = "the router is shutting down"
    return ClientError(503, text, code="shutting_down", retry_after_s=1)


def _is_answerable(reply: str) -> bool:
    """Whether an answer can be published there: it came from the client as it liked."""
    if not reply or len(reply) > MAX_REPLY:
        return False
    return all(part and part not in "*>" for part in reply.split("."))


def models_body(names: list[tuple[str, int]]) -> bytes:
    """`GET /v1/models`."""
    return to_json({"object": "list", "data": [model_entry(*named) for named in names]})


def model_entry(name: str, created: int) -> dict[str, object]:
    return {"id": name, "object": "model", "created": created, "owned_by": "baton"}
