"""The driver with the real scheduler, and workers that say on the wire what the test wants."""

import asyncio
import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from prometheus_client import CollectorRegistry

from protocol.blocks import pack_ids
from protocol.bus import Message
from protocol.codec import decode_beat, decode_jobs, encode
from protocol.events import Beat, LoadReport
from protocol.handoff import KvHandle
from protocol.jobs import Job, JobEnvelope, Tokens
from protocol.memory_bus import MemoryBus, MemoryHub
from protocol.out import Delta, Out, OutEnvelope
from protocol.sampling import Sampling
from protocol.subjects import Subjects
from protocol.worker_info import Capacity, KvLayout, Role, WorkerInfo
from router.choices import ChoiceSpec
from router.dispatch import Dispatch
from router.metrics import RouterMetrics
from router.scheduling import events as ev
from router.scheduling.limits import Limits
from tests.integration.path_world import Client

PATIENCE_S = 10.0
SUBJECTS = Subjects("test")
REPORT = LoadReport(0, 0, 64, 64, 0, 0, 0, 0)


@dataclass
class WireWorker:
    """One worker's end of the bus."""

    name: str
    incarnation: str
    bus: MemoryBus
    envelopes: list[JobEnvelope] = field(default_factory=list)
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    seq: int = 0

    async def listen(self) -> None:
        subject = SUBJECTS.jobs(self.name, self.incarnation)
        self.subscription = await self.bus.subscribe(subject, self._on_jobs)

    def _on_jobs(self, message: Message) -> None:
        self.envelopes.append(decode_jobs(message.payload))
        self.changed.set()

    @property
    def jobs(self) -> list[Job]:
        return [job for envelope in self.envelopes for job in envelope.jobs]

    def say(self, *outs: Out) -> None:
        self.seq += 1
        envelope = OutEnvelope(self.name, self.incarnation, self.seq, [*outs])
        self.bus.publish(SUBJECTS.out("router", self.name), encode(envelope))

    async def until(self, condition: Callable[[], object]) -> None:
        async with asyncio.timeout(PATIENCE_S):
            while not condition():
                self.changed.clear()
                await self.changed.wait()

    async def job(self, kind: type[Job], number: int = 0) -> Job:
        """The `number`th job of this kind, when it is here."""
        await self.until(lambda: len(self.of(kind)) > number)
        return self.of(kind)[number]

    def of(self, kind: type[Job]) -> list[Job]:
        return [job for job in self.jobs if isinstance(job, kind)]


@dataclass
class DispatchWorld:
    hub: MemoryHub
    bus: MemoryBus
    dispatch: Dispatch
    metrics: RouterMetrics
    beats: list[Beat] = field(default_factory=list)
    workers: list[WireWorker] = field(default_factory=list)

    async def worker(self, name: str, role: Role, incarnation: str = "inc") -> WireWorker:
        """Listed, live and listening."""
        bus = MemoryBus(self.hub)
        await bus.start()
        worker = WireWorker(name, incarnation, bus)
        self.workers.append(worker)
        await worker.listen()
        layout, capacity = KvLayout(4, 64), Capacity(64, 8, 1024)
        info = WorkerInfo(name, incarnation, role, "m", "digest", layout, capacity, "wire")
        self.dispatch.feed(ev.WorkerListed(info))
        self.report(worker)
        return worker

    def report(self, worker: WireWorker) -> None:
        self.dispatch.feed(ev.WorkerReported(worker.name, worker.incarnation, REPORT))

    def submit(self, name: str = "q/0", num_tokens: int = 16) -> Client:
        prompt = Tokens(pack_ids(range(num_tokens)))
        spec = ChoiceSpec(name, 0, "m", prompt, num_tokens, Sampling(8, 0.0))
        client = Client(spec)
        self.dispatch.submit(spec, client)
        return client

    async def settle(self) -> None:
        for _ in range(3):
            for worker in self.workers:
                await worker.bus.flush(timeout_s=PATIENCE_S)
            await self.bus.flush(timeout_s=PATIENCE_S)


def delta(attempt: int, index: int, *, finish: bool = False) -> Delta:
    return Delta(attempt, index, [index], "x", "length" if finish else "")


def handle(handle_id: str = "h", worker: str = "p") -> KvHandle:
    return KvHandle(handle_id, worker, "inc", 16, 4, b"h" * 16, 30.0, [])


class _Over(Exception):
    pass


@asynccontextmanager
async def dispatching(limits: Limits | None = None) -> AsyncIterator[DispatchWorld]:
    hub = MemoryHub()
    bus, ear = MemoryBus(hub), MemoryBus(hub)
    await bus.start()
    await ear.start()
    metrics = RouterMetrics(CollectorRegistry())
    world: DispatchWorld | None = None
    try:
        async with asyncio.TaskGroup() as tasks:
            dispatch = Dispatch(
                bus=bus,
                subjects=SUBJECTS,
                router_id="router",
                limits=limits or Limits(),
                metrics=metrics,
                rng=random.Random(1),
                clock=asyncio.get_running_loop().time,
            )
            world = DispatchWorld(hub, bus, dispatch, metrics)
            beats = world.beats
            await ear.subscribe(SUBJECTS.routers, lambda m: beats.append(decode_beat(m.payload)))
            await dispatch.start(tasks)
            yield world
            dispatch.scheduler.validate()
            dispatch.leave()
            raise _Over
    except* _Over:
        pass
    finally:
        for one in [bus, ear, *(worker.bus for worker in (world.workers if world else []))]:
            await one.close()
