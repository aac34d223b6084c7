"""The engine that all stepped models share: `EngineCore` in a thread of its own.

The loop and the transports' threads put messages into the inbox; the thread alone changes state,
and what a turn has to say goes to the loop in one call. Idle, the thread sleeps until a message or
the next deadline. It knows no bus and no model.
"""

import asyncio
import logging
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from itertools import count
from typing import Final

import msgspec

from protocol.errors import ConfigError, LocalError
from protocol.ids import JobKey
from protocol.worker_info import Capacity, EngineTraits
from text.assets import AssetsError, ModelAssets
from text.tokenizer import Tokenizer
from worker.engine.base import (
    DecodeJob,
    EngineInfo,
    EngineStats,
    Load,
    Outlet,
    PrefillJob,
    Snapshot,
)
from worker.engine.core import EngineCore
from worker.engine.grammar import GrammarCompiler
from worker.engine.grammar_desk import GrammarDesk
from worker.engine.lending import HandleIdentity, Lender
from worker.engine.messages import Cancel, Drain, Message, Release, Renew, Submit
from worker.engine.messages import StepperConfig as StepperConfig
from worker.engine.outputs import OutputDelivery, TurnOutputs
from worker.engine.pulling import Puller
from worker.engine.runner import ModelRunner
from worker.engine.sequences import ModelLimits
from worker.handoff.sink import Sink
from worker.handoff.source import Source
from worker.kv.arena import Arena, LeaseTable, ScratchWords
from worker.kv.pool import BlockPool
from worker.transfer.base import PassedOver, Transfer

_log: Final = logging.getLogger("baton.engine")


def _nonce() -> int:
    """A fresh word that is never zero."""
    return secrets.randbits(64) or 1


