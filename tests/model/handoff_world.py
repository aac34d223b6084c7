"""A source and two sinks over a simulated one-sided memory, moved one smallest step at a time.

Blocks are read one by one; between two reads anything may happen at the source: release, expiry,
revocation, reuse of the blocks for something else, or nothing because it is frozen. Ends of
operations reach a sink late, twice, or after it has given up. What must never happen raises
`Violation`: a pull that ends Ready with other bytes than were lent, or blocks that are given back
while a transfer may still write them.

`checks` says how the lease's word is looked at: properly, before the data, or not at all.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from typing import Literal

import msgspec

from protocol.blocks import pack_ids, unpack_ids
from protocol.handoff import KvHandle, RankKv, TcpOffer
from worker.handoff.ends import TransferEnd
from worker.handoff.sink import (
    Command,
    FreeBlocks,
    PostData,
    PostWord,
    Pull,
    PullFailed,
    Quarantine,
    Ready,
    Sink,
)
from worker.handoff.source import Source
from worker.kv.pool import BlockPool, PoolCounts

Checks = Literal["proper", "word first", "none"]

NUM_BLOCKS = 8
NUM_LEASES = 3
NUM_SCRATCH = 2
LEASE_S = 30.0
TIMEOUT_S = 20.0
HASH = b"prompt".ljust(16)


class Violation(AssertionError):
    """The hand-off has corrupted or leaked something."""


class Words:
    """The lease table's memory."""

    def __init__(self) -> None:
        self.memory = [0] * NUM_LEASES

    def write(self, slot: int, word: int) -> None:
        self.memory[slot] = word

    def zero(self, slot: int) -> None:
        self.memory[slot] = 0


class Prefill:
    """The source's process. Sequences write stamps, never the same twice; leases lend them."""

    def __init__(self) -> None:
        self.pool = BlockPool(NUM_BLOCKS, 1)
        self.words = Words()
        self.source = Source(self.pool, self.words, num_slots=NUM_LEASES, lease_s=LEASE_S)
        self.memory = [0] * NUM_BLOCKS
        self.sequences: list[list[int]] = []
        self.handles: list[tuple[KvHandle, list[int]]] = []
        """All handles ever given out, with the stamps that were lent."""
        self.frozen = False
        self._serial = count(1)

    def prefill(self, num_blocks: int, store: bool) -> None:
        """Take blocks, evicting what is cached, and write them."""
        blocks = self.pool.allocate(num_blocks)
        for block in blocks or ():
            stamp = next(self._serial)
            if not self.pool.is_writable(block):
                raise Violation(f"block {block} of a new sequence is not writable")
            self.memory[block] = stamp
            if store:
                self.pool.store(block, b"%016d" % stamp)
        if blocks:
            self.sequences.append(blocks)

    def lend(self, index: int, now: float) -> None:
        if not self.sequences:
            return
        blocks = self.sequences[index % len(self.sequences)]
        nonce = next(self._serial) << 20 | 1
        lease = self.source.lend(f"h{nonce}", blocks, nonce, now)
        if lease is None:
            return
        rank = RankKv(pack_ids(blocks), lease.slot, nonce, [TcpOffer("", 0)])
        handle = KvHandle(lease.handle_id, "p", "1", len(blocks), 1, HASH, LEASE_S, [rank])
        self.handles.append((handle, [self.memory[block] for block in blocks]))

    def finish(self, index: int) -> None:
        if self.sequences:
            self.pool.release(self.sequences.pop(index % len(self.sequences)))

    def recent(self, index: int) -> list[str]:
        """The id of one of the last handles, if any."""
        recent = self.handles[-NUM_LEASES:]
        return [recent[index % len(recent)][0].handle_id] if recent else []

    def validate(self) -> None:
        self.pool.validate()
        self.source.validate()
        if sum(word != 0 for word in self.words.memory) != self.source.num_lent:
            raise Violation("there is a word without a lease, or a lease without a word")


@dataclass(eq=False)
class Operation:
    """One operation of the transport: `steps` are its reads, of one block or of the word each."""

    pull_id: int
    slot: int | None
    """The scratch slot, if this reads the word."""
    steps: list[Callable[[], None]]
    word: int | None = None


@dataclass(eq=False)
class Started:
    """A pull as the sink's process knows it."""

    pull: Pull
    stamps: list[int]
    two_sided: bool
    early_word: int = 0
    """What the word was before the data was read."""
    is_quarantined: bool = False
    is_over: bool = False
    """Nobody waits for it any more: it was told, or abandoned."""
    ends: list[tuple[bool, TransferEnd]] = field(default_factory=list)
    """What was delivered, to be delivered again."""


