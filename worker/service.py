"""Between the mailbox and the engine: jobs in, outcomes out, nothing decided about KV.

Jobs are idempotent: one that is already here makes the service say its state again. A router that
falls silent while our own bus is up loses its jobs, so that nobody works for no one.
"""

import asyncio
import logging
import os
from collections import deque
from collections.abc import Callable, Sequence
from typing import Final

from protocol.blocks import unpack_ids
from protocol.bus import Bus, BusEvent, Message
from protocol.codec import decode_beat, decode_jobs, encode
from protocol.errors import BadMessage, BusError
from protocol.events import KvEvent
from protocol.handoff import KvHandle
from protocol.ids import JobKey, is_name
from protocol.jobs import (
    Body,
    Cancel,
    Decode,
    Done,
    GetAssets,
    GetKvSnapshot,
    Job,
    Ping,
    Pong,
    Prefill,
    Release,
    Renew,
    Replay,
)
from protocol.mailbox import Mailer
from protocol.out import (
    Accepted,
    Decoding,
    Delta,
    Failed,
    Leg,
    Out,
    OutEnvelope,
    Prefilled,
    Progress,
    Refused,
)
from protocol.subjects import Subjects
from protocol.worker_info import WorkerInfo
from text.assets import encode as encode_assets
from worker.engine.base import (
    DecodeJob,
    DecodingInfo,
    Engine,
    EngineError,
    EngineInfo,
    PrefillJob,
    PrefillResult,
)
from worker.outbox import Outbox
from worker.telemetry import Telemetry

_log = logging.getLogger("baton.worker")

ACCEPT_AFTER_S: Final = 0.1
"""`Accepted` is only worth a message if nothing better comes this soon."""
PROGRESS_S: Final = 0.5
SWEEP_S: Final = 1.0
MAX_ROUTERS: Final = 256
EXIT_UNHEALTHY: Final = 70


