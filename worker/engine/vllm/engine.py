"""The `Engine` port over one vLLM server: jobs are tasks that hold a request open.

What a job asks and tells is in `legs`, how vLLM is watched in `watch`, what it caches in
`kv_index`. Everything runs on the service's loop; there is no thread.
"""

import asyncio
import logging
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, replace
from typing import Final

from protocol.blocks import seed_of
from protocol.errors import ConfigError
from protocol.events import KvEvent
from protocol.ids import JobKey
from protocol.out import Delta, FailureCode, Leg
from protocol.worker_info import Capacity, EngineTraits, KvLayout
from text.assets import CONFIG_FILE, AssetsError
from text.tokenizer import Tokenizer
from worker.engine.base import (
    DecodeJob,
    DecodingInfo,
    EngineError,
    EngineInfo,
    EngineStats,
    Load,
    Outlet,
    PrefillJob,
    PrefillResult,
    Snapshot,
)
from worker.engine.sequences import ModelLimits, SequenceRefused, build_sequence
from worker.engine.vllm import legs
from worker.engine.vllm.client import QUIET_S, VllmClient, VllmError
from worker.engine.vllm.facts import load_folder, model_digest, model_folder, vocab_size
from worker.engine.vllm.handles import LentHandles
from worker.engine.vllm.kv_index import KvIndex
from worker.engine.vllm.watch import SILENT_S, Found, Verdict, Watch, wait_for_vllm

_log = logging.getLogger("baton.engine")

DRAIN_POLL_S: Final = 0.2
PULL_S: Final = 15.0
"""A pull from a dead server fails after 5 s; one that takes so long waits for vLLM's engine."""
_INDEX_SLACK: Final = 2


@dataclass(frozen=True, slots=True)
class VllmConfig:
    """Where vLLM is and how it was started. Times in seconds."""

    url: str
    worker: str
    incarnation: str
    model_folder: str = ""
    served_name: str = ""
    api_key: str = ""
    kv_events_url: str = ""
    kv_replay_url: str = ""
    lease_s: float = 30.0
    """vLLM's own `kv_lease_duration`: it cannot be asked for it."""
    max_running: int = 64
    start_timeout_s: float = 300.0
    silent_s: float = SILENT_S
    """The whole server: its jobs move."""
    quiet_s: float = QUIET_S
    """One answer of a server that is well: its leg ends."""


@dataclass(slots=True, eq=False)
class _Job:
    job: PrefillJob | DecodeJob
    since: float
    task: "asyncio.Task[None] | None" = None
    is_decoding: bool = False

    @property
    def leg(self) -> Leg:
        if isinstance(self.job, PrefillJob):
            return "prefill"
        return "transfer" if self.job.handle is not None and not self.is_decoding else "decode"


