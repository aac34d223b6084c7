"""A worker process as the world moves it: what it can be told, and what must hold in it.

`apply` runs one input to its end and returns the envelopes that leave. `check` looks at everything
that a state of one worker can break: the pool, leases and their words, pulls and what they may
write, and that every block that somebody may read holds what it stands for.
"""

from collections import deque
from typing import Any, Final

from protocol.bus import Message
from tests.model.check.scopes import LEASE_S, PAUSE_S, ROUTER_TIMEOUT_S, Scope
from tests.model.check.wire import Violation, Words
from tests.model.check.worker_side import (
    BEGINNING,
    FIRST_NONCE,
    Desk,
    Thread,
    stamps_of,
    subjects,
)
from worker.engine.batching import blocks_for
from worker.engine.messages import Cancel
from worker.engine.sequences import ActiveSequence, Stage
from worker.handoff.states import HOLDS, Held
from worker.kv.pool import BlockPool
from worker.outbox import Told
from worker.routers import MAX_TICK_S

ROUTER: Final = "router"
Input = tuple[Any, ...]
Sent = list[tuple[str, bytes]]

GARBAGE: Final = (b"garbage",) * 2


class UpBus:
    """A bus that is always there."""

    connected = True


class GuardedWords(Words):
    """A lease table that is looked at before each store, as a remote reader could."""

    def __init__(self, num_slots: int, pool: BlockPool) -> None:
        super().__init__(num_slots)
        self.pool = pool
        self.blocks: dict[int, tuple[int, ...]] = {}

    def zero(self, slot: int) -> None:
        if any(self.pool._blocks[block].leases == 0 for block in self.blocks.get(slot, ())):
            raise Violation(
                f"the word in slot {slot} vouches for blocks that are not lent any more"
            )
        self.blocks.pop(slot, None)
        super().zero(slot)