class Service:
    """One per worker process; the engine's `Outlet`."""

    def __init__(
        self,
        *,
        bus: Bus,
        subjects: Subjects,
        engine: Engine,
        worker: str,
        incarnation: str,
        linger_s: float,
        router_timeout_s: float,
        clock: Callable[[], float],
    ) -> None:
        self._bus = bus
        self._subjects = subjects
        self._engine = engine
        self._worker = worker
        self._incarnation = incarnation
        self._router_timeout_s = router_timeout_s
        self._clock = clock
        self._seqs: dict[str, int] = {}
        self._heard: dict[str, float] = {}
        self._accept_queue: deque[tuple[float, JobKey]] = deque()
        self._accept_timer: asyncio.TimerHandle | None = None
        self._progressed: dict[JobKey, float] = {}
        self._assets = b""
        self._assets_digest = ""
        self._refusing = ""
        self._bad = 0
        self._bad_logged_at = float("-inf")
        self.outbox = Outbox(self._post, linger_s=linger_s)
        self._mailer: Mailer[Out] = Mailer(
            bus, envelope=self._envelope, on_overflow=self._on_overflow
        )
        self.telemetry = Telemetry(
            bus=bus,
            subject=subjects.events(worker),
            worker=worker,
            incarnation=incarnation,
            load=engine.load,
            last_seq=lambda: self._seqs,
        )

    # --- life ---

    async def start(self, info: WorkerInfo, engine_info: EngineInfo) -> None:
        """Listen for jobs. `info` says the role."""
        if engine_info.assets is not None:
            self._assets = encode_assets(engine_info.assets)
            self._assets_digest = engine_info.assets.digest
        self._role = info.role
        self._bus.on_event(self._on_bus_event)
        await self._bus.subscribe(
            self._subjects.jobs(self._worker, self._incarnation), self._on_jobs
        )
        await self._bus.subscribe(self._subjects.routers, self._on_beat)

    async def run(self) -> None:
        """Reports, and the sweep that ends what nobody waits for."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self.telemetry.run(), name="reports")
            tasks.create_task(self._sweep(), name="sweep")

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(SWEEP_S)
            now = self._clock()
            self.outbox.sweep(now)
            if not self._bus.connected:
                continue
            for router, heard in list(self._heard.items()):
                if now - heard > self._router_timeout_s:
                    self._drop_router(router, "silent")

    def refuse(self, reason: str) -> None:
        """Take no new work from now on."""
        self._refusing = reason
        self.telemetry.leaving()

    def close(self) -> None:
        self.telemetry.close()
        if self._accept_timer is not None:
            self._accept_timer.cancel()
        self._mailer.flush_now()

    # --- jobs in ---

    def _on_jobs(self, message: Message) -> None:
        try:
            envelope = decode_jobs(message.payload)
            if not is_name(envelope.router):
                raise BadMessage("the router has no name")
        except BadMessage as error:
            self._bad_message(message.subject, error)
            return
        self._hear(envelope.router)
        for job in envelope.jobs:
            self._on_job(envelope.router, job, message)

    def _on_job(self, router: str, job: Job, message: Message) -> None:
        match job:
            case Prefill() | Decode():
                self._start_job(JobKey(router, job.attempt), job, message.subject)
            case Cancel():
                self._cancel(JobKey(router, job.attempt))
            case Renew():
                self._engine.renew(job.handle_ids)
            case Release():
                self._engine.release(job.handle_ids)
            case Replay():
                self.outbox.replay(JobKey(router, job.attempt), job.index)
            case Done():
                for attempt in job.attempts:
                    self.outbox.forget(JobKey(router, attempt))
            case _:
                self._answer(job, message.reply)

    def _start_job(self, key: JobKey, job: Prefill | Decode, subject: str) -> None:
        if key in self.outbox:
            self.outbox.replay(key, 0)
            return
        reason = self._refusing or self._wrong_role(job)
        if reason:
            self._post(key.router, Refused(key.attempt, reason))
            return
        try:
            output = unpack_ids(job.output)
            prompt = job.prompt if isinstance(job.prompt, Body) else unpack_ids(job.prompt.packed)
        except ValueError as error:
            self._bad_message(subject, BadMessage(str(error)))
            return
        leg: Leg = "prefill" if isinstance(job, Prefill) else "decode"
        self.outbox.open(key, leg)
        if isinstance(job, Prefill):
            self._engine.submit(
                PrefillJob(
                    key, job.choice, prompt, job.sampling, output, job.chars_sent, job.cache_salt
                )
            )
        else:
            self._engine.submit(
                DecodeJob(
                    key,
                    job.choice,
                    prompt,
                    job.sampling,
                    job.handle,
                    output,
                    job.chars_sent,
                    job.cache_salt,
                )
            )
        self._accept_later(key)
        self.telemetry.changed()

    def _wrong_role(self, job: Prefill | Decode) -> str:
        if self._role == "prefill" and isinstance(job, Decode):
            return "wrong_role"
        if self._role == "decode" and isinstance(job, Prefill):
            return "wrong_role"
        return ""

    def _cancel(self, key: JobKey) -> None:
        self._engine.cancel(key)
        self.outbox.forget(key)
        self._progressed.pop(key, None)
        self.telemetry.changed()

    def _answer(self, job: Job, reply: str) -> None:
        if not reply:
            return
        match job:
            case Ping():
                payload = encode(Pong(self._worker, self._incarnation))
            case GetAssets():
                payload = self._assets if job.digest == self._assets_digest else b""
            case GetKvSnapshot():
                payload = encode(self.telemetry.snapshot(self._engine.kv_snapshot()))
            case _:
                return
        try:
            self._bus.publish(reply, payload)
        except BusError as error:
            _log.info("could not answer: %s", error)

    # --- accepting ---

    def _accept_later(self, key: JobKey) -> None:
        due = self._clock() + ACCEPT_AFTER_S
        self._accept_queue.append((due, key))
        if self._accept_timer is None:
            loop = asyncio.get_running_loop()
            self._accept_timer = loop.call_later(ACCEPT_AFTER_S, self._accept_due)

    def _accept_due(self) -> None:
        self._accept_timer = None
        now = self._clock()
        queue = self._accept_queue
        while queue and queue[0][0] <= now + 0.01:
            self.outbox.accept(queue.popleft()[1])
        if queue:
            loop = asyncio.get_running_loop()
            self._accept_timer = loop.call_later(max(queue[0][0] - now, 0.0), self._accept_due)

    # --- routers ---

    def _on_beat(self, message: Message) -> None:
        try:
            beat = decode_beat(message.payload)
        except BadMessage as error:
            self._bad_message(message.subject, error)
            return
        if beat.leaving:
            self._drop_router(beat.router, "left")
        elif beat.router in self._heard:
            self._hear(beat.router)

    def _hear(self, router: str) -> None:
        if router not in self._heard and len(self._heard) >= MAX_ROUTERS:
            oldest = min(self._heard, key=self._heard.__getitem__)
            self._drop_router(oldest, "too many routers")
        self._heard[router] = self._clock()

    def _drop_router(self, router: str, why: str) -> None:
        keys = self.outbox.keys_of(router)
        if keys:
            _log.info("router %s: %s, stopping jobs=%d", why, router, len(keys))
        for key in keys:
            self._cancel(key)
        self._heard.pop(router, None)
        self._seqs.pop(router, None)

    def _on_bus_event(self, event: BusEvent) -> None:
        if event.kind == "up":  # silence before this moment was ours, not theirs
            now = self._clock()
            for router in self._heard:
                self._heard[router] = now
            self.telemetry.report()

    # --- what the engine says (Outlet) ---

    def accepted(self, key: JobKey, handle: KvHandle | None) -> None:
        if handle is not None:
            self.outbox.accept(key, Accepted(key.attempt, handle))

    def progress(self, key: JobKey, leg: Leg, done: int, total: int) -> None:
        now = self._clock()
        if key in self.outbox and now - self._progressed.get(key, -1.0) >= PROGRESS_S:
            self._progressed[key] = now
            self._post(key.router, Progress(key.attempt, leg, done, total))

    def prefilled(self, key: JobKey, result: PrefillResult) -> None:
        if key not in self.outbox:
            if result.handle is not None:
                self._engine.release([result.handle.handle_id])
            return
        self._progressed.pop(key, None)
        self.outbox.prefilled(
            key,
            Prefilled(
                key.attempt,
                result.prompt_tokens,
                result.cached_tokens,
                result.first,
                result.handle,
                result.queue_s,
                result.prefill_s,
            ),
            self._clock(),
        )
        self.telemetry.changed()

    def decoding(self, key: JobKey, info: DecodingInfo) -> None:
        self._progressed.pop(key, None)
        self.outbox.decoding(
            key,
            Decoding(
                key.attempt,
                info.cached_tokens,
                info.transport,
                info.transfer_bytes,
                info.transfer_s,
            ),
        )

    def step(self, deltas: Sequence[tuple[JobKey, Delta]]) -> None:
        self.outbox.step(deltas, self._clock())
        self.telemetry.changed()

    def failed(self, key: JobKey, error: EngineError) -> None:
        self._progressed.pop(key, None)
        message = Failed(key.attempt, error.leg, error.code, error.message)
        self.outbox.failed(key, message, self._clock())
        self.telemetry.changed()

    def kv_events(self, first_id: int, events: Sequence[KvEvent]) -> None:
        self.telemetry.kv_events(first_id, events)

    def unhealthy(self, reason: str) -> None:
        """Say so and end: the process is the fence around what may still be written."""
        _log.critical("worker unhealthy, exiting: %s", reason)
        self.refuse("unhealthy")
        self._mailer.flush_now()
        asyncio.get_running_loop().call_later(0.2, os._exit, EXIT_UNHEALTHY)

    # --- mail ---

    def _post(self, router: str, out: Out) -> None:
        self._mailer.post(self._subjects.out(router, self._worker), out)

    def _envelope(self, subject: str, outs: list[Out]) -> bytes:
        router = self._subjects.router_of(subject)
        seq = self._seqs.get(router, 0) + 1
        self._seqs[router] = seq
        return encode(OutEnvelope(self._worker, self._incarnation, seq, outs))

    def _on_overflow(self, subject: str, outs: list[Out]) -> None:
        """The number is used up, so the router sees the gap and asks again."""
        _log.warning("bus is full, dropped outcomes=%d for %s", len(outs), subject)

    def _bad_message(self, subject: str, error: BadMessage) -> None:
        """Count rubbish; say so once a minute."""
        self._bad += 1
        now = self._clock()
        if now - self._bad_logged_at >= 60.0:
            _log.warning("ignored bad messages count=%d last=%s: %s", self._bad, subject, error)
            self._bad_logged_at = now
            self._bad = 0
