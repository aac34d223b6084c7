"""The processes of a simulated fleet: one life of a worker, one life of a router.

Everything in them is the product's own, put together as its `main` files do; only the engine's
thread, the transport, the bus's and the registry's servers are simulated.
"""

import asyncio
import random
from collections.abc import Callable
from contextvars import Context, copy_context
from dataclasses import replace

import msgspec
from prometheus_client import CollectorRegistry

from discovery.memory import MemoryRegistry, MemoryServer
from discovery.registry import TwinAlive
from protocol.subjects import Subjects
from protocol.worker_info import Role, WorkerInfo
from router.catalog import Catalog
from router.dispatch import Dispatch
from router.fleet_feed import FleetFeed
from router.metrics import RouterMetrics
from router.scheduling.limits import Limits
from tests.sim.bus import SimBus, SimHub
from tests.sim.engine import SimEngine
from tests.sim.idleness import IdleWatch
from tests.sim.loop import Process, SimLoop
from tests.sim.transfer import Fabric, SimTransfer
from worker.config import WorkerConfig
from worker.engine.base import EngineInfo
from worker.engine.messages import StepperConfig
from worker.engine.simulated import SimulatedConfig
from worker.main import _Running
from worker.service import Service

SUBJECTS = Subjects("sim")


class SimServer(MemoryServer):
    """The registry's server: its timers are nobody's, so that no frozen client stops them."""

    def __init__(self) -> None:
        self._context: Context = copy_context()
        super().__init__()

    def _arm(self) -> None:
        self._context.run(super()._arm)


class _Life(_Running):
    """The product's own way to start, drain and leave."""

    def _info(self, engine: EngineInfo) -> WorkerInfo:
        return msgspec.structs.replace(super()._info(engine), started_at_ms=0, host="sim")

    def _exit(self, error: BaseException | None) -> None:
        raise SystemExitSeen


class SystemExitSeen(Exception):
    """`os._exit` was called."""


class SimWorker:
    """One incarnation of a worker."""

    def __init__(
        self,
        loop: SimLoop,
        hub: SimHub,
        server: MemoryServer,
        fabric: Fabric,
        rng: random.Random,
        *,
        name: str,
        life: int,
        role: Role,
        model: SimulatedConfig,
        stepper: StepperConfig,
        config: WorkerConfig,
        on_exit: "Callable[[SimWorker, str], None]",
    ) -> None:
        self.name = name
        self.role: Role = role
        self.incarnation = f"{name}-{life}"
        self.process = Process(loop, self.incarnation)
        self.ready_at: float | None = None
        """When it was registered."""
        self.why_over = ""
        self.leaving = False
        self._hub = hub
        self._on_exit = on_exit
        self._stop = asyncio.Event()
        self._now = asyncio.Event()
        stepper = replace(stepper, worker=name, incarnation=self.incarnation)
        transfer = SimTransfer(fabric, self.process)
        self.engine = SimEngine(self.process, model, [transfer], stepper, rng)
        self.bus = SimBus(hub, self.process)
        self.registry = MemoryRegistry(server, "sim", jitter=rng.random)
        self.service = Service(
            bus=self.bus,
            subjects=SUBJECTS,
            engine=self.engine,
            worker=name,
            incarnation=self.incarnation,
            linger_s=config.linger_ms / 1e3,
            router_timeout_s=config.router_timeout_ms / 1e3,
            clock=loop.time,
            end_process=lambda _code: self.end("unhealthy"),
        )
        self.running = _Life(
            config, self.bus, SUBJECTS, self.engine, self.service, self.registry, name,
            self.incarnation,
        )  # type: ignore[arg-type]  # fmt: skip
        self.process.spawn(self._live(), "main")

    @property
    def alive(self) -> bool:
        return self.process.alive

    @property
    def registered(self) -> bool:
        """Its key is written."""
        return self.running.registration is not None

    def leave(self) -> None:
        """SIGTERM."""
        self.leaving = True
        self.process.call(self._stop.set)

    def end(self, why: str) -> None:
        """The process is over, however: the kernel closes what it had open."""
        if self.process.alive:
            self.why_over = why
            self.process.kill()
            self._hub.bury(self.process)
            self._on_exit(self, why)

    def close_memory(self) -> None:
        self.engine.arena.close()
        self.engine.leases.close()

    async def _live(self) -> None:
        why = "left"
        try:
            try:
                await self.running.run(self._stop, self._now)
            except TwinAlive as twin:
                why = "twin"
                await self.running.close(twin)
            else:
                await self.running.close(None)
        except SystemExitSeen:
            pass
        self.end(why)


class SimRouter:
    """One life of a router."""

    def __init__(
        self,
        loop: SimLoop,
        hub: SimHub,
        server: MemoryServer,
        rng: random.Random,
        *,
        name: str,
        life: int,
        limits: Limits,
        on_exit: "Callable[[SimRouter], None]",
    ) -> None:
        self.name = name
        self.router_id = f"{name}-{life}"
        self.process = Process(loop, self.router_id)
        self.started_at = loop.time()
        self.ready = False
        self._hub = hub
        self._on_exit = on_exit
        self._rng = rng
        self.metrics = RouterMetrics(CollectorRegistry())
        self.bus = SimBus(hub, self.process)
        self.dispatch = Dispatch(
            bus=self.bus,
            subjects=SUBJECTS,
            router_id=self.router_id,
            limits=limits,
            metrics=self.metrics,
            rng=rng,
            clock=loop.time,
        )
        self.idleness = IdleWatch(self.dispatch.scheduler)
        self.registry = MemoryRegistry(server, "sim", jitter=rng.random)
        self.feed: FleetFeed | None = None
        self.process.spawn(self._live(), "main")

    @property
    def alive(self) -> bool:
        return self.process.alive

    @property
    def accepting(self) -> bool:
        """A client finds an open door, and the list of workers has come."""
        return self.alive and self.ready and self.feed is not None and self.feed.synced

    def end(self) -> None:
        if self.process.alive:
            self.process.kill()
            self._hub.bury(self.process)
            self._on_exit(self)

    async def _live(self) -> None:
        async with asyncio.TaskGroup() as tasks:
            catalog = Catalog(
                bus=self.bus,
                subjects=SUBJECTS,
                router_id=self.router_id,
                tasks=tasks,
                wall_clock=lambda: 0.0,
            )
            self.feed = FleetFeed(
                bus=self.bus,
                registry=self.registry,
                subjects=SUBJECTS,
                dispatch=self.dispatch,
                catalog=catalog,
                metrics=self.metrics,
            )
            await self.bus.start()
            await self.dispatch.start(tasks)
            await self.feed.start()
            self.ready = True
            await asyncio.Event().wait()
