"""Whole engines: real pool, leases, memory and transports, and an outlet that remembers."""

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from itertools import count
from typing import Any

from protocol.events import KvCleared, KvEvent, KvRemoved, KvStored
from protocol.handoff import KvHandle, Offer
from protocol.ids import JobKey
from protocol.out import Delta, Leg
from protocol.sampling import Sampling
from text.assets import byte_assets
from text.tokenizer import Tokenizer
from worker.engine.base import (
    DecodeJob,
    DecodingInfo,
    EngineError,
    EngineInfo,
    PrefillJob,
    PrefillResult,
)
from worker.engine.runner import Chunk, ModelRunner
from worker.engine.simulated import SimulatedConfig, SimulatedRunner, expected_tokens
from worker.engine.stepper import Stepper, StepperConfig
from worker.kv.arena import Arena, LeaseTable, ScratchWords
from worker.transfer.base import OnEnd, PullSpec, PullTicket, Transfer
from worker.transfer.shm import ShmTransfer

PATIENCE_S = 20.0
SMALL = SimulatedConfig(num_blocks=64, block_size=4, kv_bytes_per_token=16, num_scratch=8)
GREEDY = Sampling(max_tokens=24, temperature=0.0)
RANDOM = Sampling(max_tokens=24, temperature=0.8, seed=7)
_attempts = count(1)


def prompt_of(num_tokens: int, salt: int = 0) -> list[int]:
    return [(salt * 31 + index * 7) % 250 for index in range(num_tokens)]


def new_key() -> JobKey:
    return JobKey("router", next(_attempts))


def text_of(ids: Sequence[int]) -> str:
    return Tokenizer.from_assets(byte_assets()).decode(ids)


@dataclass
class Attempt:
    """All that was heard of one attempt."""

    accepted: int = 0
    prefilled: PrefillResult | None = None
    decoding: DecodingInfo | None = None
    failed: EngineError | None = None
    deltas: list[Delta] = field(default_factory=list)
    progress: list[tuple[Leg, int, int]] = field(default_factory=list)

    @property
    def ids(self) -> list[int]:
        return [token for delta in self.deltas for token in delta.ids]

    @property
    def text(self) -> str:
        return "".join(delta.text for delta in self.deltas)

    @property
    def finish(self) -> str:
        return self.deltas[-1].finish if self.deltas else ""

    @property
    def over(self) -> bool:
        return self.failed is not None or self.prefilled is not None or bool(self.finish)


class Recorder:
    """An outlet."""

    def __init__(self) -> None:
        self.attempts: dict[JobKey, Attempt] = {}
        self.cached: set[bytes] = set()
        self.last_event = 0
        self.reasons: list[str] = []
        self._changed = asyncio.Event()

    def of(self, key: JobKey) -> Attempt:
        return self.attempts.setdefault(key, Attempt())

    async def until(self, condition: Callable[[], object]) -> None:
        async with asyncio.timeout(PATIENCE_S):
            while not condition():
                self._changed.clear()
                await self._changed.wait()

    async def over(self, key: JobKey) -> Attempt:
        await self.until(lambda: self.of(key).over)
        return self.of(key)

    def accepted(self, key: JobKey, handle: KvHandle | None) -> None:
        self.of(key).accepted += 1
        self._changed.set()

    def progress(self, key: JobKey, leg: Leg, done: int, total: int) -> None:
        self.of(key).progress.append((leg, done, total))
        self._changed.set()

    def prefilled(self, key: JobKey, result: PrefillResult) -> None:
        assert self.of(key).prefilled is None
        self.of(key).prefilled = result
        self._changed.set()

    def decoding(self, key: JobKey, info: DecodingInfo) -> None:
        assert self.of(key).decoding is None
        assert not self.of(key).deltas
        self.of(key).decoding = info
        self._changed.set()

    def step(self, deltas: Sequence[tuple[JobKey, Delta]]) -> None:
        for key, delta in deltas:
            attempt = self.of(key)
            assert attempt.decoding is not None
            assert not attempt.over
            assert delta.attempt == key.attempt
            if attempt.deltas:
                last = attempt.deltas[-1]
                assert delta.index == last.index + len(last.ids)
            attempt.deltas.append(delta)
        self._changed.set()

    def failed(self, key: JobKey, error: EngineError) -> None:
        assert not self.of(key).over
        self.of(key).failed = error
        self._changed.set()

    def kv_events(self, first_id: int, events: Sequence[KvEvent]) -> None:
        assert first_id == self.last_event + 1
        self.last_event += len(events)
        for event in events:
            match event:
                case KvStored(hashes=hashes):
                    self.cached |= split(hashes)
                case KvRemoved(hashes=hashes):
                    self.cached -= split(hashes)
                case KvCleared():
                    self.cached.clear()
        self._changed.set()

    def unhealthy(self, reason: str) -> None:
        self.reasons.append(reason)
        self._changed.set()


