"""A source and two sinks over a simulated one-sided memory, moved one smallest step at a time.

Blocks are read one by one; between two reads anything may happen at the source: release, expiry,
revocation, reuse of the blocks for something else, or nothing because it is frozen. Ends of
operations reach a sink late, twice, or after it has given up. What must never happen raises
`Violation`: a pull that ends Ready with other bytes than were lent, or bytes that land in blocks
which belong to somebody else by then.

`checks` says how the lease's word is looked at: properly, before the data, or not at all.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import count
from typing import Literal

from protocol.blocks import pack_ids
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
from worker.kv.pool import BlockPool

Checks = Literal["proper", "word first", "none"]

NUM_BLOCKS = 8
LEASE_S = 30.0
TIMEOUT_S = 20.0
HASH = b"prompt".ljust(16)
EMPTY: "PullSpec"


class Violation(AssertionError):
    """The hand-off has leaked or corrupted."""


class Words:
    """The lease table's memory."""

    def __init__(self, num_slots: int) -> None:
        self.memory = [0] * num_slots

    def write(self, slot: int, word: int) -> None:
        self.memory[slot] = word

    def zero(self, slot: int) -> None:
        self.memory[slot] = 0


class Prefill:
    """The source's process: sequences write stamps, each new, into blocks; leases lend them."""

    def __init__(self, num_slots: int) -> None:
        self.pool = BlockPool(NUM_BLOCKS, 1)
        self.words = Words(num_slots)
        self.source = Source(self.pool, self.words, num_slots=num_slots, lease_s=LEASE_S)
        self.memory = [0] * NUM_BLOCKS
        self.sequences: list[list[int]] = []
        self.handles: list[tuple[KvHandle, list[int]]] = []
        """All handles ever given out, with the stamps that were lent."""
        self.frozen = False
        self._serial = count(1)

    def prefill(self, num_blocks: int, *, store: bool) -> None:
        """Take blocks, evicting what is cached, and write them."""
        blocks = self.pool.allocate(num_blocks)
        if blocks is None:
            return
        for block in blocks:
            stamp = next(self._serial)
            if not self.pool.is_writable(block):
                raise Violation(f"block {block} of a new sequence is not writable")
            self.memory[block] = stamp
            if store:
                self.pool.store(block, b"%016d" % stamp)
        self.sequences.append(blocks)

    def lend(self, index: int, now: float) -> None:
        blocks = self.sequences[index % len(self.sequences)]
        nonce = next(self._serial) << 20 | 1
        lease = self.source.lend(f"h{nonce}", blocks, nonce, now)
        if lease is None:
            return
        rank = RankKv(pack_ids(blocks), lease.slot, nonce, [TcpOffer("", 0)])
        handle = KvHandle(lease.handle_id, "p", "1", len(blocks), 1, HASH, LEASE_S, [rank])
        self.handles.append((handle, [self.memory[block] for block in blocks]))

    def finish(self, index: int) -> None:
        self.pool.release(self.sequences.pop(index % len(self.sequences)))


@dataclass
class Operation:
    """One operation of the transport: `steps` are its reads, one block or one word each."""

    pull_id: int
    is_word: bool
    steps: list[Callable[[], None]]
    two_sided: bool = False
    word: int | None = None
    finished: bool = False


@dataclass
class Started:
    """A pull as the sink's process knows it."""

    pull: Pull
    stamps: list[int]
    two_sided: bool
    is_quarantined: bool = False
    told: bool = False
    ends: list[tuple[bool, TransferEnd]] = field(default_factory=list)
    """All ends so far, to be delivered again."""


