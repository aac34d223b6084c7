"""A router and its workers in one process, over a bus and a registry in memory.

Engines, pools, leases and transports are real; only the network and the model are not.
"""

import asyncio
import random
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from itertools import count

from prometheus_client import CollectorRegistry

from discovery.memory import MemoryRegistry, MemoryServer
from protocol.blocks import pack_ids
from protocol.errors import ClientError
from protocol.jobs import Tokens
from protocol.memory_bus import MemoryBus, MemoryHub
from protocol.out import Delta
from protocol.sampling import Sampling
from protocol.subjects import Subjects
from protocol.worker_info import Role, WorkerInfo
from router.catalog import Catalog
from router.choices import Choice, ChoiceSpec
from router.dispatch import Dispatch
from router.fleet_feed import FleetFeed
from router.metrics import RouterMetrics
from router.scheduling.limits import Limits
from tests.unit.worker.engine_world import GatedRunner, HeldTransfer
from text.assets import ModelAssets, byte_assets
from worker.engine.runner import ModelRunner
from worker.engine.simulated import SimulatedConfig, SimulatedRunner
from worker.engine.stepper import Stepper, StepperConfig
from worker.kv.arena import Arena, LeaseTable, ScratchWords
from worker.service import Service
from worker.transfer.shm import ShmTransfer

PATIENCE_S = 15.0
SUBJECTS = Subjects("test")
SMALL = SimulatedConfig(name="m", num_blocks=256, block_size=4, kv_bytes_per_token=16)
LIMITS = Limits(
    accept_timeout_s=1.0,
    silence_timeout_s=1.0,
    replay_timeout_s=0.3,
    stall_timeout_s=1.0,
    prefill_timeout_s=3.0,
    kv_transfer_timeout_s=3.0,
    suspect_s=0.2,
)


@dataclass
class Client:
    """Listens to one choice."""

    spec: ChoiceSpec
    deltas: list[Delta] = field(default_factory=list)
    error: ClientError | None = None
    over: bool = False
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    on_delta: Callable[[Delta], None] | None = None

    def delta(self, choice: Choice, delta: Delta) -> None:
        assert not self.over
        assert delta.index == len(self.ids), "a gap or a repeat"
        self.deltas.append(delta)
        self.changed.set()
        if self.on_delta is not None:
            self.on_delta(delta)

    def ended(self, choice: Choice, error: ClientError | None) -> None:
        assert not self.over, "ended twice"
        self.over, self.error = True, error
        self.changed.set()

    @property
    def ids(self) -> list[int]:
        return [token for delta in self.deltas for token in delta.ids]

    @property
    def text(self) -> str:
        return "".join(delta.text for delta in self.deltas)

    @property
    def finish(self) -> str:
        return self.deltas[-1].finish if self.deltas else ""

    async def until(self, condition: Callable[[], object]) -> None:
        async with asyncio.timeout(PATIENCE_S):
            while not condition():
                self.changed.clear()
                await self.changed.wait()

    async def end(self) -> None:
        await self.until(lambda: self.over)


@dataclass
class RouterSide:
    dispatch: Dispatch
    metrics: RouterMetrics
    feed: FleetFeed
    bus: MemoryBus

    def sample(self, name: str, **labels: str) -> float:
        return self.metrics.registry.get_sample_value(name, labels) or 0.0

    def events(self, kind: str) -> float:
        """`baton_events_total` of a kind, over all causes."""
        found = 0.0
        for metric in self.metrics.notes.collect():
            for sample in metric.samples:
                if sample.name.endswith("_total") and sample.labels["kind"] == kind:
                    found += sample.value
        return found


@dataclass
class WorkerSide:
    service: Service
    engine: Stepper
    runner: GatedRunner
    transfer: HeldTransfer
    bus: MemoryBus
    info: WorkerInfo


