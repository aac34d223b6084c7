"""A transport between the arenas of simulated workers, block by block and in virtual time.

Three kinds, as real ones are: `fabric` reads the source's memory without asking it and cannot stop
what is in flight; `shm` does the same and can stop; `tcp` needs the source alive and awake, who
looks at the lease word after its last byte was copied out. Blocks arrive in any order, others run
in between. Reading a dead source fails, now or after a long silence. It knows no leases' rules.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count
from typing import Literal

from protocol.handoff import Offer, TcpOffer
from tests.sim.loop import Process, SimLoop
from worker.handoff.ends import TransferEnd
from worker.kv.arena import Arena, LeaseTable, ScratchWords
from worker.transfer.base import OnEnd, PullSpec

Kind = Literal["fabric", "shm", "tcp"]

BLOCK_S = (0.0005, 0.02)
POLL_S = 0.05
BLOCKS_AT_ONCE = 4


@dataclass(slots=True)
class Endpoint:
    """One worker's memory, as others see it."""

    process: Process
    arena: Arena
    leases: LeaseTable
    closed: bool = False
    apart: bool = False
    """Its peers cannot reach it for now."""


@dataclass(slots=True)
class Fabric:
    """What lies between the workers."""

    loop: SimLoop
    rng: random.Random
    kind: Kind
    block_s: tuple[float, float] = BLOCK_S
    endpoints: dict[int, Endpoint] = field(default_factory=dict)
    ports: "count[int]" = field(default_factory=lambda: count(1))
    flaky: float = 0.0
    """Chance of an error with every piece."""
    hangs: bool = False
    """Nobody notices that a source has died, until this ends."""
    num_pieces: int = 0
    num_errors: int = 0
    num_dead_reads: int = 0

    def of(self, process: Process) -> list[Endpoint]:
        return [one for one in self.endpoints.values() if one.process is process]


@dataclass(slots=True, eq=False)
class _Operation:
    """A running pull or read of a word; also the pull's ticket."""

    spec: PullSpec
    on_end: OnEnd
    began_at: float
    todo: list[tuple[int, int]] = field(default_factory=list)
    num_bytes_done: int = 0
    aborted: bool = False

    def abort(self) -> None:
        self.aborted = True


class SimTransfer:
    """Implements `Transfer` for one worker."""

    def __init__(self, fabric: Fabric, process: Process) -> None:
        self._fabric = fabric
        self._process = process
        self._live = 0
        self._port = 0
        self._arena: Arena | None = None
        self._scratch: ScratchWords | None = None

    @property
    def name(self) -> str:
        return self._fabric.kind

    def start(self, arena: Arena, leases: LeaseTable, scratch: ScratchWords) -> None:
        self._arena, self._scratch = arena, scratch
        self._port = next(self._fabric.ports)
        self._fabric.endpoints[self._port] = Endpoint(self._process, arena, leases)

    def offer(self) -> Offer:
        return TcpOffer(self._process.name, self._port)

    def refuse(self, offer: Offer) -> str:
        return "" if isinstance(offer, TcpOffer) else "not an offer of ours"

    def num_live(self) -> int:
        return self._live

    def stop(self) -> bool:
        self._fabric.endpoints[self._port].closed = True
        return self._live == 0

    def pull(self, spec: PullSpec, on_end: OnEnd) -> _Operation:
        todo = list(zip(spec.remote, spec.local, strict=True))
        self._fabric.rng.shuffle(todo)
        operation = _Operation(spec, on_end, self._fabric.loop.time(), todo)
        self._live += 1
        self._soon(lambda: self._copy(operation))
        return operation

    def read_word(self, spec: PullSpec, scratch_slot: int, on_end: OnEnd) -> None:
        operation = _Operation(spec, on_end, self._fabric.loop.time())
        self._live += 1
        self._soon(lambda: self._read(operation, scratch_slot))

    # one piece after the other

    def _soon(self, step: Callable[[], None], after_s: float | None = None) -> None:
        fabric = self._fabric
        self._process.call(step, after_s=after_s or fabric.rng.uniform(*fabric.block_s))

    def _copy(self, operation: _Operation) -> None:
        fabric = self._fabric
        source = self._source(operation, lambda: self._copy(operation))
        if source is None:
            return
        assert self._arena is not None
        size = operation.spec.block_bytes
        for remote, local in operation.todo[:BLOCKS_AT_ONCE]:
            self._arena.block(local)[:] = source.arena.block(remote)
            operation.num_bytes_done += size
            fabric.num_pieces += 1
        del operation.todo[:BLOCKS_AT_ONCE]
        if operation.todo:
            self._soon(lambda: self._copy(operation))
        elif fabric.kind == "tcp":
            self._soon(lambda: self._vouch(operation))
        else:
            self._end(operation, True)

    def _vouch(self, operation: _Operation) -> None:
        """Two-sided: the source says with the end what its word is now."""
        source = self._source(operation, lambda: self._vouch(operation))
        if source is not None:
            self._end(operation, True, word=source.leases.read(operation.spec.slot))

    def _read(self, operation: _Operation, scratch_slot: int) -> None:
        source = self._source(operation, lambda: self._read(operation, scratch_slot))
        if source is None:
            return
        assert self._scratch is not None
        self._scratch.write(scratch_slot, source.leases.read(operation.spec.slot))
        self._end(operation, True, word=self._scratch.read(scratch_slot))

    def _source(self, operation: _Operation, again: Callable[[], None]) -> Endpoint | None:
        """Whose memory it is, if it can be read now; else the operation waits, or has ended."""
        fabric = self._fabric
        offer = operation.spec.offer
        assert isinstance(offer, TcpOffer)
        source = fabric.endpoints[offer.port]
        if operation.aborted and fabric.kind != "fabric":
            self._end(operation, False, "aborted: given up by the caller")
        elif source.closed or not source.process.alive:
            if fabric.hangs:
                self._soon(again, POLL_S)
                return None
            fabric.num_dead_reads += 1
            self._end(operation, False, "gone: the source has ended", peer_gone=True)
        elif fabric.flaky and fabric.rng.random() < fabric.flaky:
            fabric.num_errors += 1
            self._end(operation, False, "broken: an error of the wire")
        elif source.apart or self._is_apart() or (fabric.kind == "tcp" and source.process.frozen):
            self._soon(again, POLL_S)
        else:
            return source
        return None

    def _is_apart(self) -> bool:
        return self._fabric.endpoints[self._port].apart

    def _end(
        self,
        operation: _Operation,
        ok: bool,
        reason: str = "",
        *,
        word: int | None = None,
        peer_gone: bool = False,
    ) -> None:
        self._live -= 1
        seconds = self._fabric.loop.time() - operation.began_at
        done = operation.num_bytes_done
        operation.on_end(TransferEnd(ok, reason, word, done, seconds, peer_gone))