def split(hashes: bytes) -> set[bytes]:
    return {hashes[at : at + 16] for at in range(0, len(hashes), 16)}


class Clock:
    """Real time, plus what the test adds."""

    def __init__(self) -> None:
        self.ahead_s = 0.0

    def __call__(self) -> float:
        return time.monotonic() + self.ahead_s


class GatedRunner:
    """A model whose steps wait while the gate is shut, and which remembers what it was asked."""

    def __init__(self, inner: ModelRunner, loop: asyncio.AbstractEventLoop) -> None:
        self.layout = inner.layout
        self.model_digest = inner.model_digest
        self.max_context = inner.max_context
        self.vocab_size = inner.vocab_size
        self.eos_ids = inner.eos_ids
        self.steps: list[list[tuple[int, int, bool]]] = []
        """Of each chunk: where it starts, its length, whether it samples."""
        self._gate = threading.Event()
        self._gate.set()
        self.entered = asyncio.Event()
        self.crash: BaseException | None = None
        self.forgets_a_token = False
        self._inner = inner
        self._loop = loop

    def shut(self) -> None:
        self._gate.clear()
        self.entered.clear()

    def open(self) -> None:
        self._gate.set()

    def bind(self, arena: Arena) -> None:
        self._inner.bind(arena)

    def step(self, chunks: Sequence[Chunk]) -> list[int | None]:
        self._loop.call_soon_threadsafe(self.entered.set)
        assert self._gate.wait(PATIENCE_S)
        if self.crash is not None:
            raise self.crash
        self.steps.append([(c.start, len(c.ids), c.sample) for c in chunks])
        tokens = self._inner.step(chunks)
        return tokens[1:] if self.forgets_a_token else tokens


class HeldTransfer:
    """A real transport whose operations end only when the test lets them."""

    def __init__(self, inner: Transfer, *, hold: bool = True) -> None:
        self._inner = inner
        self._hold = hold
        self._loop = asyncio.get_running_loop()
        self._lock = threading.Lock()
        self._held: list[Callable[[], None]] = []
        self.arrived = asyncio.Event()
        """Set (on the loop) when an operation has ended and is held."""

    @property
    def name(self) -> str:
        return self._inner.name

    def start(self, arena: Arena, leases: LeaseTable, scratch: ScratchWords) -> None:
        self._inner.start(arena, leases, scratch)

    def offer(self) -> Offer:
        return self._inner.offer()

    def refuse(self, offer: Offer) -> str:
        return self._inner.refuse(offer)

    def pull(self, spec: PullSpec, on_end: OnEnd) -> PullTicket:
        return self._inner.pull(spec, self._holding(on_end))

    def read_word(self, spec: PullSpec, scratch_slot: int, on_end: OnEnd) -> None:
        self._inner.read_word(spec, scratch_slot, self._holding(on_end))

    def num_live(self) -> int:
        with self._lock:
            return self._inner.num_live() + len(self._held)

    def stop(self) -> bool:
        return self._inner.stop() and not self._held

    @property
    def num_held(self) -> int:
        with self._lock:
            return len(self._held)

    def let_one_go(self) -> None:
        with self._lock:
            end = self._held.pop(0)
        end()

    def _holding(self, on_end: OnEnd) -> OnEnd:
        def held(end: object) -> None:
            with self._lock:
                self._held.append(lambda: on_end(end))  # type: ignore[arg-type]
            self._loop.call_soon_threadsafe(self.arrived.set)

        return held if self._hold else on_end