class VllmEngine:
    """Belongs to one event loop. The clocks and `new_id` are given."""

    def __init__(
        self,
        config: VllmConfig,
        *,
        clock: Callable[[], float],
        wall_clock: Callable[[], float],
        new_id: Callable[[], str],
    ) -> None:
        self._config = config
        self._clock = clock
        self._wall_clock = wall_clock
        self._new_id = new_id
        self._jobs: dict[JobKey, _Job] = {}
        self._deltas: list[tuple[JobKey, Delta]] = []
        self._tasks: list[asyncio.Task[None]] = []
        self._legs: set[asyncio.Task[None]] = set()
        """Of jobs, and of ended ones whose stream is read to its end."""
        self._stats = EngineStats()
        self._last_event = 0
        self._serial = 0
        self._moves = 0
        """Looks at which vLLM had moved on."""
        self._dead = ""

    # --- life ---

    async def start(self, outlet: Outlet) -> EngineInfo:
        """Wait for vLLM, then know it. Raises ConfigError."""
        config = self._config
        self._outlet = outlet
        self._client = VllmClient(config.url, api_key=config.api_key, quiet_s=config.quiet_s)
        found = await wait_for_vllm(
            self._client, config.served_name, timeout_s=config.start_timeout_s, clock=self._clock
        )
        info = await asyncio.to_thread(self._read_model, found)
        self._watch = Watch(
            self._client,
            found.metrics,
            clock=self._clock,
            is_busy=self._is_owed_tokens,
            silent_s=config.silent_s,
        )
        self._start_kv_events()
        self._spawn(lambda: self._watch.run(self._on_verdict), "watch vllm")
        return info

    def _read_model(self, found: Found) -> EngineInfo:
        config, model, metrics = self._config, found.model, found.metrics
        folder = model_folder(config.model_folder, model.root, self._client.url)
        assets = load_folder(folder)
        try:
            self._tokenizer = Tokenizer.from_assets(assets)
        except AssetsError as error:
            raise ConfigError(str(error)) from None
        digest = model_digest(
            model, metrics, found.version, folder, assets.files.get(CONFIG_FILE, b"")
        )
        self._limits = ModelLimits(
            model_digest=digest,
            block_size=metrics.block_size,
            vocab_size=vocab_size(assets, self._tokenizer.vocab_size),
            max_context=model.max_model_len,
            eos_ids=self._tokenizer.eos_ids,
        )
        self._site = legs.Site(
            client=self._client,
            model=model.id,
            worker=config.worker,
            incarnation=config.incarnation,
            lease_s=config.lease_s,
            clock=self._clock,
            wall_clock=self._wall_clock,
            new_id=self._new_id,
        )
        self._lent = LentHandles(lease_s=config.lease_s, block_size=metrics.block_size)
        self._index = KvIndex(
            block_size=metrics.block_size,
            seed=seed_of(digest),
            max_blocks=metrics.num_blocks * _INDEX_SLACK,
        )
        return EngineInfo(
            engine="vllm",
            model_digest=digest,
            layout=KvLayout(metrics.block_size, 0, metrics.cache_dtype),
            capacity=Capacity(metrics.num_blocks, config.max_running, model.max_model_len),
            traits=EngineTraits(first_token="recomputed", release="timeout"),
            assets=assets,
            transports=("vllm",),
            model_name=model.id,
        )

    def _start_kv_events(self) -> None:
        if not self._config.kv_events_url:
            _log.info("no kv_events_url: routers do not know what this vLLM caches")
            return
        try:
            from worker.engine.vllm.kv_events import KvEventStream
        except ModuleNotFoundError as error:
            raise ConfigError(
                f"KV events need the package {error.name!r}: install baton-serve[vllm]"
            ) from None
        stream = KvEventStream(
            self._index,
            url=self._config.kv_events_url,
            replay_url=self._config.kv_replay_url,
            said=self._say_events,
        )
        self._spawn(stream.run, "kv events")

    def _spawn(self, work: Callable[[], Coroutine[object, object, None]], name: str) -> None:
        async def run() -> None:
            try:
                await work()
            except Exception as error:  # noqa: BLE001  whatever it is, this engine is blind now
                _log.exception("%s ended", name)
                self._die(f"{name}: {error!r}")

        self._tasks.append(asyncio.create_task(run(), name=name))

    async def drain(self) -> None:
        """Until nothing runs and every lease has run out: vLLM cannot be asked for less."""
        while True:
            self._lent.expire(self._clock())
            if not self._jobs and not len(self._lent):
                return
            await asyncio.sleep(DRAIN_POLL_S)

    async def stop(self) -> bool:
        tasks = [*self._tasks, *self._legs]
        self._jobs.clear()
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
        if hasattr(self, "_client"):
            await self._client.close()
        return True

    # --- jobs ---

    def submit(self, job: PrefillJob | DecodeJob) -> None:
        if job.key in self._jobs:
            return
        entry = self._jobs[job.key] = _Job(job, self._clock())
        entry.task = asyncio.create_task(self._run(entry), name=f"leg {job.choice}")
        self._legs.add(entry.task)
        entry.task.add_done_callback(self._legs.discard)

    def cancel(self, key: JobKey) -> None:
        entry = self._jobs.pop(key, None)
        if entry is not None and entry.task is not None:
            entry.task.cancel()

    async def _run(self, entry: _Job) -> None:
        job = entry.job
        try:
            await self._run_leg(job)
        except SequenceRefused as refusal:
            self._fail(entry, refusal.code, str(refusal))
        except VllmError as error:
            has_handle = isinstance(job, DecodeJob) and job.handle is not None
            code = legs.failure(error, has_handle=has_handle, is_decoding=entry.is_decoding)
            self._fail(entry, code, str(error))
        except (asyncio.CancelledError, GeneratorExit, KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # noqa: BLE001  a panic too; one bad leg takes no other along
            _log.exception("a leg failed choice=%s", job.choice)
            self._fail(entry, "engine", repr(error))

    async def _run_leg(self, job: PrefillJob | DecodeJob) -> None:
        self._serial += 1
        now = self._clock()
        sequence = build_sequence(job, self._limits, self._tokenizer, serial=self._serial, now=now)
        if self._dead or self._watch.is_silent:
            silent_s = self._watch.silent_s
            raise VllmError("silent", self._dead or f"vLLM has been silent for {silent_s:.1f} s")
        if isinstance(job, PrefillJob):
            await legs.prefill(self._site, job, sequence, self)
            self._stats.prefilled_tokens += len(sequence.ids)
        else:
            await legs.decode(self._site, job, sequence, self)

    def _fail(self, entry: _Job, code: FailureCode, message: str) -> None:
        key, leg = entry.job.key, entry.leg
        if self._jobs.get(key) is not entry:
            return
        self._flush()
        if self._jobs.pop(key, None) is None:
            return  # it had ended before it failed
        if leg == "transfer":
            self._count("failed")
        self._outlet.failed(key, EngineError(leg, code, message))

    def _count(self, result: str) -> None:
        key = ("vllm", result)
        self._stats.transfers[key] = self._stats.transfers.get(key, 0) + 1

    # --- what legs tell (`legs.Told`) ---

    def prefilled(self, key: JobKey, result: PrefillResult) -> None:
        if self._jobs.pop(key, None) is None:
            return
        if result.handle is not None:
            self._lent.lend(result.handle, self._clock())
        self._stats.cached_tokens += result.cached_tokens
        self._watch.moved()
        self._outlet.prefilled(key, result)

    def decoding(self, key: JobKey, info: DecodingInfo) -> None:
        entry = self._jobs.get(key)
        if entry is None:
            return
        entry.is_decoding = True
        if info.transport:
            self._count("ok")
        self._outlet.decoding(key, info)

    def delta(self, key: JobKey, delta: Delta) -> None:
        """One frame for all that one turn of the loop has read."""
        self._watch.moved()
        if not self._deltas:
            asyncio.get_running_loop().call_soon(self._flush)
        self._deltas.append((key, delta))

    def _flush(self) -> None:
        deltas, self._deltas = self._deltas, []
        said = []
        for key, delta in deltas:
            if key in self._jobs:  # else it was cancelled meanwhile
                said.append((key, delta))
                self._stats.decoded_tokens += len(delta.ids)
                if delta.finish:
                    del self._jobs[key]
        if said:
            self._outlet.step(said)

    # --- vLLM's health ---

    def _is_owed_tokens(self) -> bool:
        """A pull is no work of vLLM's engine, so for a while it does not ask for steps."""
        due = self._clock() - PULL_S
        return any(entry.leg != "transfer" or entry.since <= due for entry in self._jobs.values())

    def _on_verdict(self, verdict: Verdict) -> None:
        """After every look at vLLM."""
        self._lent.expire(self._clock())
        if verdict.dead:
            self._die(verdict.dead)
        elif verdict.silent:
            self._fail_all(verdict.silent)
        elif verdict.moved:
            self._moves += 1  # all that can be told: what does not count up is no sign of life
            for key, entry in self._jobs.items():
                # a pull's deadline is the router's: others' progress says nothing about it
                if not entry.is_decoding and entry.leg != "transfer":
                    self._outlet.progress(key, "prefill", self._moves, self._moves + 1)

    def _fail_all(self, reason: str) -> None:
        for entry in list(self._jobs.values()):
            self._fail(entry, "engine", reason)
            if entry.task is not None:
                entry.task.cancel()

    def _die(self, reason: str) -> None:
        """Its KV is gone: whoever starts us again is another incarnation with an empty cache."""
        if self._dead:
            return
        self._dead = reason
        self._fail_all(reason)
        self._outlet.unhealthy(reason)

    # --- numbers ---

    def renew(self, handle_ids: Sequence[str]) -> None:
        """vLLM's leases cannot be renewed from here: only the puller can."""

    def release(self, handle_ids: Sequence[str]) -> None:
        """Only the books: vLLM frees blocks when they were fetched, or by its own clock."""
        self._lent.release(handle_ids)

    def load(self) -> Load:
        """From any thread, as `stats`: only reads, plain numbers and copies made without a break.
        Leases end on the loop."""
        metrics = self._watch.metrics
        jobs = list(self._jobs.values())
        num_decoding = sum(entry.is_decoding for entry in jobs)
        free = int(metrics.num_blocks * (1.0 - metrics.kv_usage))
        return Load(
            running=max(metrics.running, num_decoding),
            # a silent server shall not look idle: its step counter is watched while there is work
            waiting=max(metrics.waiting, len(jobs) - num_decoding, int(self._watch.is_silent)),
            num_blocks=metrics.num_blocks,
            free_blocks=free,
            cached_blocks=min(len(self._index), free),
            lent_blocks=min(self._lent.num_blocks, metrics.num_blocks - free),
            quarantined_blocks=0,
            steps=self._watch.steps,
        )

    def stats(self) -> EngineStats:
        ended = {"released": self._lent.num_released, "expired": self._lent.num_expired}
        return replace(self._stats, leases_ended=ended, transfers=dict(self._stats.transfers))

    # --- what is cached ---

    def _say_events(self, events: list[KvEvent]) -> None:
        first = self._last_event + 1
        self._last_event += len(events)
        self._outlet.kv_events(first, events)

    def kv_snapshot(self) -> Snapshot:
        return Snapshot(self._last_event, self._index.hashes)