class WorkerProcess:
    """One incarnation of one worker."""

    def __init__(self, scope: Scope, index: int, life: int) -> None:
        self.name = scope.names[index]
        self.is_prefill = index < scope.prefill
        self.incarnation = f"{self.name}-{life}"
        self.now = BEGINNING
        self.two_sided = scope.two_sided
        self.service = Desk(self)
        self.thread = Thread(self, scope, FIRST_NONCE + (index * 10 + life) * 100_000)
        self.service._engine = self.thread
        self.service._bus = UpBus()  # type: ignore[assignment]
        pool = self.thread.core._pool
        self.thread.leases = words = GuardedWords(scope.num_leases, pool)
        self.thread.core._lender._source._words = words
        self.lent: dict[str, list[tuple[bytes, ...]]] = {}
        """What the blocks of each living lease held when it began."""

        self.orphaned_at: float | None = None
        """When the last word of a router that has died came."""

    def clock(self) -> float:
        return self.now

    # -- what it can do

    def apply(self, told: Input) -> Sent:
        getattr(self, f"on_{told[0]}")(*told[1:])
        accepts = self.service._accepts
        accepts.due = deque(key for key in accepts.due if _may_accept(self.service.outbox, key))  # type: ignore[attr-defined]
        return self.service.postbox.empty()

    def on_jobs(self, payload: bytes) -> None:
        if self.orphaned_at is not None:
            self.orphaned_at = self.now
        subject = subjects().jobs(self.name, self.incarnation)
        self.service._on_jobs(Message(subject, payload))

    def on_turn(self) -> None:
        late = any(not isinstance(message, Cancel) for message in self.thread._inbox)
        if self.orphaned_at is not None and late:  # it was heard only now
            self.orphaned_at = self.now
        self.thread.turn()

    def on_accept(self) -> None:
        self.service._accepts.fire()  # type: ignore[attr-defined]

    def on_lease(self, router_lives: bool) -> None:
        self._advance(self.thread.core._lender.next_deadline(), router_lives)
        self.thread.turn()

    def on_sink(self, router_lives: bool) -> None:
        self._advance(self.thread.core._puller._sink.next_deadline(), router_lives)
        self.thread.turn()

    def on_linger(self, router_lives: bool) -> None:
        first = next(iter(self.service.outbox._ended.values()), None)
        if first is not None:
            self._advance(first + self.service.outbox._linger_s, router_lives)

    def on_router_silent(self, router_lives: bool) -> None:
        for _ in range(2):  # silence is longer than the timeout, and looked for now and then
            self._advance(self.now + ROUTER_TIMEOUT_S, router_lives)

    def on_pass(self, seconds: float) -> None:
        """Everybody's clock moves on, and nothing has gone wrong."""
        self._advance(self.now + seconds, router_lives=True)
        self.on_accept()
        self.thread.turn()
        if self.thread.core._lender.ended["expired"]:
            raise Violation("a lease expired, though its router lives and nothing is late")

    def on_orphaned(self) -> None:
        """The router has died; what it said may still arrive."""
        self.orphaned_at = self.now

    def on_resume(self) -> None:
        self.now += PAUSE_S
        if self.orphaned_at is not None:  # who stands still works for nobody
            self.orphaned_at += PAUSE_S

    def on_land(self, number: int, content: tuple[bytes, ...]) -> None:
        self.thread.reads.land(number, content)

    def on_word(self, number: int, word: int) -> None:
        self.thread.reads.land_word(number, word, two_sided=self.two_sided)

    def on_early(self, number: int, word: int) -> None:
        """Only where a mistake is planted: the source looked at the word too soon."""
        read = self.thread.reads.live[number]
        read.early = word if read.early is None else read.early

    def on_fail(self, number: int, reason: str, gone: bool) -> None:
        self.thread.reads.fail(number, reason, peer_gone=gone)

    def on_tell(self, number: int) -> None:
        reads = self.thread.reads
        if reads.live[number].end is None:
            reads.finish(number)
        reads.tell(number)
        self.thread.turn()

    def on_stranger(self) -> None:
        """Another router's work takes every block it can get, writes it and is over."""
        pool = self.thread.core._pool
        blocks = pool.allocate(pool.num_available) or []
        for block in blocks:
            self.thread.memory.content[block] = GARBAGE
        pool.release(blocks)

    def _advance(self, due: float | None, router_lives: bool) -> None:
        """Time passes, and what is done every now and then is done; a living router beats."""
        while due is not None and self.now < due:
            self.now = min(due, self.now + MAX_TICK_S)
            if router_lives and ROUTER in self.service._routers:
                self.service._hear(ROUTER)
            self.service.sweep()
        expiry = self.thread.core._lender.next_deadline()
        if expiry is not None and expiry <= self.now:  # the engine wakes by itself
            self.thread.turn()

    # -- what can happen to it

    def deadlines(self) -> tuple[str, ...]:
        """Which deadlines are armed here."""
        core, outbox = self.thread.core, self.service.outbox
        armed = (
            ("lease", core._lender.next_deadline() is not None),
            ("sink", core._puller._sink.next_deadline() is not None),
            ("linger", bool(outbox._ended)),
            ("accept", bool(self.service._accepts.due)),  # type: ignore[attr-defined]
        )
        return tuple(name for name, is_armed in armed if is_armed)

    def sink_due_s(self) -> float:
        due = self.thread.core._puller._sink.next_deadline()
        return float("inf") if due is None else due - self.now

    def wants_turn(self) -> bool:
        thread, core = self.thread, self.thread.core
        roster = core._roster
        if thread._inbox or roster.running or roster.waiting:
            return True
        due = core._lender.next_deadline()
        return due is not None and due <= self.now

    def is_empty(self) -> bool:
        """Nothing runs, is lent, fenced or under way; nobody is owed a word."""
        core = self.thread.core
        counts = core._pool.counts()
        return not (
            self.thread._inbox or core._known or core._lender.num_lent or self.thread.reads.live
            or counts.used or counts.lent or counts.quarantined or core._puller._sink._records
            or self.service.outbox.num_open
        )  # fmt: skip

    def works_for(self) -> bool:
        """Whether anything is held for a router."""
        core = self.thread.core
        return bool(core._known or core._lender.num_lent or self.service.outbox.num_open)

    def seq(self) -> int:
        """The number of the last envelope to the router."""
        routers = self.service._routers
        return routers._seqs.get(ROUTER, routers._past.get(ROUTER, 0))

    # -- what must hold

    def check(self) -> None:
        core = self.thread.core
        if self.service.broken:
            raise Violation(self.service.broken)
        core._pool.validate()
        core._lender.validate()
        core._lender._source.validate()
        core._puller.validate()
        if core._puller._sink.num_quarantined != core._pool.counts().quarantined:
            raise Violation("sink and pool do not agree on what is quarantined")
        orphaned_at = self.orphaned_at
        long_dead = orphaned_at is not None and self.now - orphaned_at > LEASE_S
        if long_dead and self.works_for() and not self.thread._inbox:
            raise Violation(f"{self.name} works for a router that is long dead")
        self._check_reads()
        self._check_leases()
        self._check_content()

    def _check_leases(self) -> None:
        """A word for each lease, and under it what was lent."""
        words, content = self.thread.leases, self.thread.memory.content
        assert isinstance(words, GuardedWords)
        leases = self.thread.core._lender._source._lent
        expected = [0] * words.num_slots
        for lease in leases.values():
            expected[lease.slot] = lease.nonce
            found = [content[block] for block in lease.blocks]
            words.blocks.setdefault(lease.slot, lease.blocks)
            if self.lent.setdefault(lease.handle_id, found) != found:
                raise Violation(f"a block was written while it was lent: {lease.blocks}")
        if words.words != expected:
            raise Violation(f"words {words.words}, leases {expected}")
        for handle_id in self.lent.keys() - leases.keys():
            del self.lent[handle_id]

    def _check_reads(self) -> None:
        """Whatever may still land lands in blocks and slots that are kept for it."""
        core = self.thread.core
        records = core._puller._sink._records
        for read in self.thread.reads.live:
            record = records.get(read.pull_id)
            if record is None:
                raise Violation("the sink forgot a pull that is under way")
            if read.is_word:
                if Held.SLOT not in HOLDS[record.state] or record.slot != read.scratch_slot:
                    raise Violation(f"scratch slot {read.scratch_slot} is free and may be written")
                continue
            for block in read.local[read.num_done :] if read.end is None else ():
                if block not in record.pull.local_blocks:
                    raise Violation(f"block {block} may be written and is not the pull's")
                known = core._pool._blocks[block]
                if not (known.in_transfer or known.is_writable()):
                    raise Violation(f"block {block} may be written and is held by others: {known}")

    def _check_content(self) -> None:
        """Each cached block holds what its hash says, each sequence what its tokens say."""
        core, content = self.thread.core, self.thread.memory.content
        size = core._limits.block_size
        for sequence in core._known.values():
            if sequence.stage is Stage.RUNNING:
                self._check_sequence(sequence, size)
        for digest, block in core._pool._cached.items():
            if _digest_of(content[block], size) != digest:
                raise Violation(f"block {block} is cached and does not hold what its hash says")

    def _check_sequence(self, sequence: ActiveSequence, size: int) -> None:
        runner = self.thread._runner
        expected = stamps_of(sequence.ids[: sequence.num_computed])
        blocks = sequence.blocks[: blocks_for(sequence.num_computed, size)]
        for position, right in enumerate(expected):
            if runner.at(blocks, position) != right:  # type: ignore[attr-defined]
                raise Violation(
                    f"{self.name} goes on with KV that is not its prompt's: position {position}, "
                    f"block {blocks[position // size]}"
                )


def _may_accept(outbox: Any, key: Any) -> bool:
    record = outbox._records.get(key)
    return record is not None and record.state is Told.TAKEN


_digests: dict[bytes, bytes] = {}


def _digest_of(content: tuple[bytes, ...], size: int) -> bytes:
    """The pool's hash of a full block of stamps, by its last one."""
    return _digests.get(content[-1], b"?") if len(content) == size else b"short"


def learn(ids: list[int], size: int) -> None:
    """Which stamp ends the blocks of which hash: for all prefixes of `ids`."""
    from protocol.blocks import block_hashes, pack_ids
    from tests.model.check.worker_side import SEED

    stamps = stamps_of(ids)
    for number, digest in enumerate(block_hashes(pack_ids(ids), size, SEED)):
        _digests[stamps[(number + 1) * size - 1]] = digest