@dataclass
class World:
    """One worker's engine."""

    stepper: Stepper
    recorder: Recorder
    runner: GatedRunner
    arena: Arena
    clock: Clock
    config: SimulatedConfig
    info: EngineInfo
    leases: LeaseTable
    healthy: bool = True
    leaves_nothing: bool = True
    terminal: bool = True
    """Whether no transfer is live when it stops."""

    def prefill(self, prompt: Sequence[int], sampling: Sampling = GREEDY, **rest: Any) -> JobKey:
        key = new_key()
        self.stepper.submit(PrefillJob(key, "choice/0", prompt, sampling, **rest))
        return key

    def decode(self, prompt: Sequence[int], sampling: Sampling = GREEDY, **rest: Any) -> JobKey:
        key = new_key()
        self.stepper.submit(DecodeJob(key, "choice/0", prompt, sampling, **rest))
        return key

    async def over(self, key: JobKey) -> Attempt:
        return await self.recorder.over(key)

    async def idle(self) -> None:
        """Nothing runs and nothing is lent."""
        async with asyncio.timeout(PATIENCE_S):
            await self.stepper.drain()

    def is_clean(self) -> bool:
        load = self.stepper.load()
        return (
            load.running == load.waiting == load.lent_blocks == load.quarantined_blocks == 0
            and load.free_blocks == load.num_blocks
        )


@asynccontextmanager
async def running(
    config: SimulatedConfig = SMALL,
    *,
    transfers: Sequence[Transfer] | None = None,
    worker: str = "w",
    **settings: Any,
) -> AsyncIterator[World]:
    """An engine that has started. At the end nothing may be left, and nothing was broken."""
    assets = config.assets or byte_assets(config.name, max_context=config.max_context)
    stopping = threading.Event()
    inner = SimulatedRunner(config, assets, wait=stopping.wait)
    runner = GatedRunner(inner, asyncio.get_running_loop())
    arena = Arena(config.num_blocks, runner.layout.block_bytes)
    clock, recorder = Clock(), Recorder()
    leases = LeaseTable(config.num_leases)
    stepper = Stepper(
        runner,
        arena,
        leases,
        ScratchWords(config.num_scratch),
        [ShmTransfer()] if transfers is None else transfers,
        StepperConfig(worker, "inc", validate=True, **settings),
        assets,
        clock=clock,
        interrupt=stopping.set,
    )
    info = await stepper.start(recorder)
    world = World(stepper, recorder, runner, arena, clock, config, info, leases)
    try:
        yield world
        assert bool(recorder.reasons) is not world.healthy, recorder.reasons
        if world.healthy and world.leaves_nothing:
            await world.idle()
            assert world.is_clean(), stepper.load()
            snapshot = stepper.kv_snapshot()
            assert snapshot.last_id == recorder.last_event
            assert set(snapshot.hashes) == recorder.cached
    finally:
        runner.open()
        assert await stepper.stop() is world.terminal


async def hand_over(
    source: World,
    target: World,
    prompt: Sequence[int],
    sampling: Sampling = GREEDY,
    *,
    release: bool = True,
) -> tuple[PrefillResult, Attempt]:
    """Prefill there, decode here."""
    attempt = await source.over(source.prefill(prompt, sampling))
    assert attempt.prefilled is not None
    result = attempt.prefilled
    assert result.handle is not None
    assert result.first is not None
    key = target.decode(
        prompt,
        sampling,
        handle=result.handle,
        output_ids=result.first.ids,
        chars_sent=len(result.first.text),
    )
    ended = await target.over(key)
    if release:
        source.stepper.release([result.handle.handle_id])
    return result, ended


def expected_of(prompt: Sequence[int], sampling: Sampling, config: SimulatedConfig) -> list[int]:
    """The whole answer of a correct run."""
    return expected_tokens(prompt, sampling, sampling.max_tokens, config)
