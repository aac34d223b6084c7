"""The `shm` transport: copies straight out of the arena of another process on the same host.

One-sided: the source does nothing, so a frozen source can be pulled from. The lease word is read
after the data by a separate operation, in the thread that asks; plain loads keep that order on
x86-64 only, so offers of other machines are refused. A source that died during a pull does no harm:
its memory lives as long as it is mapped and cannot change any more.
"""

import ctypes
import logging
import math
import os
import platform
import queue
import threading
import time
from typing import Final

from protocol.errors import LocalError
from protocol.handoff import Offer, ShmOffer
from worker.kv.arena import Arena, LeaseTable, ScratchWords
from worker.transfer.base import OnEnd, PullSpec
from worker.transfer.operations import LiveCount, Operation, out_of_range, runs, wrong_local
from worker.transfer.shm_map import SourceClosed, SourceGone, SourceMap, SourceMaps

_logger = logging.getLogger(__name__)

_ORDERED_MACHINES: Final = frozenset({"x86_64", "AMD64"})
_COPY_BYTES: Final = 1 << 20
"""One copy at most: progress, abort and stop are looked at in between."""
_THROTTLE_S: Final = 0.05
"""A throttled pull copies at most so much of its time at once."""
_SWEEP_S: Final = 1.0


class ShmTransfer:
    """Implements `Transfer`."""

    def __init__(self, *, num_threads: int = 2, throttle_bytes_per_s: float | None = None) -> None:
        self._num_threads = num_threads
        self._throttle = throttle_bytes_per_s
        self._live = LiveCount()
        self._maps = SourceMaps()
        # Bounded by its callers: an operation has blocks of the arena or a scratch word.
        self._queue: queue.SimpleQueue[Operation | None] = queue.SimpleQueue()
        self._stopping = threading.Event()
        self._submit_lock = threading.Lock()
        self._threads: list[threading.Thread] = []
        self._host_id = ""
        self._arena: Arena | None = None
        self._leases: LeaseTable | None = None
        self._scratch: ScratchWords | None = None

    @property
    def name(self) -> str:
        return "shm"

    @property
    def num_mapped(self) -> int:
        """Sources whose memory is mapped now."""
        return len(self._maps)

    def start(self, arena: Arena, leases: LeaseTable, scratch: ScratchWords) -> None:
        self._arena, self._leases, self._scratch = arena, leases, scratch
        self._host_id = host_id()
        for number in range(self._num_threads):
            thread = threading.Thread(target=self._run, name=f"shm-copy-{number}", daemon=True)
            thread.start()
            self._threads.append(thread)

    def offer(self) -> Offer:
        if self._arena is None or self._leases is None:
            raise LocalError("shm is not started")
        return ShmOffer(
            boot_id=self._host_id,
            pid=os.getpid(),
            arena_fd=self._arena.fd,
            lease_fd=self._leases.fd,
            arena_bytes=self._arena.nbytes,
            lease_bytes=self._leases.nbytes,
            token=self._leases.token,
            machine=platform.machine(),
        )

    def refuse(self, offer: Offer) -> str:
        if not isinstance(offer, ShmOffer):
            return "not an offer of shm"
        if offer.boot_id != self._host_id:
            return "the source is on another host or in another pid namespace"
        if offer.machine not in _ORDERED_MACHINES:
            return f"no ordered loads on {offer.machine}"
        try:
            self._maps.release(self._maps.acquire(offer))
        except SourceClosed as error:
            return str(error)
        except SourceGone:
            pass  # the pull says so, with `peer_gone`
        return ""

    def pull(self, spec: PullSpec, on_end: OnEnd) -> Operation:
        with self._submit_lock:
            operation = self._begin(spec, on_end, None)
            self._queue.put(operation)
        return operation

    def read_word(self, spec: PullSpec, scratch_slot: int, on_end: OnEnd) -> None:
        """At once, in the caller's thread: one load costs less than waking another thread. Whoever
        asks has heard of the pull's end, so the order holds."""
        with self._submit_lock:
            operation = self._begin(spec, on_end, scratch_slot)
        self._perform(operation)

    def num_live(self) -> int:
        return self._live.value

    def stop(self) -> bool:
        """A running copy ends at the next piece: nothing can stay live, but a stuck callback."""
        with self._submit_lock:
            self._stopping.set()
        for _ in self._threads:
            self._queue.put(None)
        for thread in self._threads:
            thread.join(timeout=2.0)
        if any(thread.is_alive() for thread in self._threads):
            return False
        self._maps.clear()
        return self._live.value == 0

    def _begin(self, spec: PullSpec, on_end: OnEnd, scratch_slot: int | None) -> Operation:
        if not self._threads or self._stopping.is_set():
            raise LocalError("shm is not running")
        return Operation(spec, on_end, self._live, scratch_slot=scratch_slot)

    def _run(self) -> None:
        swept_at = time.monotonic()
        while True:
            try:
                operation = self._queue.get(timeout=_SWEEP_S)
            except queue.Empty:
                pass
            else:
                if operation is None:
                    return
                self._perform(operation)
            now = time.monotonic()
            if now - swept_at >= _SWEEP_S:
                swept_at = now
                self._sweep(now)

    def _sweep(self, now: float) -> None:
        """Never raises: the thread has copies to make."""
        try:
            self._maps.sweep(now)
        except Exception:
            _logger.exception("dead sources' memory stays mapped for now")

    def _perform(self, operation: Operation) -> None:
        """Always ends the operation."""
        offer = operation.spec.offer
        if not isinstance(offer, ShmOffer):
            operation.end(False, "bad_request: not an offer of shm")
            return
        source = word = None
        reason, peer_gone = "internal: the copy raised", False
        try:
            source = self._maps.acquire(offer)
            if operation.scratch_slot is None:
                reason = self._copy(operation, source)
            else:
                reason, word = self._read(operation, source, operation.scratch_slot)
        except SourceGone as error:
            reason, peer_gone = f"gone: {error}", True
        except SourceClosed as error:
            reason = f"closed: {error}"
        except Exception:
            _logger.exception("a copy raised")
        finally:
            if source is not None:
                self._maps.release(source)
        operation.end(not reason, reason, word=word, peer_gone=peer_gone)

    def _copy(self, operation: Operation, source: SourceMap) -> str:
        """Why it ended early; empty when every byte is here."""
        arena, spec = self._arena, operation.spec
        assert arena is not None
        size = spec.block_bytes
        wrong = wrong_local(spec, arena.num_blocks, arena.block_bytes)
        if wrong:
            return wrong
        if out_of_range(spec.remote, source.arena_bytes // size):
            return "bad_request: a remote block outside of the source's arena"
        at_once = min(_COPY_BYTES, (self._throttle or math.inf) * _THROTTLE_S)
        for remote, local, count in runs(spec.remote, spec.local, max(1, int(at_once // size))):
            if self._stopping.is_set():
                return "stopped: the worker leaves"
            if operation.aborted:
                return "aborted: given up by the caller"
            ctypes.memmove(
                arena.address + local * size, source.arena_address + remote * size, count * size
            )
            operation.num_bytes_done += count * size
            if self._throttle:
                self._stopping.wait(count * size / self._throttle)
        return ""

    def _read(
        self, operation: Operation, source: SourceMap, scratch_slot: int
    ) -> tuple[str, int | None]:
        assert self._scratch is not None
        if not 0 <= operation.spec.slot < source.num_slots:
            return "bad_request: a slot outside of the source's lease table", None
        word = source.word(operation.spec.slot)
        self._scratch.write(scratch_slot, word)
        return "", word


def host_id() -> str:
    """The kernel's boot and our pid namespace: equal ids can open each other's `/proc/<pid>`."""
    with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
        boot_id = file.read().strip()
    return f"{boot_id}/{os.stat('/proc/self/ns/pid').st_ino}"


def shm_unavailable() -> str:
    """Why this machine cannot serve or pull over shm; empty if it can."""
    if platform.machine() not in _ORDERED_MACHINES:
        return f"no ordered loads on {platform.machine()}"
    if not os.path.exists("/proc/self/ns/pid") or not hasattr(os, "memfd_create"):
        return "needs Linux's memfd and /proc"
    return ""
