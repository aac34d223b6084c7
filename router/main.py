"""One router process: builds the parts from a config and runs them until told to stop."""

import asyncio
import logging
import random
import secrets
import ssl
import time
from pathlib import Path
from typing import Any, Final

from aiohttp import web
from prometheus_client import CollectorRegistry, ProcessCollector

from discovery import etcd_config
from discovery.etcd import EtcdRegistry
from protocol import nats_config
from protocol.bus import BusEvent
from protocol.errors import ClientError, ConfigError
from protocol.nats_bus import NatsBus
from protocol.subjects import Subjects
from router.admin import Admin, package_version
from router.catalog import Catalog
from router.config import RouterConfig
from router.dispatch import Dispatch
from router.family import Family
from router.fleet_feed import FleetFeed
from router.http import HttpApi, new_request_id
from router.inherited import Inherited
from router.loop_lag import LoopLag
from router.metrics import RouterMetrics
from router.nats_api import NatsApi, models_body
from router.requests import Front
from router.running import Running

_log = logging.getLogger("baton.router")

WARM_S: Final = 3.0
"""A worker that has not reported for so long is not going to."""
WARM_LOOK_S: Final = 0.005
"""Between two looks whether everybody was heard: it takes 20 ms or so."""
LOOK_S: Final = 0.05
PROBED_S: Final = 15.0
"""A balancer asks more often; who has not asked for so long is none."""
HANDSHAKE_S: Final = 2.0
TURNS: Final = 4
"""Of the loop, until aiohttp has given a request that it has read to its handler."""
BACKLOG: Final = 1024
"""Of a parent's sockets, which have it already."""


async def run_router(
    config: RouterConfig,
    stop: asyncio.Event,
    stop_now: asyncio.Event,
    inherited: Inherited | None = None,
) -> None:
    """Serve until `stop` (drain, then leave) or `stop_now`; on the sockets of a parent, if there is
    one, and then without it no longer. Raises ConfigError."""
    config.check()
    if inherited is not None:
        inherited.watch(stop.set)
    router_id = f"{config.name or 'router'}-{secrets.token_hex(4)}"
    loop = asyncio.get_running_loop()
    registry = CollectorRegistry()
    ProcessCollector(registry=registry)
    metrics = RouterMetrics(registry)
    subjects = Subjects(config.namespace)
    bus = NatsBus(nats_config.from_settings(config, router_id))
    etcd = EtcdRegistry(etcd_config.from_settings(config))
    feed: FleetFeed | None = None
    try:
        async with asyncio.TaskGroup() as tasks:
            dispatch = Dispatch(
                bus=bus,
                subjects=subjects,
                router_id=router_id,
                limits=config.limits(),
                metrics=metrics,
                rng=random.Random(secrets.randbits(64)),
                clock=loop.time,
            )
            catalog = Catalog(
                bus=bus, subjects=subjects, router_id=router_id, tasks=tasks, wall_clock=time.time
            )
            feed = FleetFeed(
                bus=bus,
                registry=etcd,
                subjects=subjects,
                dispatch=dispatch,
                catalog=catalog,
                metrics=metrics,
            )
            server = _Server(
                config, bus, dispatch, catalog, feed, metrics, subjects, tasks, inherited
            )
            work = tasks.create_task(server.run(), name="serve")
            await _until_stopped(server, work, stop, stop_now)
            raise _Stopped
    except BaseExceptionGroup as group:
        _raise_the_cause(group)
    finally:
        for close in (feed.close if feed else None, etcd.close, bus.close):
            try:
                if close is not None:
                    await close()
            except Exception:  # noqa: BLE001  whatever fails, the rest is still left in order
                _log.exception("while leaving")


def _raise_the_cause(group: BaseExceptionGroup[BaseException]) -> None:
    """Nothing if we were told to stop; the operator's mistake as itself; else all of it."""
    rest = group.split(_Stopped)[1]
    if rest is None:
        return
    cause: BaseException = rest
    while isinstance(cause, BaseExceptionGroup):
        cause = cause.exceptions[0]
    raise (cause if isinstance(cause, ConfigError) else rest) from None


class _Stopped(Exception):
    """Ends the task group."""


async def _until_stopped(
    server: "_Server", work: "asyncio.Task[None]", stop: asyncio.Event, stop_now: asyncio.Event
) -> None:
    waiters = [asyncio.create_task(event.wait()) for event in (stop, stop_now)]
    try:
        await asyncio.wait([work, *waiters], return_when=asyncio.FIRST_COMPLETED)
        if work.done():
            work.result()
        work.cancel()  # one that is not ready yet shall not become so
        if not stop_now.is_set():
            await server.drain(waiters[1])
    finally:
        for waiter in waiters:
            waiter.cancel()
        await server.close()


