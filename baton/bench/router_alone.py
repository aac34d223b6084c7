"""A whole router in this process, without sockets: its bus is memory, its workers only pretend,
and a client's connection is a transport that counts.

Built from the parts that `router.main` builds it from, so that what is measured here is what runs
there.
"""

import asyncio
import logging
import os
import random
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any, Final

from aiohttp import web
from prometheus_client import CollectorRegistry

from baton.bench.client import chat
from baton.bench.pretend_workers import PretendWorkers
from baton.demo import DEMO_MODEL
from baton.logs import log_handler
from protocol.bus import Bus, Message
from protocol.errors import LocalError
from protocol.jobs import JobEnvelope
from protocol.memory_bus import MemoryBus, MemoryHub
from protocol.subjects import Subjects
from router.catalog import Catalog
from router.config import RouterConfig
from router.dispatch import Dispatch
from router.http import new_request_id
from router.metrics import RouterMetrics
from router.requests import Front, Prepared
from router.running import Running
from router.scheduling import events as ev
from router.scheduling.limits import Limits
from router.sinks import CollectSink, collect_sink, stream_sink
from router.streams import SseWriter

_ROUTER: Final = "router-0"
_LONG_S: Final = 600.0
"""A machine that stands still for seconds is not what is measured: nothing shall time out."""
_LIMITS: Final = Limits(
    accept_timeout_s=_LONG_S, silence_timeout_s=_LONG_S, stall_timeout_s=_LONG_S,
    replay_timeout_s=_LONG_S,
)  # fmt: skip
_BEGIN_S: Final = 30.0


class CountingTransport(asyncio.Transport):
    """A client that takes everything at once; what it got is counted and forgotten."""

    def __init__(self) -> None:
        super().__init__()
        self.num_bytes = 0

    def write(self, data: Any) -> None:
        self.num_bytes += len(data)

    def is_closing(self) -> bool:
        return False

    def get_write_buffer_size(self) -> int:
        return 0

    def close(self) -> None:
        """Whoever made the connection ends it."""


class RouterAlone:
    """One router and its two workers."""

    def __init__(
        self, bus: Bus, subjects: Subjects, workers: PretendWorkers, tasks: asyncio.TaskGroup
    ) -> None:
        config, metrics = RouterConfig(), RouterMetrics(CollectorRegistry())
        self._bus = bus
        self._workers = workers
        self._dispatch = Dispatch(
            bus=bus,
            subjects=subjects,
            router_id=_ROUTER,
            limits=_LIMITS,
            metrics=metrics,
            rng=random.Random(1),
            clock=asyncio.get_running_loop().time,
        )
        self._catalog = Catalog(
            bus=bus, subjects=subjects, router_id=_ROUTER, tasks=tasks, wall_clock=time.time
        )
        self._front = Front(
            self._catalog,
            max_choices=config.max_choices,
            rng=random.Random(2),
            wall_clock=time.time,
        )
        self._running = Running(self._dispatch, new_request_id)
        app = web.Application()
        app.router.add_post("/v1/chat/completions", self._serve)
        self._http = web.AppRunner(app, handler_cancellation=True, access_log=None)
        self._connections: list[web.RequestHandler] = []

    async def start(self) -> None:
        await self._http.setup()
        await self._workers.start()
        for info in self._workers.infos:
            self._catalog.listed(info)
            self._dispatch.feed(ev.WorkerListed(info))
        self.hear_reports()
        await self._catalog.served(DEMO_MODEL)

    async def close(self) -> None:
        for connection in self._connections:
            connection.connection_lost(None)
        await self._http.cleanup()
        self._dispatch.leave()

    def hear_reports(self) -> None:
        """The workers live; to be said again within a second or two."""
        for info in self._workers.infos:
            report = ev.WorkerReported(info.worker_id, info.incarnation, self._workers.report())
            self._dispatch.feed(report)

    # --- requests that are answered in a piece ---

    async def begin(self, body: bytes) -> tuple[str, CollectSink]:
        """What the HTTP handler does with a body until it waits."""
        request_id = self._running.begin("")
        prepared: Prepared = await self._front.chat(body, request_id)
        sink = collect_sink(prepared, self._dispatch.cancel)
        self._running.start(request_id, prepared, sink)
        return request_id, sink

    async def end(self, request_id: str, sink: CollectSink) -> bytes:
        """And when it has waited."""
        body = await sink.rendered()
        self._running.end(request_id)
        self._dispatch.stories.answered(
            request_id, "POST /v1/chat/completions", 200, None, has_begun=True
        )
        return body

    # --- streams ---

    async def _serve(self, request: web.Request) -> web.StreamResponse:
        """What the HTTP handler does with a body that asks for a stream."""
        request_id = self._running.begin("")
        try:
            prepared = await self._front.chat(await request.read(), request_id)
            writer = SseWriter(request_id, stall_s=_LONG_S, ping_s=_LONG_S, on_stall=_no_stall)
            sink = stream_sink(prepared, self._dispatch.cancel, writer)
            self._running.start(request_id, prepared, sink)
            return await writer.serve(request, {})
        finally:
            self._running.end(request_id)

    async def stream(self, texts: list[str], max_tokens: int) -> list[CountingTransport]:
        """A stream for each of `texts`, up to where its tokens go straight to its connection."""
        transports = [self._connect(chat(text, max_tokens, stream=True)) for text in texts]
        async with asyncio.timeout(_BEGIN_S):
            while not all(transport.num_bytes for transport in transports):
                for message in self._workers.answers(await self.sent()):
                    self.hear(message)
        return transports

    def _connect(self, request: bytes) -> CountingTransport:
        assert self._http.server is not None
        transport, connection = CountingTransport(), self._http.server()
        self._connections.append(connection)
        connection.connection_made(transport)
        connection.data_received(request)
        return transport

    # --- the bus ---

    @staticmethod
    async def turn() -> None:
        """One turn of the loop, in which what was posted leaves."""
        await asyncio.sleep(0)

    async def sent(self) -> list[JobEnvelope]:
        """What the router has sent to its workers since this was last asked."""
        await self._bus.flush(timeout_s=_BEGIN_S)
        return self._workers.heard()

    def hear(self, message: Message) -> None:
        self._dispatch.on_out(message)


def _no_stall() -> None:
    raise LocalError("a transport that takes everything has stalled")


@asynccontextmanager
async def router_alone() -> AsyncIterator[tuple[RouterAlone, PretendWorkers]]:
    subjects, hub = Subjects("bench"), MemoryHub()
    bus, theirs = MemoryBus(hub), MemoryBus(hub)
    workers = PretendWorkers(theirs, subjects, _ROUTER)
    with _logs_to_nowhere():
        async with asyncio.TaskGroup() as tasks:
            await bus.start()
            await theirs.start()
            router = RouterAlone(bus, subjects, workers, tasks)
            try:
                await router.start()
                yield router, workers
            finally:
                await router.close()
        await bus.close()
        await theirs.close()


@contextmanager
def _logs_to_nowhere() -> Iterator[None]:
    """Lines are written as a router writes them, so that they cost what they cost there."""
    config, logger = RouterConfig(), logging.getLogger("baton")
    before = logger.level, logger.propagate
    with open(os.devnull, "w") as nowhere:
        handler = log_handler(nowhere, config.log_format)
        logger.addHandler(handler)
        logger.setLevel(config.log_level.upper())
        logger.propagate = False
        try:
            yield
        finally:
            logger.removeHandler(handler)
            logger.setLevel(before[0])
            logger.propagate = before[1]
