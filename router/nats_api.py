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
from protocol.errors import BusError, ClientError
from protocol.ids import is_name
from protocol.subjects import Subjects
from router.answers import to_json
from router.dispatch import Dispatch
from router.requests import Front, Prepared
from router.sinks import CollectSink, StreamSink, error_json

_log = logging.getLogger("baton.router")

STATUS: Final = "Baton-Status"
QUEUE: Final = "baton-routers"
MAX_OPEN: Final = 65_536


class ReplyWriter:
    """A `ChunkWriter` over a reply inbox."""

    def __init__(self, bus: Bus, reply: str, watch: str, request_id: str) -> None:
        self._bus = bus
        self._reply = reply
        self._watch = watch
        self._request_id = request_id
        self.on_end: Callable[[], None] = lambda: None

    def write(self, chunk: bytes) -> None:
        try:
            self._bus.publish(self._reply, chunk, reply=self._watch)
        except BusError:
            self.on_end()

    def fail(self, error: ClientError) -> None:
        self.write(error_json(error, self._request_id))
        self._end(error.status)

    def finish(self) -> None:
        self._end(200)

    def _end(self, status: int) -> None:
        try:
            self._bus.publish(self._reply, b"", headers={STATUS: str(status)})
        except BusError:
            pass
        self.on_end()


class NatsApi:
    """Serves the api subjects of one router process."""

    def __init__(
        self,
        *,
        bus: Bus,
        subjects: Subjects,
        front: Front,
        dispatch: Dispatch,
        tasks: asyncio.TaskGroup,
        new_id: Callable[[], str],
        models: Callable[[], bytes],
    ) -> None:
        self._bus = bus
        self._subjects = subjects
        self._front = front
        self._dispatch = dispatch
        self._tasks = tasks
        self._new_id = new_id
        self._models = models
        self._tokens = itertools.count(1)
        self._open = 0
        self._subscription: Subscription | None = None

    async def start(self) -> None:
        self._subscription = await self._bus.subscribe(
            self._subjects.all_api, self._on_request, queue=QUEUE
        )

    async def close(self) -> None:
        """Take no new requests; those running go on."""
        if self._subscription is not None:
            await self._subscription.close()

    def _on_request(self, message: Message) -> None:
        if not message.reply or message.no_responders:
            return  # nobody would hear the answer
        if self._open >= MAX_OPEN:
            error = ClientError(503, "too many open requests", code="queue_full", retry_after_s=1)
            ReplyWriter(self._bus, message.reply, "", "").fail(error)
            return
        self._open += 1
        self._tasks.create_task(self._serve(message), name="api request")

    async def _serve(self, message: Message) -> None:
        headers = message.headers or {}
        asked = headers.get("x-request-id", "") or headers.get("X-Request-Id", "")
        request_id = asked if is_name(asked) else self._new_id()
        token = str(next(self._tokens))
        try:
            await self._answer(message, request_id, token)
        except ClientError as error:
            ReplyWriter(self._bus, message.reply, "", request_id).fail(error)
        except Exception:  # noqa: BLE001 - the edge: a bug here must not be a hang there
            _log.exception("api request failed request_id=%s", request_id)
            bug = ClientError(500, "internal error", code="internal_error")
            ReplyWriter(self._bus, message.reply, "", request_id).fail(bug)
        finally:
            self._open -= 1
            self._dispatch.inbox.unwatch_client(token)

    async def _answer(self, message: Message, request_id: str, token: str) -> None:
        endpoint = self._subjects.endpoint_of(message.subject)
        if endpoint == "models":
            writer = ReplyWriter(self._bus, message.reply, "", request_id)
            writer.write(self._models())
            writer.finish()
            return
        if endpoint == "chat.completions":
            prepared = await self._front.chat(message.payload, request_id)
        elif endpoint == "completions":
            prepared = await self._front.completion(message.payload, request_id)
        else:
            raise ClientError(404, f"no endpoint `{endpoint}`", code="not_found")
        await self._run(message, request_id, token, prepared)

    async def _run(self, message: Message, request_id: str, token: str, prepared: Prepared) -> None:
        over = asyncio.Event()
        watch = self._dispatch.watch_client(token, over.set)
        writer = ReplyWriter(self._bus, message.reply, watch, request_id)
        writer.on_end = over.set
        cancel = self._dispatch.cancel
        sink: StreamSink | CollectSink
        if prepared.stream:
            sink = StreamSink(
                prepared.answer,
                prepared.specs,
                prepared.n,
                cancel,
                writer,
                include_usage=prepared.include_usage,
            )
        else:
            sink = CollectSink(prepared.answer, prepared.specs, prepared.n, cancel)
            sink.done.add_done_callback(lambda _: over.set())
        try:
            for spec in prepared.specs:
                self._dispatch.submit(spec, sink)
            await over.wait()
        finally:
            sink.cancel_all()
        if isinstance(sink, CollectSink):
            if not sink.done.done():
                sink.done.cancel()
                return  # the client is gone
            writer.write(sink.done.result())
            writer.finish()


def models_body(names: list[tuple[str, int]]) -> bytes:
    """`GET /v1/models`."""
    return to_json({"object": "list", "data": [model_entry(*named) for named in names]})


def model_entry(name: str, created: int) -> dict[str, object]:
    return {"id": name, "object": "model", "created": created, "owned_by": "baton"}