class _Server:
    """The running parts, in the order they start and the reverse order they stop."""

    def __init__(
        self,
        config: RouterConfig,
        bus: NatsBus,
        dispatch: Dispatch,
        catalog: Catalog,
        feed: FleetFeed,
        metrics: RouterMetrics,
        subjects: Subjects,
        tasks: asyncio.TaskGroup,
        inherited: Inherited | None,
    ) -> None:
        self._config = config
        self._inherited = inherited
        self._bus = bus
        self._catalog = catalog
        self._dispatch = dispatch
        self._feed = feed
        self._tasks = tasks
        self._metrics = metrics
        front = Front(
            catalog,
            max_choices=config.max_choices,
            rng=random.Random(secrets.randbits(64)),
            wall_clock=time.time,
        )
        folder = inherited.folder if inherited is not None else ""
        self._family = Family(Path(folder)) if folder else None
        admin = Admin(
            family=self._family,
            dispatch=dispatch,
            catalog=catalog,
            metrics=metrics,
            state=self._state,
            is_accepting=self._tell_ready,
        )
        self._lag = LoopLag(self._looked)
        self._ready_asked_at = float("-inf")
        self._is_ready = True
        """What a balancer is told. Not false where a successor serves on the same port."""
        self._running = Running(dispatch, new_request_id)
        self._http = HttpApi(
            front=front,
            dispatch=dispatch,
            running=self._running,
            catalog=catalog,
            admin=admin,
            metrics=metrics,
            api_keys=config.api_keys,
            max_body_bytes=config.max_body_bytes,
            client_stall_s=config.client_stall_timeout_ms / 1e3,
            ping_s=config.ping_interval_ms / 1e3,
        )
        self._nats_api = NatsApi(
            bus=bus,
            subjects=subjects,
            front=front,
            dispatch=dispatch,
            running=self._running,
            tasks=tasks,
            max_body_bytes=config.max_body_bytes,
            models=lambda: models_body(catalog.names()),
        )
        self._runner = web.AppRunner(
            self._http.app(), handler_cancellation=True, access_log=None, shutdown_timeout=1.0
        )

    def _state(self) -> dict[str, Any]:
        return {
            "version": package_version(),
            "bus_up": self._bus.connected,
            "discovery_synced": self._feed.synced,
        }

    async def run(self) -> None:
        """Listen first (a taken port is the operator's error, and who waits is told why), then
        connect, then feed. A successor listens when it can serve."""
        inherited = self._inherited
        is_successor = inherited is not None and inherited.is_successor
        self._lag.start()
        await self._runner.setup()
        if not is_successor:
            await self._listen()
        self._bus.on_event(self._on_bus_event)
        await self._bus.start()
        await self._dispatch.start(self._tasks)
        await self._feed.start()
        await self._until_warm(must_sync=is_successor)
        if is_successor:
            await self._listen()
        await self._nats_api.start()
        _log.info(
            "router ready id=%s url=%s",
            self._dispatch.router_id,
            ",".join(
                site.name for site in self._runner.sites if not isinstance(site, web.UnixSite)
            ),
        )
        if inherited is not None:
            inherited.say_ready(self._config.drain_timeout_ms)
        await asyncio.Event().wait()

    async def _until_warm(self, *, must_sync: bool) -> None:
        """Until the fleet is known: who asks us before is told that nobody is there. Everybody who
        lives is heard within `WARM_S`, and at once when asked: but who is not listed yet counts
        for nothing."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + WARM_S
        has_asked = False
        while not self._is_warm():
            if self._catalog.listing_came and not has_asked:
                has_asked = self._dispatch.beats.announce()
            if must_sync and not self._catalog.listing_came:
                deadline = loop.time() + WARM_S
            elif loop.time() >= deadline:
                return
            await asyncio.sleep(WARM_LOOK_S)

    def _is_warm(self) -> bool:
        """Everybody listed was heard, and their text is here."""
        workers = self._dispatch.scheduler.workers()
        return (
            self._catalog.listing_came
            and not self._catalog.is_fetching
            and all(worker.live for worker in workers if worker.listed)
        )

    async def _listen(self) -> None:
        """On the parent's sockets, or our own."""
        config = self._config
        context = self._tls()
        if self._family is not None:
            try:
                await web.UnixSite(self._runner, str(self._family.socket)).start()
            except OSError as error:  # clients are served all the same
                _log.warning("the other routers cannot ask this one: %s", error)
        if self._inherited is not None:
            for listener in self._inherited.listeners:
                site = web.SockSite(self._runner, listener, ssl_context=context, backlog=BACKLOG)
                await site.start()
            return
        try:
            await web.TCPSite(self._runner, config.host, config.port, ssl_context=context).start()
        except OSError as error:
            raise ConfigError(
                f"cannot listen on {config.host}:{config.port}: {error.strerror or error}"
            ) from None

    def _tls(self) -> ssl.SSLContext | None:
        if not self._config.tls_cert:
            return None
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        try:
            context.load_cert_chain(self._config.tls_cert, self._config.tls_key)
        except (OSError, ssl.SSLError) as error:
            raise ConfigError(f"tls_cert: {error}") from None
        return context

    def _looked(self, late_s: float) -> None:
        """The loop has just shown that it runs."""
        self._metrics.loop_lag.observe(late_s)
        self._dispatch.pauses.awake()

    def _on_bus_event(self, event: BusEvent) -> None:
        if event.kind != "lost":
            self._metrics.bus_up.set(1 if event.kind == "up" else 0)

    async def drain(self, now: "asyncio.Task[bool]") -> None:
        """Finish what runs and what still comes on open connections, at most `drain_timeout_ms` or
        until `now` is done.

        With a successor on the same port we stop accepting at once. Without one a balancer has to
        notice first: for the grace, new connections are served, too; then they get a 503.
        """
        loop = asyncio.get_running_loop()
        began = loop.time()
        is_relieved = self._inherited is not None and self._inherited.is_relieved()
        self._http.closes_connections = True
        self._http.connections.start_drain(began, self._open_connections())
        self._is_ready = is_relieved
        _log.info("draining requests=%d relieved=%s", len(self._running), is_relieved)
        if is_relieved:
            for site in list(self._runner.sites):
                if not isinstance(site, web.UnixSite):  # the others may still ask
                    await site.stop()
        await self._nats_api.close()
        grace_s = self._config.idle_grace_ms / 1e3
        deadline = began + self._config.drain_timeout_ms / 1e3
        stay_until = began + self._stay_s(grace_s, is_relieved=is_relieved)
        while (
            not now.done()
            and loop.time() < deadline
            and (self._has_guests() or loop.time() < stay_until)
        ):
            await self._close_forsaken(grace_s)
            if not is_relieved and loop.time() - began >= grace_s:
                self._http.accepting = False
            await asyncio.wait([now], timeout=LOOK_S)

    def _stay_s(self, grace_s: float, *, is_relieved: bool) -> float:
        """How long to stay though nobody is there: a balancer that asks `/ready` has not noticed
        yet and sends more, and connections in a TLS handshake cannot be seen."""
        asked_s = asyncio.get_running_loop().time() - self._ready_asked_at
        stay_s = grace_s if asked_s < PROBED_S and not is_relieved else 0.0
        return max(stay_s, HANDSHAKE_S) if self._config.tls_cert else stay_s

    def _tell_ready(self) -> bool:
        self._ready_asked_at = asyncio.get_running_loop().time()
        return self._is_ready

    def _has_guests(self) -> bool:
        """Somebody is served, or may still ask on a connection that is open."""
        return bool(self._open_connections()) or len(self._running) > 0

    def _open_connections(self) -> list[web.RequestHandler]:
        server = self._runner.server
        return server.connections if server is not None else []

    async def _close_forsaken(self, grace_s: float) -> None:
        """Those that were idle for so long. A request that is here already is still answered: its
        handler has begun after some turns of the loop."""
        connections = self._http.connections
        now = asyncio.get_running_loop().time()
        forsaken = connections.forsaken(self._open_connections(), now, grace_s)
        for connection in forsaken:
            connection.close()  # takes nothing new; aiohttp leaves an idle one open all the same
        for _ in range(TURNS if forsaken else 0):
            await asyncio.sleep(0)
        for connection in connections.forsaken(forsaken, now, grace_s):
            transport = connection.transport
            connection.force_close()
            if transport is not None:
                transport.abort()  # TLS would wait half a minute for the client's goodbye

    async def close(self) -> None:
        """Whoever is still waiting is told so, then the workers are."""
        self._http.accepting = self._is_ready = False
        if len(self._running):
            _log.warning("leaving, aborting requests=%d", len(self._running))
        text = "the router is shutting down"
        self._running.abort_all(ClientError(503, text, code="shutting_down", retry_after_s=1))
        if self._family is not None:
            self._family.leave()
        await self._runner.cleanup()
        self._lag.stop()
        self._dispatch.leave()
