"""One worker process: builds the engine and its surroundings and runs them until told to stop."""

import asyncio
import logging
import os
import secrets
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import msgspec
from prometheus_client import start_http_server

from discovery import etcd_config
from discovery.etcd import EtcdRegistry
from discovery.registry import Registration, TwinAlive
from protocol import nats_config
from protocol.bus import Bus
from protocol.codec import decode_pong, encode
from protocol.errors import BadMessage, BusTimeout, ConfigError, NoResponders
from protocol.jobs import JobEnvelope, Ping
from protocol.nats_bus import NatsBus
from protocol.subjects import Subjects
from protocol.worker_info import WorkerInfo
from worker.config import WorkerConfig
from worker.engine.base import Engine, EngineInfo
from worker.engine.build import build_engine
from worker.metrics import worker_registry
from worker.service import Service

_log = logging.getLogger("baton.worker")

PING_TIMEOUT_S = 1.0


async def run_worker(config: WorkerConfig, stop: asyncio.Event, stop_now: asyncio.Event) -> int:
    """Serve until `stop` (drain, then leave) or `stop_now`. Returns the exit code; where a transfer
    is still live the process ends here, by `os._exit`. Raises ConfigError."""
    config.check()
    incarnation = secrets.token_hex(6)
    worker = config.name or f"{config.role}-{secrets.token_hex(3)}"
    engine = build_engine(config, worker=worker, incarnation=incarnation)
    bus = NatsBus(nats_config.from_settings(config, worker))
    registry = EtcdRegistry(etcd_config.from_settings(config))
    loop = asyncio.get_running_loop()
    subjects = Subjects(config.namespace)
    service = Service(
        bus=bus,
        subjects=subjects,
        engine=engine,
        worker=worker,
        incarnation=incarnation,
        linger_s=config.linger_ms / 1e3,
        router_timeout_s=config.router_timeout_ms / 1e3,
        clock=loop.time,
    )
    running = _Running(config, bus, subjects, engine, service, registry, worker, incarnation)
    try:
        return await running.run(stop, stop_now)
    finally:
        await running.close()


@dataclass(slots=True)
class _Running:
    """The parts of a running worker, and the order they start and stop in."""

    config: WorkerConfig
    bus: NatsBus
    subjects: Subjects
    engine: Engine
    service: Service
    registry: EtcdRegistry
    worker: str
    incarnation: str
    registration: Registration | None = None
    metrics_server: Any = None

    async def run(self, stop: asyncio.Event, stop_now: asyncio.Event) -> int:
        engine_info = await self.engine.start(self.service)
        info = self._info(engine_info)
        self._serve_metrics(info)
        try:
            async with asyncio.TaskGroup() as tasks:
                main = tasks.create_task(self._serve(info, engine_info), name="serve")
                await self._until_stopped(info, main, stop, stop_now)
                raise _Stopped
        except* _Stopped:
            pass
        except* TwinAlive as group:
            raise ConfigError(str(group.exceptions[0])) from None
        return 0

    def _info(self, engine: EngineInfo) -> WorkerInfo:
        config = self.config
        assets = engine.assets
        return WorkerInfo(
            worker_id=self.worker,
            incarnation=self.incarnation,
            role=config.role,
            model=config.served_model_name,
            model_digest=engine.model_digest,
            layout=engine.layout,
            capacity=engine.capacity,
            engine=engine.engine,
            traits=engine.traits,
            assets_digest=assets.digest if assets is not None else "",
            transports=list(engine.transports),
            host=socket.gethostname(),
            started_at_ms=int(time.time() * 1000),
            labels=config.labels,
        )

    def _serve_metrics(self, info: WorkerInfo) -> None:
        port = self.config.metrics_port
        if port == 0:
            return
        registry = worker_registry(self.engine, self.service.outbox, info)
        try:
            server, _ = start_http_server(max(port, 0), self.config.host, registry)
        except OSError as error:
            raise ConfigError(
                f"cannot serve metrics on {self.config.host}:{port}: {error.strerror}"
            ) from None
        self.metrics_server = server
        _log.info("metrics url=http://%s:%d/metrics", self.config.host, server.server_port)

    async def _serve(self, info: WorkerInfo, engine_info: EngineInfo) -> None:
        """Listen for jobs before anybody can read of us."""
        await self.bus.start()
        await self.service.start(info, engine_info)
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self.service.run(), name="service")
            self.registration = await self.registry.register(
                info, ttl_s=self.config.etcd_ttl_ms / 1e3, is_alive=_pinger(self.bus, self.subjects)
            )
            _log.info(
                "worker ready worker=%s incarnation=%s role=%s model=%s engine=%s transports=%s",
                info.worker_id,
                info.incarnation,
                info.role,
                info.model,
                info.engine,
                ",".join(info.transports),
            )

    async def _until_stopped(
        self,
        info: WorkerInfo,
        main: "asyncio.Task[None]",
        stop: asyncio.Event,
        stop_now: asyncio.Event,
    ) -> None:
        waiters = [asyncio.ensure_future(stop.wait()), asyncio.ensure_future(stop_now.wait())]
        try:
            await asyncio.wait([main, *waiters], return_when=asyncio.FIRST_COMPLETED)
            if main.done():
                await main
            if not stop_now.is_set():
                await self._drain(info, stop_now)
        finally:
            for waiter in waiters:
                waiter.cancel()

    async def _drain(self, info: WorkerInfo, stop_now: asyncio.Event) -> None:
        """Take nothing new, finish what runs, wait for lent blocks to come back."""
        _log.info("draining worker=%s", self.worker)
        self.service.refuse("draining")
        if self.registration is not None:
            await self.registration.update(msgspec.structs.replace(info, draining=True))
        drained = asyncio.ensure_future(self.engine.drain())
        now = asyncio.ensure_future(stop_now.wait())
        try:
            async with asyncio.timeout(self.config.drain_timeout_ms / 1e3):
                await asyncio.wait([drained, now], return_when=asyncio.FIRST_COMPLETED)
        except TimeoutError:
            _log.warning("drain deadline passed worker=%s", self.worker)
        finally:
            drained.cancel()
            now.cancel()

    async def close(self) -> None:
        """Leave in an order that harms nobody: key first, then what was said, then memory."""
        if self.metrics_server is not None:
            self.metrics_server.shutdown()
            self.metrics_server.server_close()
        if self.registration is not None:
            await self.registration.close()
        self.service.close()
        await self.registry.close()
        await self.bus.close()
        if not await self.engine.stop():
            _log.warning("a transfer is still live: leaving without clean-up")
            logging.shutdown()
            os._exit(0)


class _Stopped(Exception):
    """Ends the task group."""


def _pinger(bus: Bus, subjects: Subjects) -> Callable[[WorkerInfo], Any]:
    """Does the process that holds our name still answer? Silence is an answer: no. An absent bus
    is not: it raises, and the registry asks again."""

    async def is_alive(info: WorkerInfo) -> bool:
        ask = encode(JobEnvelope("newcomer", [Ping()]))
        try:
            subject = subjects.jobs(info.worker_id, info.incarnation)
            reply = await bus.request(subject, ask, timeout_s=PING_TIMEOUT_S)
            return decode_pong(reply.payload).incarnation == info.incarnation
        except (NoResponders, BusTimeout, BadMessage):
            return False

    return is_alive
