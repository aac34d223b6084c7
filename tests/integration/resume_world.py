"""Streams that lose their worker at a chosen token, in one process, and what each heard.

Requests come in as bodies and go out as chunks, through the router's real front, scheduler and
sinks; the workers' engines are real, over torch or over the simulated model. A cut is what a
worker's own `Failed` is to the router: the attempt is over, and the choice goes on elsewhere.
"""

import asyncio
import copy
import itertools
import json
import random
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from protocol.errors import ClientError
from protocol.memory_bus import MemoryHub
from protocol.out import Delta, FailureCode
from router.choices import Choice, ChoiceSpec
from router.requests import Front, Prepared
from router.scheduling import events as ev
from router.scheduling.limits import Limits
from router.sinks import CollectSink, StreamSink, collect_sink, stream_sink
from tests.integration.path_world import PathWorld
from tests.integration.resume_said import Said
from text.assets import ModelAssets, load_assets
from text.tokenizer import Tokenizer
from worker.config import WorkerConfig
from worker.engine.runner import ModelRunner
from worker.engine.simulated import SimulatedConfig
from worker.engine.torch_engine import TorchRunner, build_runner

MODEL = "m"
NUM_BLOCKS = 512
CONFIG = SimulatedConfig(name=MODEL, num_blocks=NUM_BLOCKS, block_size=4, kv_bytes_per_token=16)
LIMITS = Limits(retry_floor=100_000)
PATIENCE_S = 40.0
BLOCK_SIZE = 16


@dataclass(frozen=True)
class Cut:
    """Choice `index` loses its attempt when it has `position` tokens."""

    position: int
    index: int = 0
    code: FailureCode = "engine"
    """`lease_lost`: the KV is thrown away as well, and the same worker may go on."""


class Stream:
    """One request, streamed or not; a `ChunkWriter`, and between the router and its sink."""

    def __init__(self, world: "ResumeWorld", prepared: Prepared, cuts: Sequence[Cut]) -> None:
        self.specs: Sequence[ChoiceSpec] = prepared.specs
        self.said = [Said() for _ in prepared.specs]
        self.usage: dict[str, Any] = {}
        self.error: ClientError | None = None
        self.num_cut = 0
        self._dispatch = world.router.dispatch
        self._loop = asyncio.get_running_loop()
        self._over = asyncio.Event()
        cancel = self._dispatch.cancel
        self._sink: StreamSink | CollectSink = (
            stream_sink(prepared, cancel, self)
            if prepared.stream
            else collect_sink(prepared, cancel)
        )
        self._cuts = sorted(cuts, key=lambda cut: cut.position)

    async def end(self) -> "Stream":
        async with asyncio.timeout(PATIENCE_S):
            if isinstance(self._sink, StreamSink):
                await self._over.wait()
                return self
            await self._sink.done.wait()
        try:
            self.write(self._sink.body())
        except ClientError as error:
            self.error = error
        return self

    def start(self) -> None:
        for spec in self.specs:
            self._dispatch.submit(spec, self)
        for spec in self.specs:
            self._cut_due(self._dispatch._choices[spec.choice])

    # between the router and its sink

    def delta(self, choice: Choice, delta: Delta) -> None:
        self.said[choice.spec.index].ids += delta.ids
        self._sink.delta(choice, delta)
        if not delta.finish:
            self._cut_due(choice)

    def ended(self, choice: Choice, error: ClientError | None) -> None:
        self._sink.ended(choice, error)

    def _cut_due(self, choice: Choice) -> None:
        index, position = choice.spec.index, len(choice.output)
        for cut in [c for c in self._cuts if c.index == index and c.position <= position]:
            self._cuts.remove(cut)
            self._cut(choice, cut)

    def _cut(self, choice: Choice, cut: Cut) -> None:
        """At once, or when the prefill that has just brought this token has been heard to its
        end: then it is the decode leg that fails, before its first token."""
        live = self._dispatch._attempts.live
        legs = {live[number].leg for number in choice.attempts}
        if cut.position and legs != {"decode"}:
            self._loop.call_soon(self._fail, choice, cut)
        else:
            self._fail(choice, cut)

    def _fail(self, choice: Choice, cut: Cut) -> None:
        for number in list(choice.attempts):
            entry = self._dispatch._attempts.live[number]
            leg = "prefill" if entry.leg == "prefill" else "decode"
            self._dispatch.feed(ev.AttemptFailed(number, leg, cut.code, "cut"))
            self.num_cut += 1

    # the sink's chunks

    def write(self, chunk: bytes) -> None:
        parsed = json.loads(chunk)
        self.usage = parsed.get("usage") or self.usage
        for choice in parsed["choices"]:
            self.said[choice["index"]].hear(choice)

    def splice(self, before: bytes, after: bytes) -> Callable[[bytes], None]:
        return lambda middle: self.write(before + middle + after)

    def fail(self, error: ClientError) -> None:
        self.error = error
        self._over.set()

    def finish(self) -> None:
        self._over.set()


