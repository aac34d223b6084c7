"""An engine, an outlet that remembers, and the stand-in for vLLM as a process."""

import asyncio
import itertools
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import aiohttp
import msgspec

from baton.demo import demo_model_folder
from protocol.events import KvEvent
from protocol.handoff import KvHandle
from protocol.ids import JobKey
from protocol.out import Delta, Leg
from protocol.sampling import Sampling
from tests.contract.nats_server import free_port
from tests.unit.worker.vllm.standin import next_token
from worker.engine.base import DecodeJob, DecodingInfo, EngineError, PrefillJob, PrefillResult
from worker.engine.vllm.engine import VllmConfig, VllmEngine

STANDIN = Path(__file__).with_name("standin.py")
PROMPT = list(range(300, 370))
GREEDY = Sampling(max_tokens=8, temperature=0.0)
WAIT_S = 10.0


def continuation(ids: Sequence[int], count: int) -> list[int]:
    """What the stand-in says after `ids`."""
    ids = list(ids)
    for _ in range(count):
        ids.append(next_token(ids))
    return ids[-count:]


def replace_sampling(**changes: object) -> Sampling:
    return msgspec.structs.replace(GREEDY, **changes)


class Heard:
    """The outlet of a test."""

    def __init__(self) -> None:
        self.results: dict[JobKey, PrefillResult] = {}
        self.infos: dict[JobKey, DecodingInfo] = {}
        self.errors: dict[JobKey, EngineError] = {}
        self.deltas: dict[JobKey, list[Delta]] = {}
        self.events: list[KvEvent] = []
        self.event_ids: list[int] = []
        self.progressed: list[JobKey] = []
        self.unwell: list[str] = []
        self.frames = 0
        self._changed = asyncio.Event()

    def accepted(self, key: JobKey, handle: KvHandle | None) -> None:
        pass

    def progress(self, key: JobKey, leg: Leg, done: int, total: int) -> None:
        self.progressed.append(key)
        self._changed.set()

    def prefilled(self, key: JobKey, result: PrefillResult) -> None:
        self.results[key] = result
        self._changed.set()

    def decoding(self, key: JobKey, info: DecodingInfo) -> None:
        self.infos[key] = info
        self._changed.set()

    def step(self, deltas: Sequence[tuple[JobKey, Delta]]) -> None:
        self.frames += 1
        for key, delta in deltas:
            self.deltas.setdefault(key, []).append(delta)
        self._changed.set()

    def failed(self, key: JobKey, error: EngineError) -> None:
        self.errors[key] = error
        self._changed.set()

    def kv_events(self, first_id: int, events: Sequence[KvEvent]) -> None:
        self.event_ids += range(first_id, first_id + len(events))
        self.events += events
        self._changed.set()

    def unhealthy(self, reason: str) -> None:
        self.unwell.append(reason)
        self._changed.set()

    async def until(self, condition: Callable[[], object], *, timeout_s: float = WAIT_S) -> None:
        async with asyncio.timeout(timeout_s):
            while not condition():
                self._changed.clear()
                await self._changed.wait()

    def ids(self, key: JobKey) -> list[int]:
        return [token for delta in self.deltas.get(key, []) for token in delta.ids]

    def text(self, key: JobKey) -> str:
        return "".join(delta.text for delta in self.deltas.get(key, []))

    def last(self, key: JobKey) -> Delta:
        return self.deltas[key][-1]

    def is_over(self, key: JobKey) -> bool:
        ended = key in self.deltas and bool(self.deltas[key][-1].finish)
        return ended or key in self.errors or key in self.results


@dataclass(frozen=True)
class Standin:
    """The process and its ports."""

    process: "subprocess.Popen[str]"
    port: int
    pub: int
    replay: int


