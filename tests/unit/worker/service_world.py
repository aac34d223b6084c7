"""A service between a bus in memory and an engine that only remembers what it was told."""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from protocol.bus import Message
from protocol.codec import decode_events, decode_out, encode
from protocol.events import Beat, LoadReport
from protocol.handoff import KvHandle
from protocol.ids import JobKey
from protocol.jobs import Decode, Job, JobEnvelope, Prefill, Tokens
from protocol.memory_bus import MemoryBus, MemoryHub
from protocol.out import Delta, Out, OutEnvelope
from protocol.sampling import Sampling
from protocol.subjects import Subjects
from protocol.worker_info import Capacity, EngineTraits, KvLayout, Role, WorkerInfo
from text.assets import byte_assets
from worker.engine.base import (
    DecodeJob,
    EngineInfo,
    EngineStats,
    Load,
    Outlet,
    PrefillJob,
    Snapshot,
)
from worker.service import Service

PATIENCE_S = 10.0
WORKER, INCARNATION = "w", "inc"
SUBJECTS = Subjects("test")
SAMPLING = Sampling(8, 0.0)
ASSETS = byte_assets("tiny")
ENGINE_INFO = EngineInfo(
    "recorded", "digest", KvLayout(4, 64), Capacity(16, 4, 64), EngineTraits(), ASSETS
)


class RecordingEngine:
    """The engine port. What it says is said by the test, through the service."""

    def __init__(self) -> None:
        self.submitted: list[PrefillJob | DecodeJob] = []
        self.cancelled: list[JobKey] = []
        self.renewed: list[str] = []
        self.released: list[str] = []
        self.crash: Exception | None = None
        self.load_now = Load(0, 0, 16, 16, 0, 0, 0, 0)

    async def start(self, outlet: Outlet) -> EngineInfo:
        return ENGINE_INFO

    def submit(self, job: PrefillJob | DecodeJob) -> None:
        if self.crash is not None:
            raise self.crash
        self.submitted.append(job)

    def cancel(self, key: JobKey) -> None:
        self.cancelled.append(key)

    def renew(self, handle_ids: Sequence[str]) -> None:
        self.renewed += handle_ids

    def release(self, handle_ids: Sequence[str]) -> None:
        self.released += handle_ids

    def load(self) -> Load:
        return self.load_now

    def stats(self) -> EngineStats:
        return EngineStats()

    def kv_snapshot(self) -> Snapshot:
        return Snapshot(7, [b"a" * 16, b"b" * 16])

    async def drain(self) -> None:
        return

    async def stop(self) -> bool:
        return True


class ManualClock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@dataclass
class Router:
    """What one router hears, and how it speaks."""

    name: str
    bus: MemoryBus
    envelopes: list[OutEnvelope] = field(default_factory=list)
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    async def start(self) -> None:
        await self.bus.start()
        await self.bus.subscribe(SUBJECTS.out_all(self.name), self._on_out)

    def _on_out(self, message: Message) -> None:
        self.envelopes.append(decode_out(message.payload))
        self.changed.set()

    @property
    def outs(self) -> list[Out]:
        return [out for envelope in self.envelopes for out in envelope.outs]

    @property
    def seqs(self) -> list[int]:
        return [envelope.seq for envelope in self.envelopes]

    def say(self, *jobs: Job) -> None:
        self.bus.publish(
            SUBJECTS.jobs(WORKER, INCARNATION), encode(JobEnvelope(self.name, [*jobs]))
        )

    def beat(self, *, leaving: bool = False, joining: bool = False) -> None:
        self.bus.publish(SUBJECTS.routers, encode(Beat(self.name, leaving, joining)))

    async def settle(self) -> None:
        """Until the worker has taken all we said, and we all it answered at once."""
        for _ in range(3):
            await self.bus.flush(timeout_s=PATIENCE_S)

    async def tell(self, *jobs: Job) -> list[Out]:
        """What is answered at once."""
        before = len(self.outs)
        self.say(*jobs)
        await self.settle()
        return self.outs[before:]

    async def until(self, condition: Callable[[], object]) -> None:
        async with asyncio.timeout(PATIENCE_S):
            while not condition():
                self.changed.clear()
                await self.changed.wait()


@dataclass
class ServiceWorld:
    hub: MemoryHub
    bus: MemoryBus
    service: Service
    engine: RecordingEngine
    clock: ManualClock
    router: Router
    exits: "asyncio.Queue[int]"
    buses: list[MemoryBus]

    async def another(self, name: str) -> Router:
        self.buses.append(MemoryBus(self.hub))
        router = Router(name, self.buses[-1])
        await router.start()
        return router

    def sweep_for(self, seconds: float) -> None:
        """Time goes on, and the sweeps with it."""
        for _ in range(int(seconds)):
            self.clock.now += 1.0
            self.service.sweep()

    async def reports(self) -> list[LoadReport]:
        """The report made now."""
        found: list[LoadReport] = []

        def on_event(message: Message) -> None:
            events = decode_events(message.payload).events
            found.extend(event for event in events if isinstance(event, LoadReport))

        subscription = await self.router.bus.subscribe(SUBJECTS.all_events, on_event)
        self.service.telemetry.report()
        await self.bus.flush(timeout_s=PATIENCE_S)
        await self.router.settle()
        await subscription.close()
        return found


async def made(role: Role = "both", *, linger_s: float = 60.0) -> ServiceWorld:
    hub = MemoryHub()
    bus, clock, engine = MemoryBus(hub), ManualClock(), RecordingEngine()
    exits: asyncio.Queue[int] = asyncio.Queue()
    service = Service(
        bus=bus,
        subjects=SUBJECTS,
        engine=engine,
        worker=WORKER,
        incarnation=INCARNATION,
        linger_s=linger_s,
        router_timeout_s=15.0,
        clock=clock,
        end_process=exits.put_nowait,
    )
    await bus.start()
    await service.start(info_of(role), ENGINE_INFO)
    router = Router("r", MemoryBus(hub))
    await router.start()
    service.sweep()
    return ServiceWorld(hub, bus, service, engine, clock, router, exits, [router.bus])


def info_of(role: Role) -> WorkerInfo:
    return WorkerInfo(
        WORKER,
        INCARNATION,
        role,
        "model",
        ENGINE_INFO.model_digest,
        ENGINE_INFO.layout,
        ENGINE_INFO.capacity,
        "recorded",
    )


def prefill(attempt: int) -> Prefill:
    return Prefill(attempt, "c/0", Tokens(b"\1\0\0\0\2\0\0\0"), SAMPLING)


def decode(attempt: int, handle: KvHandle | None = None) -> Decode:
    return Decode(attempt, "c/0", Tokens(b"\1\0\0\0\2\0\0\0"), SAMPLING, handle)


def key_of(attempt: int, router: str = "r") -> JobKey:
    return JobKey(router, attempt)


def delta_of(attempt: int, index: int, *, finish: bool = False) -> Delta:
    return Delta(attempt, index, [65 + index], chr(65 + index), "length" if finish else "")


def handle_of(handle_id: str) -> KvHandle:
    return KvHandle(handle_id, WORKER, INCARNATION, 2, 4, b"h" * 16, 30.0, [])