class Decode:
    """One sink's process, with a pool and a memory of its own."""

    def __init__(self, peer: Prefill, checks: Checks) -> None:
        self.pool = BlockPool(NUM_BLOCKS, 1)
        self.sink = Sink(
            num_scratch=NUM_SCRATCH,
            max_tokens_in_flight=5,
            timeout_s=TIMEOUT_S,
            max_quarantined_blocks=NUM_BLOCKS,
            block_size=1,
        )
        self.memory = [0] * NUM_BLOCKS
        self.owner: list[int | None] = [None] * NUM_BLOCKS
        """The pull that may write the block, or that has filled it."""
        self.pulls: dict[int, Started] = {}
        self.operations: list[Operation] = []
        self.inbox: list[tuple[int, bool, TransferEnd]] = []
        self.ready: list[int] = []
        self._peer = peer
        self._checks = checks
        self._ids = count(1)

    def begin(self, index: int, two_sided: bool, mismatch: bool, now: float) -> None:
        """Pull one of the last handles, which may have ended long ago."""
        if not self._peer.handles:
            return
        recent = self._peer.handles[-NUM_LEASES:]
        handle, stamps = recent[index % len(recent)]
        blocks = self.pool.allocate(len(stamps))
        if blocks is None:
            return
        pull_id = next(self._ids)
        remote = tuple(unpack_ids(handle.ranks[0].blocks))
        expected = b"another".ljust(16) if mismatch else HASH
        pull = Pull(handle, expected, tuple(blocks), remote, len(remote))
        self.own(blocks, pull_id)
        self.pulls[pull_id] = Started(pull, stamps, two_sided)
        self.run(self.sink.begin(pull_id, pull, now))

    def step(self, index: int) -> None:
        """One read of one operation, or its end once all is read."""
        if not self.operations:
            return
        operation = self.operations[index % len(self.operations)]
        if self._peer.frozen and self.pulls[operation.pull_id].two_sided:
            return
        if operation.steps:
            operation.steps.pop(0)()
        else:
            self.end(operation, ok=True)

    def fail(self, index: int) -> None:
        if self.operations:
            self.end(self.operations[index % len(self.operations)], ok=False)

    def deliver(self, index: int, now: float) -> None:
        if not self.inbox:
            return
        pull_id, is_word, end = self.inbox.pop(index % len(self.inbox))
        self.pulls[pull_id].ends.append((is_word, end))
        if self._checks == "none" and not is_word:
            end = msgspec.structs.replace(end, word=self.pulls[pull_id].pull.handle.ranks[0].nonce)
        handle = self.sink.word_ended if is_word else self.sink.data_ended
        self.run(handle(pull_id, end, now))

    def deliver_again(self, index: int, now: float) -> None:
        """A transport that repeats itself, however late, moves nothing."""
        recent = sorted(self.pulls)[-4:]
        ended = [(pull_id, *end) for pull_id in recent for end in self.pulls[pull_id].ends]
        if ended:
            pull_id, is_word, end = ended[index % len(ended)]
            handle = self.sink.word_ended if is_word else self.sink.data_ended
            if handle(pull_id, end, now):
                raise Violation(f"a repeated end moved pull {pull_id}")

    def abandon(self, index: int, now: float) -> None:
        """The client went; perhaps the pull is over already."""
        recent = sorted(self.pulls)[-4:]
        if recent:
            pull_id = recent[index % len(recent)]
            if pull_id not in self.ready:
                self.pulls[pull_id].is_over = True
            self.run(self.sink.abandon(pull_id, now))

    def progress(self, index: int, num_bytes: int, now: float) -> None:
        if self.operations:
            pull_id = self.operations[index % len(self.operations)].pull_id
            self.sink.progressed(pull_id, num_bytes, now)

    def tick(self, now: float) -> None:
        self.run(self.sink.tick(now))

    def finish(self) -> None:
        """A sequence that got its KV is over."""
        if self.ready:
            pull = self.pulls[self.ready.pop(0)].pull
            self.own(pull.local_blocks, None)
            self.pool.release(pull.local_blocks)

    def run(self, commands: Sequence[Command]) -> None:
        for command in commands:
            match command:
                case PostData(pull_id=pull_id, pull=pull):
                    self.operations.append(self.data_operation(pull_id, pull))
                case PostWord(pull_id=pull_id, scratch_slot=slot):
                    self.operations.append(self.word_operation(pull_id, slot))
                case Ready(pull_id=pull_id):
                    self.tell(pull_id)
                    self.ready.append(pull_id)
                    self.compare(pull_id)
                case PullFailed(pull_id=pull_id):
                    self.tell(pull_id)
                case Quarantine(pull_id=pull_id, blocks=blocks):
                    self.pulls[pull_id].is_quarantined = True
                    self.pool.quarantine(blocks)
                case FreeBlocks(pull_id=pull_id, blocks=blocks):
                    self.free(pull_id, blocks)

    def data_operation(self, pull_id: int, pull: Pull) -> Operation:
        started, slot = self.pulls[pull_id], pull.handle.ranks[0].slot
        started.early_word = self._peer.words.memory[slot]
        operation = Operation(pull_id, None, [])
        for remote, local in zip(pull.remote_blocks, pull.local_blocks, strict=True):
            operation.steps.append(partial(self.read_block, pull_id, remote, local))
        if started.two_sided:
            operation.steps.append(partial(self.read_word, operation))
        return operation

    def word_operation(self, pull_id: int, slot: int) -> Operation:
        for other in self.operations:
            if other.pull_id == pull_id:
                raise Violation(f"pull {pull_id}: the word is read while the data is live")
            if other.slot == slot:
                raise Violation(f"scratch slot {slot} belongs to two reads")
        operation = Operation(pull_id, slot, [])
        operation.steps.append(partial(self.read_word, operation))
        return operation

    def read_block(self, pull_id: int, remote: int, local: int) -> None:
        if self.owner[local] != pull_id:
            raise Violation(f"pull {pull_id} writes block {local} of {self.owner[local]}")
        self.memory[local] = self._peer.memory[remote]

    def read_word(self, operation: Operation) -> None:
        started = self.pulls[operation.pull_id]
        slot = started.pull.handle.ranks[0].slot
        early = self._checks == "word first"
        operation.word = started.early_word if early else self._peer.words.memory[slot]

    def end(self, operation: Operation, *, ok: bool) -> None:
        self.operations.remove(operation)
        end = TransferEnd(ok=ok, word=operation.word, reason="" if ok else "broken")
        self.inbox.append((operation.pull_id, operation.slot is not None, end))

    def tell(self, pull_id: int) -> None:
        if self.pulls[pull_id].is_over:
            raise Violation(f"pull {pull_id} ends twice")
        self.pulls[pull_id].is_over = True

    def free(self, pull_id: int, blocks: Sequence[int]) -> None:
        if any(operation.pull_id == pull_id for operation in self.operations):
            raise Violation(f"pull {pull_id} gives blocks back while an operation is live")
        self.own(blocks, None)
        drop = self.pool.unquarantine if self.pulls[pull_id].is_quarantined else self.pool.release
        drop(blocks)

    def own(self, blocks: Sequence[int], pull_id: int | None) -> None:
        for block in blocks:
            self.owner[block] = pull_id

    def compare(self, pull_id: int) -> None:
        started = self.pulls[pull_id]
        found = [self.memory[block] for block in started.pull.local_blocks]
        if found != started.stamps:
            raise Violation(f"pull {pull_id} is ready with {found}, lent were {started.stamps}")

    def validate(self) -> None:
        self.pool.validate()
        self.sink.validate()
        if self.sink.num_quarantined != self.pool.counts().quarantined:
            raise Violation("sink and pool do not agree on what is quarantined")
        for pull_id in self.ready:
            self.compare(pull_id)


class World:
    """One source, two sinks, one clock."""

    def __init__(self, checks: Checks = "proper") -> None:
        self.now = 0.0
        self.prefill = Prefill()
        self.sinks = [Decode(self.prefill, checks) for _ in range(2)]

    def validate(self) -> None:
        self.prefill.validate()
        for sink in self.sinks:
            sink.validate()

    def settle(self) -> None:
        """Let everything come to its end: nothing may be left behind."""
        self.prefill.frozen = False
        for sink in self.sinks:
            while sink.operations or sink.inbox:
                sink.step(0)
                sink.deliver(0, self.now)
            while sink.ready:
                sink.finish()
            if sink.sink.num_waiting or sink.sink.num_live or sink.sink.num_quarantined:
                raise Violation("a pull or its quarantine has no end")
            require_empty(sink.pool.counts())
        while self.prefill.sequences:
            self.prefill.finish(0)
        self.prefill.source.expire(self.now + LEASE_S)
        require_empty(self.prefill.pool.counts())
        self.validate()


def require_empty(counts: PoolCounts) -> None:
    if counts.used or counts.lent or counts.quarantined:
        raise Violation(f"blocks are left behind: {counts}")