class ResumeWorld(PathWorld):
    """Made by `fleet`."""

    folder: Path | None = None
    _numbers_of_requests: "itertools.count[int]"

    def model(self, wait: Callable[[float], object]) -> tuple[ModelRunner, ModelAssets]:
        if self.folder is None:
            return super().model(wait)
        runner = copy.copy(runner_of(self.folder))
        return runner, load_assets(self.folder)

    def open(self) -> None:
        """When the fleet is there."""
        self._front = Front(
            self.router.feed._catalog,
            max_choices=128,
            rng=random.Random(1),
            wall_clock=lambda: 0.0,
        )
        self._numbers_of_requests = itertools.count()

    async def ask(self, body: dict[str, Any], cuts: Sequence[Cut] = ()) -> Stream:
        """Begin one stream. Unless it has a `cache_salt`, no other one's KV helps it."""
        number = next(self._numbers_of_requests)
        common: dict[str, Any] = {"model": MODEL, "stream": True, "cache_salt": f"{number}"}
        if body.get("stream", True):
            common["stream_options"] = {"include_usage": True}
        prepare = self._front.chat if "messages" in body else self._front.completion
        prepared = await prepare(json.dumps({**common, **body}).encode(), f"r{number}")
        stream = Stream(self, prepared, cuts)
        stream.start()
        return stream

    async def answer(self, body: dict[str, Any]) -> Stream:
        """One stream, undisturbed and alone."""
        stream = await (await self.ask(body)).end()
        assert stream.error is None, stream.error
        return stream

    @property
    def num_second_chances(self) -> float:
        return self.router.events("resume") + self.router.events("retry")


@cache
def runner_of(folder: Path) -> TorchRunner:
    """The weights once, for all workers; no worker may bind this one to its arena."""
    assets = load_assets(folder)
    eos_ids = Tokenizer.from_assets(assets).eos_ids
    config = WorkerConfig(
        model=str(folder), block_size=BLOCK_SIZE, num_blocks=NUM_BLOCKS, dtype="float32"
    )
    return build_runner(config, assets, eos_ids)[0]


@asynccontextmanager
async def fleet(
    folder: Path | None, *, prefill: int = 2, decode: int = 3, both: int = 0
) -> AsyncIterator[ResumeWorld]:
    """`folder` None: the simulated model. When all is over nothing is left anywhere."""
    async with AsyncExitStack() as stack:
        world = ResumeWorld(MemoryHub(detect_s=0.3), stack, CONFIG)
        world.folder = folder
        await world.add_router(limits=LIMITS)
        for role, count in (("prefill", prefill), ("decode", decode), ("both", both)):
            for number in range(count):
                await world.add_worker(role, f"{role[0]}{number}")  # type: ignore[arg-type]
        await world.live()
        world.open()
        yield world
        await world.clean()
        assert world.exits == []