class PathWorld:
    """Made by `path`."""

    def __init__(self, hub: MemoryHub, stack: AsyncExitStack, config: SimulatedConfig) -> None:
        self.hub = hub
        self.config = config
        self.server = MemoryServer()
        self.routers: list[RouterSide] = []
        self.workers: list[WorkerSide] = []
        self.exits: list[int] = []
        """Codes with which workers would have ended their processes."""
        self._stack = stack
        self._numbers = count(1)

    @property
    def router(self) -> RouterSide:
        return self.routers[0]

    def by_role(self, role: Role) -> list[WorkerSide]:
        return [worker for worker in self.workers if worker.info.role == role]

    def submit(
        self, prompt: Sequence[int], sampling: Sampling, router: RouterSide | None = None
    ) -> Client:
        prompt_ids = Tokens(pack_ids(prompt))
        number = next(self._numbers)
        spec = ChoiceSpec(f"q{number}/0", 0, "m", prompt_ids, len(prompt), sampling)
        client = Client(spec)
        (router or self.router).dispatch.submit(spec, client)
        return client

    async def clean(self) -> None:
        """Until every worker is idle; then nothing may be left anywhere."""
        async with asyncio.timeout(PATIENCE_S):
            for worker in self.workers:
                await worker.engine.drain()
        for router in self.routers:
            scheduler = router.dispatch.scheduler
            scheduler.validate()
            assert router.dispatch.num_inflight == scheduler.num_inflight == 0
            assert router.dispatch.num_attempts == 0
            assert [view.num_reservations for view in scheduler.workers()] == [0] * len(
                scheduler.workers()
            )
        for worker in self.workers:
            load = worker.engine.load()
            assert load.running == load.waiting == load.lent_blocks == 0
            assert load.quarantined_blocks == 0
            assert load.free_blocks == load.num_blocks
            assert worker.service.outbox.num_open == 0

    async def add_router(self, name: str = "router", limits: Limits = LIMITS) -> RouterSide:
        bus = await self._bus()
        tasks = await self._stack.enter_async_context(_cancelled_at_the_end())
        metrics = RouterMetrics(CollectorRegistry())
        dispatch = Dispatch(
            bus=bus,
            subjects=SUBJECTS,
            router_id=name,
            limits=limits,
            metrics=metrics,
            rng=random.Random(1),
            clock=asyncio.get_running_loop().time,
        )
        catalog = Catalog(
            bus=bus, subjects=SUBJECTS, router_id=name, tasks=tasks, wall_clock=lambda: 0.0
        )
        registry = MemoryRegistry(self.server, "test")
        feed = FleetFeed(
            bus=bus,
            registry=registry,
            subjects=SUBJECTS,
            dispatch=dispatch,
            catalog=catalog,
            metrics=metrics,
        )
        await dispatch.start(tasks)
        await feed.start()
        self._stack.push_async_callback(registry.close)
        self._stack.push_async_callback(feed.close)
        self._stack.callback(dispatch.leave)
        self.routers.append(RouterSide(dispatch, metrics, feed, bus))
        return self.routers[-1]

    def model(self, wait: Callable[[float], object]) -> tuple[ModelRunner, ModelAssets]:
        """What one worker computes with."""
        assets = byte_assets(self.config.name, max_context=self.config.max_context)
        return SimulatedRunner(self.config, assets, wait=wait), assets

    async def add_worker(self, role: Role, name: str, *, hold: bool = False) -> WorkerSide:
        bus = await self._bus()
        loop = asyncio.get_running_loop()
        config, stopping = self.config, threading.Event()
        model, assets = self.model(stopping.wait)
        runner = GatedRunner(model, loop)
        transfer = HeldTransfer(ShmTransfer(), hold=hold)
        engine = Stepper(
            runner,
            Arena(config.num_blocks, runner.layout.block_bytes),
            LeaseTable(config.num_leases),
            ScratchWords(config.num_scratch),
            [transfer],
            StepperConfig(name, f"{name}-1", validate=True),
            assets,
            interrupt=stopping.set,
        )
        service = Service(
            bus=bus,
            subjects=SUBJECTS,
            engine=engine,
            worker=name,
            incarnation=f"{name}-1",
            linger_s=60.0,
            router_timeout_s=15.0,
            clock=loop.time,
            end_process=self.exits.append,
        )
        made = await engine.start(service)
        self._stack.push_async_callback(engine.stop)
        self._stack.callback(runner.open)
        info = WorkerInfo(
            name,
            f"{name}-1",
            role,
            config.name,
            made.model_digest,
            made.layout,
            made.capacity,
            "simulated",
            assets_digest=assets.digest,
        )
        await service.start(info, made)
        tasks = await self._stack.enter_async_context(_cancelled_at_the_end())
        tasks.create_task(service.run())
        self._stack.callback(service.close)
        registry = MemoryRegistry(self.server, "test")
        await registry.register(info, ttl_s=10.0, is_alive=_nobody)
        self._stack.push_async_callback(registry.close)
        self.workers.append(WorkerSide(service, engine, runner, transfer, bus, info))
        return self.workers[-1]

    async def live(self) -> None:
        """Until every router could send work to every worker."""
        async with asyncio.timeout(PATIENCE_S):
            while not all(self._sees_all(router) for router in self.routers):
                for worker in self.workers:
                    worker.service.telemetry.report()
                await self.workers[0].bus.flush(timeout_s=PATIENCE_S)
                await asyncio.sleep(0)

    def _sees_all(self, router: RouterSide) -> bool:
        views = router.dispatch.scheduler.workers()
        return len(views) == len(self.workers) and all(view.eligible for view in views)

    async def _bus(self) -> MemoryBus:
        bus = MemoryBus(self.hub, close_timeout_s=0.2)
        await bus.start()
        self._stack.push_async_callback(bus.close)
        return bus


async def _nobody(_: WorkerInfo) -> bool:
    return False


@asynccontextmanager
async def _cancelled_at_the_end() -> AsyncIterator[asyncio.TaskGroup]:
    """A task group whose body's exception comes out as it is."""

    class Over(Exception):
        pass

    failure: BaseException | None = None
    try:
        async with asyncio.TaskGroup() as tasks:
            try:
                yield tasks
            except BaseException as error:  # noqa: BLE001
                failure = error
            raise Over
    except* Over:
        pass
    if failure is not None:
        raise failure


@asynccontextmanager
async def path(
    prefill: int = 1,
    decode: int = 1,
    *,
    both: int = 0,
    hold: bool = False,
    config: SimulatedConfig = SMALL,
    limits: Limits = LIMITS,
) -> AsyncIterator[PathWorld]:
    """`hold`: the decode workers' transfers end when the test lets them."""
    async with AsyncExitStack() as stack:
        world = PathWorld(MemoryHub(detect_s=0.3), stack, config)
        await world.add_router(limits=limits)
        for number in range(prefill):
            await world.add_worker("prefill", f"p{number}")
        for number in range(decode):
            await world.add_worker("decode", f"d{number}", hold=hold)
        for number in range(both):
            await world.add_worker("both", f"b{number}")
        await world.live()
        yield world
        assert world.exits == []
