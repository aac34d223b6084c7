"""The real engine core on a simulated thread.

A turn runs at once, in the loop, but takes as long as its steps say: its outputs reach the loop,
and the next turn may begin, only when that time has passed. What is posted meanwhile waits in the
inbox, as it does for the real thread. One thing is coarser than life: memory that a turn writes
changes at the turn's beginning, so a peer never reads in the middle of a step.
"""

import asyncio
import random
from collections.abc import Callable, Sequence
from functools import cache

from protocol.errors import LocalError
from protocol.worker_info import Capacity, EngineTraits
from tests.sim.loop import Process
from text.assets import ModelAssets, byte_assets
from text.tokenizer import Tokenizer
from worker.engine.base import EngineInfo, Outlet
from worker.engine.core import EngineCore
from worker.engine.grammar import GrammarCompiler
from worker.engine.grammar_desk import GrammarDesk
from worker.engine.messages import Message, StepperConfig
from worker.engine.outputs import OutputDelivery, TurnOutputs
from worker.engine.runner import Chunk
from worker.engine.simulated import SimulatedConfig, SimulatedRunner
from worker.engine.stepper import Stepper
from worker.kv.arena import Arena, LeaseTable, ScratchWords
from worker.transfer.base import Transfer

WAKE_S = (0.0, 0.002)
"""How long the thread takes to wake up."""
AGAIN_S = 0.0001
VALIDATE_ONE_IN = 16


@cache
def assets_of(config: SimulatedConfig) -> ModelAssets:
    return byte_assets(config.name, max_context=config.max_context)


@cache
def tokenizer_of(config: SimulatedConfig) -> Tokenizer:
    return Tokenizer.from_assets(assets_of(config))


@cache
def _compiler_of(config: SimulatedConfig) -> GrammarCompiler:
    return GrammarCompiler(tokenizer_of(config))


class StepFailed(RuntimeError):
    """What a model may raise."""


class SimRunner(SimulatedRunner):
    """The simulated model, which fails when it is told to."""

    def __init__(self, config: SimulatedConfig, wait: Callable[[float], object]) -> None:
        super().__init__(config, assets_of(config), wait=wait)
        self.fails_next = False

    def step(self, chunks: Sequence[Chunk]) -> list[int | None]:
        if self.fails_next:
            raise StepFailed("an error of the device")
        return super().step(chunks)


class SimEngine(Stepper):
    """A `Stepper` without its thread."""

    def __init__(
        self,
        process: Process,
        config: SimulatedConfig,
        transfers: Sequence[Transfer],
        stepper: StepperConfig,
        rng: random.Random,
    ) -> None:
        self.runner = SimRunner(config, self._take_time)
        self.leases = LeaseTable(config.num_leases)
        self.arena = Arena(config.num_blocks, self.runner.layout.block_bytes)
        super().__init__(
            self.runner,
            self.arena,
            self.leases,
            ScratchWords(config.num_scratch),
            transfers,
            stepper,
            assets_of(config),
            clock=lambda: process.loop.time() + self._ahead_s,
            nonce=lambda: rng.getrandbits(64) or 1,
        )
        self.process = process
        self.core: EngineCore | None = None
        self.num_turns = 0
        self.hung_until = 0.0
        """Its thread stands still; the rest of the worker does not."""
        self._simulated = config
        self._rng = rng
        self._ahead_s = 0.0
        self._busy_until = 0.0
        self._due: asyncio.TimerHandle | None = None

    async def start(self, outlet: Outlet) -> EngineInfo:
        """As the real one does, with a tokenizer and a compiler that all engines share."""
        if self.core is not None:
            raise LocalError("the engine was started before")
        self._grammars = GrammarDesk(_compiler_of(self._simulated), self._post)
        self._start_memory()
        limits = self._limits()
        self._loop = self.process.loop
        self._delivery = OutputDelivery(outlet)
        self.core = self._build_core(tokenizer_of(self._simulated), limits, self._grammars)
        self._load = self.core.load()
        self._look_now_and_then(self.core)
        return EngineInfo(
            engine=self._config.engine,
            model_digest=limits.model_digest,
            layout=self._runner.layout,
            capacity=Capacity(self._arena.num_blocks, self._config.max_running, limits.max_context),
            traits=EngineTraits(),
            assets=self._assets,
            transports=tuple(transfer.name for transfer in self._transfers),
        )

    def _look_now_and_then(self, core: EngineCore) -> None:
        """A look at every block after every turn would be most of the simulation's time."""
        validate = core._pool.validate

        def sometimes() -> None:
            if self.num_turns % VALIDATE_ONE_IN == 0:
                validate()

        core._pool.validate = sometimes  # type: ignore[method-assign]

    @property
    def delivery(self) -> OutputDelivery:
        return self._started()

    def hang(self, until: float) -> None:
        """Until then; an earlier time lets it go on now."""
        self.hung_until = until
        if self._due is not None:
            self._due.cancel()
            self._due = None
        self._run_at(self.process.loop.time())

    def _take_time(self, seconds: float) -> None:
        self._ahead_s += seconds

    def _post(self, message: Message) -> None:
        self._inbox.append(message)
        self._run_at(self.process.loop.time() + self._rng.uniform(*WAKE_S))

    def _run_at(self, when: float) -> None:
        when = max(when, self._busy_until, self.hung_until)
        if self._due is not None:
            if self._due.when() <= when:
                return
            self._due.cancel()
        self._due = self.process.loop.call_at(when, self._run, context=self.process.context)

    def _run(self) -> None:
        self._due = None
        if self.hung_until > self.process.loop.time():
            self._run_at(self.hung_until)
            return
        core, delivery = self.core, self._delivery
        if self._stopping or self.process.loop.ending or core is None or delivery is None:
            return
        self.num_turns += 1
        self._ahead_s = 0.0
        more = False
        if self._collapsed:
            self._refuse(core, delivery)
        else:
            more = self._try_turn(core, delivery)
        now = self.process.loop.time() + self._ahead_s
        self._ahead_s = 0.0
        self._busy_until = now + AGAIN_S
        patience_s = 0.0 if more or self._inbox else self._wait_s(core, now)
        if patience_s is not None:
            self._run_at(now + patience_s)

    def _wait_s(self, core: EngineCore, now: float) -> float | None:
        if self._collapsed:
            return None
        deadline = core.next_deadline(now)
        return None if deadline is None else max(0.0, deadline - now)

    def _try_turn(self, core: EngineCore, delivery: OutputDelivery) -> bool:
        try:
            return self._turn(core, delivery)
        except Exception as error:  # noqa: BLE001  as the real thread does
            self.process.loop.failures.append(f"{self.process.name}: engine collapsed: {error!r}")
            self._collapsed = True
            self._send(delivery, core.collapse(f"the engine failed: {error!r}"))
            return False

    def _send(self, delivery: OutputDelivery, outputs: TurnOutputs) -> None:
        if outputs:
            self.process.call(delivery.deliver, outputs, after_s=self._ahead_s)