class Decode:
    """One sink's process, with its own pool and memory."""

    def __init__(self, peer: Prefill, checks: Checks) -> None:
        self.pool = BlockPool(NUM_BLOCKS, 1)
        self.sink = Sink(
            num_scratch=2,
            max_tokens_in_flight=5,
            timeout_s=TIMEOUT_S,
            max_quarantined_blocks=NUM_BLOCKS,
            block_size=1,
        )
        self.memory = [0] * NUM_BLOCKS
        self.owner: list[int | None] = [None] * NUM_BLOCKS
        """The pull that may write the block, or use it once it is ready."""
        self.pulls: dict[int, Started] = {}
        self.operations: list[Operation] = []
        self.inbox: list[tuple[int, bool, TransferEnd]] = []
        self.ready: list[int] = []
        self._peer = peer
        self._checks = checks
        self._ids = count(1)

    def begin(self, index: int, now: float, *, two_sided: bool, mismatch: bool) -> None:
        handle, stamps = self._peer.handles[index % len(self._peer.handles)]
        blocks = self.pool.allocate(len(stamps))
        if blocks is None:
            return
        pull_id = next(self._ids)
        remote = tuple(memoryview(handle.ranks[0].blocks).cast("I"))
        expected = b"another" if mismatch else HASH
        pull = Pull(handle, expected, tuple(blocks), remote, len(remote))
        for block in blocks:
            self.owner[block] = pull_id
        self.pulls[pull_id] = Started(pull, stamps, two_sided)
        self.run(self.sink.begin(pull_id, pull, now))

    def run(self, commands: Sequence[Command]) -> None:
        for command in commands:
            match command:
                case PostData(pull_id, pull):
                    self.operations.append(self._data(pull_id, pull))
                case PostWord(pull_id, slot):
                    self.operations.append(self._word(pull_id, slot))
                case Ready(pull_id):
                    self._use(pull_id)
                case PullFailed(pull_id):
                    self._told(pull_id)
                case Quarantine(pull_id, blocks):
                    self.pulls[pull_id].is_quarantined = True
                    self.pool.quarantine(blocks)
                case FreeBlocks(pull_id, blocks):
                    self._free(pull_id, blocks)

    def step(self, index: int) -> None:
        """One read of one operation, or its end once all is read."""
        operation = self.operations[index % len(self.operations)]
        if operation.steps:
            operation.steps.pop(0)()
        else:
            self.end(operation, ok=True)

    def fail(self, index: int) -> None:
        self.end(self.operations[index % len(self.operations)], ok=False)

    def end(self, operation: Operation, *, ok: bool) -> None:
        self.operations.remove(operation)
        known = operation.is_word or operation.two_sided
        end = TransferEnd(ok=ok, word=operation.word if ok and known else None)
        self.inbox.append((operation.pull_id, operation.is_word, end))

    def deliver(self, index: int, now: float) -> None:
        pull_id, is_word, end = self.inbox.pop(index % len(self.inbox))
        self.pulls[pull_id].ends.append((is_word, end))
        if not is_word and self._checks == "none":
            nonce = self.pulls[pull_id].pull.handle.ranks[0].nonce
            end = replace(end, word=nonce)
        handle = self.sink.word_ended if is_word else self.sink.data_ended
        self.run(handle(pull_id, end, now))

    def deliver_again(self, index: int, now: float) -> None:
        """The transport repeats itself: a sink that knows better does nothing."""
        ended = [(pull_id, end) for pull_id, pull in self.pulls.items() for end in pull.ends]
        if not ended:
            return
        pull_id, (is_word, end) = ended[index % len(ended)]
        handle = self.sink.word_ended if is_word else self.sink.data_ended
        if handle(pull_id, end, now):
            raise Violation(f"a repeated end moved pull {pull_id}")

    def abandon(self, index: int, now: float) -> None:
        """The client went, perhaps after the pull is over."""
        pull_id = index % len(self.pulls) + 1
        self.run(self.sink.abandon(pull_id, now))

    def progress(self, index: int, num_bytes: int, now: float) -> None:
        self.sink.progressed(index % len(self.pulls) + 1, num_bytes, now)

    def finish(self) -> None:
        """A sequence that got its KV is over."""
        pull_id = self.ready.pop(0)
        self.compare(pull_id)
        self._let_go(self.pulls[pull_id].pull.local_blocks)
        self.pool.release(self.pulls[pull_id].pull.local_blocks)

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

    def _data(self, pull_id: int, pull: Pull) -> Operation:
        started = self.pulls[pull_id]
        operation = Operation(pull_id, False, [], started.two_sided)

        def read(remote: int, local: int) -> None:
            if self.owner[local] != pull_id:
                raise Violation(f"pull {pull_id} writes block {local} of {self.owner[local]}")
            self.memory[local] = self._peer.memory[remote]

        def read_word() -> None:
            operation.word = self._peer.words.memory[pull.handle.ranks[0].slot]

        pairs = zip(pull.remote_blocks, pull.local_blocks, strict=True)
        operation.steps = [lambda pair=pair: read(*pair) for pair in pairs]  # type: ignore[misc]
        if started.two_sided:
            place = 0 if self._checks == "word first" else len(operation.steps)
            operation.steps.insert(place, read_word)
        return operation

    def _word(self, pull_id: int, slot: int) -> Operation:
        if any(o.pull_id == pull_id for o in self.operations):
            raise Violation(f"pull {pull_id}: the word is read while the data is live")
        if any(o.is_word and o.slot == slot for o in self.operations):
            raise Violation(f"scratch slot {slot} belongs to two reads")
        operation = Operation(pull_id, True, [])
        return operation