class World:
    """One stand-in, one engine beside it."""

    def __init__(self, standin: Standin) -> None:
        self.process = standin.process
        self.url = f"http://127.0.0.1:{standin.port}"
        self.kv_events_url = f"tcp://127.0.0.1:{standin.pub}"
        self.kv_replay_url = f"tcp://127.0.0.1:{standin.replay}"
        self.heard = Heard()
        self.wall_s = 0.0
        """How much further than the real one our common clock is."""
        self._numbers = itertools.count(1)
        self._ids = itertools.count(1)
        self.http = aiohttp.ClientSession()

    def engine(self, **changes: Any) -> VllmEngine:
        config = VllmConfig(url=self.url, worker="w", incarnation="i", start_timeout_s=5.0)
        return VllmEngine(
            replace(config, **changes),
            clock=time.monotonic,
            wall_clock=lambda: time.time() + self.wall_s,
            new_id=lambda: f"h{next(self._ids)}",
        )

    def prefill(self, prompt: Sequence[int], **options: Any) -> PrefillJob:
        options.setdefault("sampling", GREEDY)
        number = next(self._numbers)
        return PrefillJob(JobKey("r", number), f"req/{number}", list(prompt), **options)

    def decode(self, prompt: Sequence[int], **options: Any) -> DecodeJob:
        options.setdefault("sampling", GREEDY)
        number = next(self._numbers)
        return DecodeJob(JobKey("r", number), f"req/{number}", list(prompt), **options)

    async def run(self, engine: VllmEngine, job: PrefillJob | DecodeJob) -> JobKey:
        engine.submit(job)
        await self.heard.until(lambda: self.heard.is_over(job.key))
        return job.key

    async def behave(self, **how: Any) -> None:
        async with self.http.post(f"{self.url}/behave", json=how) as response:
            assert response.status == 200

    async def publish(self, seq: int, *events: dict[str, Any], **how: Any) -> None:
        said = {"seq": seq, "events": list(events), **how}
        async with self.http.post(f"{self.url}/publish", json=said) as response:
            assert response.status == 200

    async def request_ids(self) -> list[str]:
        return [entry["request_id"] for entry in (await self._state())["seen"]]

    async def seen(self) -> list[dict[str, Any]]:
        return [entry["body"] for entry in (await self._state())["seen"]]

    async def peers(self) -> list[int]:
        """The port at our end of each request's connection."""
        return [entry["peer"] for entry in (await self._state())["seen"]]

    async def _state(self) -> dict[str, Any]:
        async with self.http.get(f"{self.url}/seen") as response:
            state: dict[str, Any] = await response.json()
            return state

    async def until_running(self, count: int) -> None:
        async with asyncio.timeout(WAIT_S):
            while True:  # another process cannot wake us
                if (await self._state())["running"] == count:
                    return
                await asyncio.sleep(0.01)

    def signal(self, number: signal.Signals) -> None:
        os.kill(self.process.pid, number)


async def lent(world: World, engine: VllmEngine, prompt: Sequence[int] = PROMPT) -> KvHandle:
    """A prefill leg's handle."""
    key = await world.run(engine, world.prefill(prompt))
    handle = world.heard.results[key].handle
    assert handle is not None
    return handle


@contextmanager
def standin(folder: Path | None = None) -> Iterator[Standin]:
    """Until it listens, and until it is gone."""
    ports = (free_port(), free_port(), free_port())
    root = str(folder or demo_model_folder())
    command = [sys.executable, str(STANDIN), *map(str, (ports[0], root, *ports[1:]))]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        line = process.stdout.readline()
        assert line.startswith("ready"), line
        yield Standin(process, *ports)
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


@asynccontextmanager
async def world_of(standin: Standin) -> AsyncIterator[World]:
    """A test's own view of a stand-in that others used before."""
    world = World(standin)
    try:
        await world.behave(forget=True)
        yield world
    finally:
        await world.http.close()


@asynccontextmanager
async def started(world: World, **changes: Any) -> AsyncIterator[VllmEngine]:
    engine = world.engine(**changes)
    await engine.start(world.heard)
    try:
        yield engine
    finally:
        assert await engine.stop()
