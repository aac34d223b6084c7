"""One router process: builds the parts from a config and runs them until told to stop."""

import asyncio
import logging
import random
import secrets
import ssl
import time
from typing import Any

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
from router.fleet_feed import FleetFeed
from router.http import HttpApi, new_request_id
from router.metrics import RouterMetrics
from router.nats_api import NatsApi, models_body
from router.requests import Front
from router.running import Running

_log = logging.getLogger("baton.router")


async def run_router(config: RouterConfig, stop: asyncio.Event, stop_now: asyncio.Event) -> None:
    """Serve until `stop` (drain, then leave) or `stop_now`. Raises ConfigError."""
    config.check()
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
            server = _Server(config, bus, dispatch, catalog, feed, metrics, subjects, tasks)
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
    ) -> None:
        self._config = config
        self._bus = bus
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
        admin = Admin(
            dispatch=dispatch,
            catalog=catalog,
            metrics=metrics,
            state=self._state,
            is_accepting=lambda: self._http.accepting,
        )
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
        """Listen first (a taken port is the operator's error), then connect, then feed."""
        await self._runner.setup()
        await self._listen()
        self._bus.on_event(self._on_bus_event)
        await self._bus.start()
        await self._dispatch.start(self._tasks)
        await self._feed.start()
        await self._nats_api.start()
        _log.info(
            "router ready id=%s url=%s://%s:%d",
            self._dispatch.router_id,
            "https" if self._config.tls_cert else "http",
            self._config.host,
            self._config.port,
        )
        await asyncio.Event().wait()

    async def _listen(self) -> None:
        config = self._config
        context = None
        if config.tls_cert:
            context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
            try:
                context.load_cert_chain(config.tls_cert, config.tls_key)
            except (OSError, ssl.SSLError) as error:
                raise ConfigError(f"tls_cert: {error}") from None
        try:
            site = web.TCPSite(self._runner, config.host, config.port, ssl_context=context)
            await site.start()
        except OSError as error:
            raise ConfigError(
                f"cannot listen on {config.host}:{config.port}: {error.strerror or error}"
            ) from None

    def _on_bus_event(self, event: BusEvent) -> None:
        if event.kind != "lost":
            self._metrics.bus_up.set(1 if event.kind == "up" else 0)

    async def drain(self, now: "asyncio.Task[bool]") -> None:
        """Refuse new work, finish what runs, at most `drain_timeout_ms` or until `now` is done."""
        self._http.accepting = False
        await self._nats_api.close()
        _log.info("draining requests=%d", len(self._running))
        idle = asyncio.create_task(self._running.idle(), name="idle")
        limit_s = self._config.drain_timeout_ms / 1e3
        await asyncio.wait([idle, now], timeout=limit_s, return_when=asyncio.FIRST_COMPLETED)
        idle.cancel()

    async def close(self) -> None:
        """Whoever is still waiting is told so, then the workers are."""
        self._http.accepting = False
        if len(self._running):
            _log.warning("leaving, aborting requests=%d", len(self._running))
            text = "the router is shutting down"
            self._running.abort_all(ClientError(503, text, code="shutting_down", retry_after_s=1))
        await self._runner.cleanup()
        self._dispatch.leave()
