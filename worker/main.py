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
from protocol.errors import BadMessage, BusError, BusTimeout, ConfigError, NoResponders
from protocol.jobs import JobEnvelope, Ping
from protocol.nats_bus import NatsBus
from protocol.subjects import Subjects
from protocol.worker_info import WorkerInfo, problem
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
        await running.run(stop, stop_now)
    except TwinAlive as twin:
        await running.close(twin)
        raise ConfigError(str(twin)) from None
    except BaseException as error:
        await running.close(error)
        raise
    await running.close(None)
    return 0


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
    info: WorkerInfo | None = None
    metrics_server: Any = None
    is_loading: bool = False
    """The engine's start has begun and not ended."""

    async def run(self, stop: asyncio.Event, stop_now: asyncio.Event) -> None:
        """Returns when it is time to leave. Raises ConfigError, TwinAlive."""
        serving = asyncio.create_task(self._serve(), name="serve")
        waiters = [
            asyncio.create_task(event.wait(), name="until stopped") for event in (stop, stop_now)
        ]
        try:
            await asyncio.wait([serving, *waiters], return_when=asyncio.FIRST_COMPLETED)
            if not serving.done() and not stop_now.is_set():
                await self._drain(serving, waiters[1])
            if serving.done():
                serving.result()
        finally:
            for task in (serving, *waiters):
                task.cancel()
            await asyncio.wait([serving, *waiters])

    def _info(self, engine: EngineInfo) -> WorkerInfo:
        config = self.config
        assets = engine.assets
        info = WorkerInfo(
            worker_id=self.worker,
            incarnation=self.incarnation,
            role=config.role,
            model=config.served_model_name or engine.model_name,
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
            transport_reasons=dict(engine.transport_reasons),
        )
        if why := problem(info):
            raise ConfigError(f"no router would believe in this worker: {why}")
        return info

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

    async def _serve(self) -> None:
        """Listen for jobs before anybody can read of us, then serve for ever."""
        self.is_loading = True
        try:
            engine_info = await self.engine.start(self.service)
        except Exception:
            self.is_loading = False
            raise
        self.is_loading = False
        info = self.info = self._info(engine_info)
        self._serve_metrics(info)
        await self.bus.start()
        await self.service.start(info, engine_info)
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
        await self.service.run()

    async def _drain(self, serving: "asyncio.Task[None]", now: "asyncio.Task[bool]") -> None:
        """Take nothing new, finish what runs, wait for lent blocks to come back."""
        if self.registration is None or self.info is None:
            return  # nobody has heard of us yet
        _log.info("draining worker=%s", self.worker)
        self.service.refuse("draining")
        drained = asyncio.create_task(self._finish(self.registration, self.info), name="drain")
        limit_s = self.config.drain_timeout_ms / 1e3
        done, _ = await asyncio.wait(
            [drained, now, serving], timeout=limit_s, return_when=asyncio.FIRST_COMPLETED
        )
        if not done:
            _log.warning("drain deadline passed worker=%s", self.worker)
        drained.cancel()
        await asyncio.wait([drained])
        if not drained.cancelled():
            drained.result()

    async def _finish(self, registration: Registration, info: WorkerInfo) -> None:
        await registration.update(msgspec.structs.replace(info, draining=True))
        await self.engine.drain()

    async def close(self, error: BaseException | None) -> None:
        """Leave in an order that harms nobody: say so, take the key away, give back the memory."""
        if self.is_loading:
            _log.info("leaving while the engine is still loading")
            self._exit(error)
        for step in (
            self._say_goodbye,
            self._deregister,
            self._close_metrics,
            self.registry.close,
            self.bus.close,
        ):
            try:
                await step()
            except Exception:  # noqa: BLE001  whatever fails, the rest must still be left in order
                _log.exception("while leaving")
        if not await self.engine.stop():
            _log.warning("a transfer is still live: leaving without clean-up")
            self._exit(error)

    async def _deregister(self) -> None:
        if self.registration is not None:
            await self.registration.close()

    async def _say_goodbye(self) -> None:
        self.service.close()

    async def _close_metrics(self) -> None:
        server = self.metrics_server
        if server is not None:
            await asyncio.to_thread(server.shutdown)
            server.server_close()

    def _exit(self, error: BaseException | None) -> None:
        """Without clean-up: threads may be in the middle of something that cannot be cancelled."""
        if error is not None:
            _log.critical("leaving because of %r", error)
        logging.shutdown()
        os._exit(1 if error else 0)


def _pinger(bus: Bus, subjects: Subjects) -> Callable[[WorkerInfo], Any]:
    """Does the process that holds our name still answer? Silence is an answer: no. An absent bus
    is not: it raises, and the registry asks again."""

    async def is_alive(info: WorkerInfo) -> bool:
        ask = encode(JobEnvelope("newcomer", [Ping()]))
        if not bus.connected:
            await asyncio.sleep(PING_TIMEOUT_S)  # as long as an answer may take
            raise BusError("the bus is away")
        try:
            subject = subjects.jobs(info.worker_id, info.incarnation)
            reply = await bus.request(subject, ask, timeout_s=PING_TIMEOUT_S)
            return decode_pong(reply.payload).incarnation == info.incarnation
        except BusTimeout:
            if not bus.connected:
                raise
            return False
        except (NoResponders, BadMessage):
            return False

    return is_alive