class Stepper:
    """An `Engine` around a `ModelRunner`. Owns the memory it is given, and closes it."""

    def __init__(
        self,
        runner: ModelRunner,
        arena: Arena,
        leases: LeaseTable,
        scratch: ScratchWords,
        transfers: Sequence[Transfer],
        config: StepperConfig,
        assets: ModelAssets,
        *,
        clock: Callable[[], float] = time.monotonic,
        nonce: Callable[[], int] = _nonce,
        interrupt: Callable[[], None] = lambda: None,
    ) -> None:
        """`interrupt` makes a step that waits return early; called by `stop`."""
        self._runner = runner
        self._arena = arena
        self._leases = leases
        self._scratch = scratch
        self._transfers = list(transfers)
        self._reasons = dict(config.transport_reasons)
        self._config = config
        self._assets = assets
        self._clock = clock
        self._nonce = nonce
        self._interrupt = interrupt
        self._inbox: deque[Message] = deque()
        self._cancel_waits = False
        self._wake = threading.Event()
        self._stopping = False
        self._collapsed = False
        self._serials = count(1)
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._core: EngineCore | None = None
        self._delivery: OutputDelivery | None = None
        self._grammars: GrammarDesk | None = None
        self._load = Load(0, 0, arena.num_blocks, arena.num_blocks, 0, 0, 0, 0)

    async def start(self, outlet: Outlet) -> EngineInfo:
        """Register the memory with the transports and start the thread. Raises ConfigError."""
        if self._thread is not None:
            raise LocalError("the engine was started before")
        try:
            tokenizer = await asyncio.to_thread(Tokenizer.from_assets, self._assets)
        except AssetsError as error:
            raise ConfigError(str(error)) from error
        grammars = GrammarCompiler(tokenizer)
        if missing := await asyncio.to_thread(grammars.prepare):
            _log.info("schemas will be refused: %s", missing)
        self._grammars = GrammarDesk(grammars, self._post)
        await asyncio.to_thread(self._start_memory)
        limits = self._limits()
        core = self._core = self._build_core(tokenizer, limits, self._grammars)
        self._load = core.load()
        self._loop = asyncio.get_running_loop()
        self._delivery = OutputDelivery(outlet)
        self._thread = threading.Thread(
            target=self._main, args=(core, self._delivery), name="baton-engine", daemon=True
        )
        self._thread.start()
        return EngineInfo(
            engine=self._config.engine,
            model_digest=limits.model_digest,
            layout=self._runner.layout,
            capacity=Capacity(self._arena.num_blocks, self._config.max_running, limits.max_context),
            traits=EngineTraits(),
            assets=self._assets,
            transports=tuple(transfer.name for transfer in self._transfers),
            transport_reasons=self._reasons,
        )

    def submit(self, job: PrefillJob | DecodeJob) -> None:
        serial = next(self._serials)
        if self._started().open(job.key, serial):
            self._post(Submit(job, serial))

    def cancel(self, key: JobKey) -> None:
        self._started().forget(key)
        self._cancel_waits = True  # first: the thread may take it at once
        self._post(Cancel(key))

    def renew(self, handle_ids: Sequence[str]) -> None:
        self._post(Renew(tuple(handle_ids)))

    def release(self, handle_ids: Sequence[str]) -> None:
        self._post(Release(tuple(handle_ids)))

    def load(self) -> Load:
        """As the thread left it, and what it has not come to since: one that hangs in its first
        step would seem idle for ever, and again once its jobs were taken away."""
        load, delivery = self._load, self._delivery
        known = load.running + load.waiting
        num_open = delivery.num_open if delivery is not None else 0
        unseen = max(num_open, int(self._cancel_waits)) - known
        if unseen <= 0:
            return load
        return msgspec.structs.replace(load, waiting=load.waiting + unseen)

    def stats(self) -> EngineStats:
        return EngineStats() if self._core is None else self._core.stats()

    def kv_snapshot(self) -> Snapshot:
        return self._started().snapshot()

    async def drain(self) -> None:
        self._started()
        drained = asyncio.Event()
        self._post(Drain(drained))
        try:
            await drained.wait()
        finally:
            self._post(Drain(drained, wanted=False))

    async def stop(self) -> bool:
        """The memory is closed only if no transport can touch it any more."""
        self._stopping = True
        if self._delivery is not None:
            self._delivery.close()
        self._interrupt()
        if self._grammars is not None:
            self._grammars.stop()
        self._wake.set()
        ended = True
        if self._thread is not None:
            await asyncio.to_thread(self._thread.join, self._config.stop_timeout_s)
            ended = not self._thread.is_alive()
        terminal = await asyncio.to_thread(self._stop_transfers)
        if ended and terminal:
            self._arena.close()
            self._leases.close()
        return ended and terminal

    def _started(self) -> OutputDelivery:
        if self._delivery is None:
            raise LocalError("the engine was not started")
        return self._delivery

    def _post(self, message: Message) -> None:
        """From any thread."""
        self._inbox.append(message)
        if not self._wake.is_set():
            self._wake.set()

    # starting and stopping

    def _start_memory(self) -> None:
        started: list[Transfer] = []
        try:
            for transfer in self._transfers:
                try:
                    transfer.start(self._arena, self._leases, self._scratch)
                except PassedOver as error:
                    _log.warning("transfer %s passed over: %s", transfer.name, error)
                    self._reasons[transfer.name] = f"passed over: {error}"
                    continue
                started.append(transfer)
            if not started and self._transfers:
                raise ConfigError(f"no transfer could be started: {self._reasons}")
            self._transfers = started
            self._runner.bind(self._arena)
        except BaseException:
            for transfer in started:
                transfer.stop()
            raise

    def _stop_transfers(self) -> bool:
        stopped = [transfer.stop() for transfer in self._transfers]
        return all(stopped)

    def _limits(self) -> ModelLimits:
        block_size = self._runner.layout.block_size
        return ModelLimits(
            model_digest=self._runner.model_digest,
            block_size=block_size,
            vocab_size=self._runner.vocab_size,
            max_context=min(self._runner.max_context, self._arena.num_blocks * block_size),
            eos_ids=self._runner.eos_ids,
        )

    def _build_core(
        self, tokenizer: Tokenizer, limits: ModelLimits, grammars: GrammarDesk
    ) -> EngineCore:
        config, num_blocks = self._config, self._arena.num_blocks
        pool = BlockPool(num_blocks, limits.block_size)
        source = Source(
            pool, self._leases, num_slots=self._leases.num_slots, lease_s=config.lease_s
        )
        bound = config.max_quarantined_blocks
        sink = Sink(
            num_scratch=self._scratch.num_slots,
            max_tokens_in_flight=config.max_tokens_in_flight,
            timeout_s=config.transfer_timeout_s,
            max_quarantined_blocks=num_blocks // 2 if bound is None else bound,
            block_size=limits.block_size,
        )
        identity = HandleIdentity(
            config.worker, config.incarnation, limits.block_size, config.lease_s
        )
        offers = [transfer.offer() for transfer in self._transfers]
        puller = Puller(
            pool,
            sink,
            self._transfers,
            self._scratch,
            block_bytes=self._arena.block_bytes,
            post=self._post,
            why=self._reasons,
        )
        return EngineCore(
            self._runner,
            pool,
            Lender(source, identity, offers, nonce=self._nonce),
            puller,
            grammars,
            tokenizer=tokenizer,
            limits=limits,
            config=config,
            num_blocks=num_blocks,
            clock=self._clock,
        )

    # the thread

    def _main(self, core: EngineCore, delivery: OutputDelivery) -> None:
        while not self._stopping:
            self._wake.clear()
            if self._collapsed:
                self._refuse(core, delivery)
                self._wake.wait()
                continue
            try:
                more = self._turn(core, delivery)
            except BaseException as error:  # noqa: BLE001  a panic too; ends the engine alone
                _log.exception("the engine broke one of its own rules")
                self._collapsed = True
                self._send(delivery, core.collapse(f"the engine failed: {error!r}"))
                self._wake.set()
                continue
            if not more and not self._stopping:
                self._wake.wait(self._patience(core))

    def _turn(self, core: EngineCore, delivery: OutputDelivery) -> bool:
        now = self._clock()
        self._cancel_waits = False
        while self._inbox:
            core.handle(self._inbox.popleft(), now)
        more = core.turn(now)
        self._load = core.load()
        self._send(delivery, core.take_outputs())
        return more

    def _patience(self, core: EngineCore) -> float | None:
        """How long nothing is due; None for ever."""
        now = self._clock()
        deadline = core.next_deadline(now)
        return None if deadline is None else max(0.0, deadline - now)

    def _refuse(self, core: EngineCore, delivery: OutputDelivery) -> None:
        self._cancel_waits = False
        while self._inbox:
            self._send(delivery, core.refuse(self._inbox.popleft()))

    def _send(self, delivery: OutputDelivery, outputs: TurnOutputs) -> None:
        if not outputs or self._loop is None:
            return
        try:
            self._loop.call_soon_threadsafe(delivery.deliver, outputs)
        except RuntimeError:  # the loop is closed: nobody listens, and nobody will call `stop`
            self._stopping = True
