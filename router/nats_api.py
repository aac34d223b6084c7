"""OpenAI's bodies on the bus: `baton.<ns>.api.<endpoint>`, served by a queue group.

Chunks (or one whole body) come back on the reply inbox, each as plain JSON; an empty message with a
`Baton-Status` header ends the answer. Errors are a JSON error object and their status in that last
header. A client that stops listening is noticed by the bus and cancelled.
"""

import asyncio
import itertools
import logging
from collections.abc import Callable
from typing import Final

from protocol.bus import Bus, Message, Subscription
from protocol.errors import BadMessage, BusError, ClientError
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
DRAIN_S: Final = 5.0
"""For one round trip to NATS; without it nothing can be on its way to us either."""


class ReplyWriter:
    """A `ChunkWriter` over a reply inbox. `on_end` is called when nothing more will be said."""

    def __init__(
        self,
        bus: Bus,
        reply: str,
        request_id: str,
        *,
        watch: str = "",
        on_end: Callable[[], None] = lambda: None,
    ) -> None:
        self._bus = bus
        self._reply = reply
        self._request_id = request_id
        self._watch = watch
        self._on_end = on_end
        self.status = 0
        """What the client was told; 0: nothing, it stopped listening."""

    def write(self, chunk: bytes) -> None:
        try:
            self._bus.publish(self._reply, chunk, reply=self._watch)
        except BusError:
            self._on_end()  # a stream with a hole is no stream: the silence tells the client

    def splice(self, before: bytes, after: bytes) -> Callable[[bytes], None]:
        return lambda middle: self.write(before + middle + after)

    def fail(self, error: ClientError) -> None:
        self.write(error_json(error, self._request_id))
        self._end(error.status, error.retry_after_s)

    def finish(self) -> None:
        self._end(200, None)

    def _end(self, status: int, retry_after_s: int | None) -> None:
        headers = {STATUS: str(status), REQUEST_ID: self._request_id}
        if retry_after_s is not None:
            headers["Retry-After"] = str(retry_after_s)
        try:
            self._bus.publish(self._reply, b"", headers=headers)
            self.status = status
        except BusError:
            pass
        self._on_end()


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

    async def start(self) -> None:
        self._subscription = await self._bus.subscribe(
            self._subjects.all_api, self._on_request, queue=QUEUE
        )

    async def close(self) -> None:
        """Take no new requests; those running, and those that NATS has given us, go on."""
        subscription, self._subscription = self._subscription, None
        if subscription is not None:
            await subscription.drain(timeout_s=DRAIN_S)

    def _on_request(self, message: Message) -> None:
        if message.no_responders:
            return
        if not _is_answerable(message.reply):
            problem = BadMessage("no inbox for the answer")
            self._dispatch.inbox.bad_message(message.subject, problem, "no_inbox")
            return
        if self._open >= MAX_OPEN:
            error = ClientError(503, "too many open requests", code="queue_full", retry_after_s=1)
            request_id = self._running.new_id()
            ReplyWriter(self._bus, message.reply, request_id).fail(error)
            door = message.subject
            self._dispatch.stories.answered(request_id, door, 503, error, has_begun=False)
            return
        self._open += 1
        self._tasks.create_task(self._serve(message), name="api request")

    async def _serve(self, message: Message) -> None:
        headers = message.headers or {}
        asked = headers.get(REQUEST_ID, "") or headers.get("X-Request-Id", "")
        request_id = self._running.begin(asked)
        status, told = 0, None
        try:
            status = await self._answer(message, request_id)
        except ClientError as error:
            told = error
            self._fail(message, request_id, error)
        except Exception:  # noqa: BLE001 - the edge: a bug here must not be a hang there
            _log.exception("api request failed request_id=%s", request_id)
            told = ClientError(500, "internal error", code="internal_error")
            self._fail(message, request_id, told)
        finally:
            self._open -= 1
            if told is not None:
                status = told.status
            if status:
                self._dispatch.stories.answered(request_id, message.subject, status, told)
            self._running.end(request_id)

    def _fail(self, message: Message, request_id: str, error: ClientError) -> None:
        ReplyWriter(self._bus, message.reply, request_id).fail(error)

    async def _answer(self, message: Message, request_id: str) -> int:
        """The status that the client was told; 0 if it went. Raises ClientError."""
        endpoint = self._subjects.endpoint_of(message.subject)
        if endpoint == "models":
            writer = ReplyWriter(self._bus, message.reply, request_id)
            writer.write(self._models())
            writer.finish()
            return writer.status
        if endpoint not in ("chat.completions", "completions"):
            raise ClientError(404, f"no endpoint `{endpoint}`", code="not_found")
        if len(message.payload) > self._max_body_bytes:
            text = f"the body is larger than {self._max_body_bytes} bytes"
            raise ClientError(413, text, code="body_too_large")
        prepare = self._front.chat if endpoint == "chat.completions" else self._front.completion
        return await self._run(message, request_id, await prepare(message.payload, request_id))

    async def _run(self, message: Message, request_id: str, prepared: Prepared) -> int:
        over = asyncio.Event()
        token = str(next(self._tokens))
        watch = self._dispatch.watch_client(token, over.set)
        writer = ReplyWriter(self._bus, message.reply, request_id, watch=watch, on_end=over.set)
        cancel = self._dispatch.cancel
        try:
            if prepared.stream:
                stream = stream_sink(prepared, cancel, writer)
                self._running.start(request_id, prepared, stream)
                await over.wait()
            else:
                whole = collect_sink(prepared, cancel)
                self._running.start(request_id, prepared, whole)
                await whole.done.wait()
                writer.write(await whole.rendered())
                writer.finish()
            return writer.status
        finally:
            self._dispatch.inbox.unwatch_client(token)


def _is_answerable(reply: str) -> bool:
    """Whether an answer can be published there: it came from the client as it liked."""
    return bool(reply) and all(part and part not in "*>" for part in reply.split("."))


def models_body(names: list[tuple[str, int]]) -> bytes:
    """`GET /v1/models`."""
    return to_json({"object": "list", "data": [model_entry(*named) for named in names]})


def model_entry(name: str, created: int) -> dict[str, object]:
    return {"id": name, "object": "model", "created": created, "owned_by": "baton"}
