"""The borrowing side of the hand-off: pulls of KV blocks into blocks of our own.

A pull copies the source's blocks into ours, and **then** reads the lease's word: the nonce in it
proves that the source held the blocks until after the last byte was read (see `source`). The word
is read by a second operation, posted after the first is terminal, into a scratch slot that belongs
to this check alone; a two-sided transport lets the source look after its last byte was copied out
and brings the word with the data's end. Any other word: the data is worthless, `lease_lost`.

**No operation can be cancelled.** Who gives up while one is live moves on at once, but the blocks
it may still write, and the scratch slot, stay fenced until it says that it is over.

Both the moves and what a pull holds in each state (a place in the queue, a scratch slot, ...) are
tables (`states`); this file does what they say.

A deadline bounds silence, not work: it restarts with every operation and whenever bytes come. Those
that wait have none of their own, since those they wait for do; only where all scratch slots are
fenced, so that nothing runs, the first in the queue times out. Fenced transfers do not count as
tokens in flight: one frozen peer must not block the others.

Time is an argument and never runs backwards here. Everything costs O(1) for each pull.
"""

from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from protocol.errors import LocalError
from worker.handoff.ends import TransferEnd
from worker.handoff.pulls import Command as Command
from worker.handoff.pulls import FreeBlocks as FreeBlocks
from worker.handoff.pulls import PostData as PostData
from worker.handoff.pulls import PostWord as PostWord
from worker.handoff.pulls import Pull as Pull
from worker.handoff.pulls import PullFailed as PullFailed
from worker.handoff.pulls import Quarantine as Quarantine
from worker.handoff.pulls import Ready as Ready
from worker.handoff.pulls import mismatch
from worker.handoff.states import (
    CHANGES,
    COUNTED_AS,
    FAILURES,
    FENCED,
    HOLDS,
    NEXT,
    Held,
    PullEvent,
    PullState,
)


@dataclass(slots=True)
class _Record:
    """One pull that is not forgotten."""

    pull_id: int
    pull: Pull
    began_at: float
    state: PullState = PullState.WAITING
    slot: int = -1
    """The scratch slot, where the state holds one."""
    num_bytes: int = 0
    """Progress so far."""
    deadline: float = 0.0
    """Where the state holds one."""


_ON_ENTRY: Final[dict[PullState, Callable[[_Record], Command]]] = {
    PullState.PULLING: lambda record: PostData(record.pull_id, record.pull),
    PullState.CHECKING: lambda record: PostWord(record.pull_id, record.slot),
    PullState.FENCED_DATA: lambda record: Quarantine(record.pull_id, record.pull.local_blocks),
    PullState.FENCED_WORD: lambda record: Quarantine(record.pull_id, record.pull.local_blocks),
    PullState.READY: lambda record: Ready(record.pull_id),
    PullState.FAILED: lambda record: FreeBlocks(record.pull_id, record.pull.local_blocks),
    PullState.FREED: lambda record: FreeBlocks(record.pull_id, record.pull.local_blocks),
}


class Sink:
    """All pulls of one worker. A pull id is used once."""

    def __init__(
        self,
        *,
        num_scratch: int,
        max_tokens_in_flight: int | None,
        timeout_s: float,
        max_quarantined_blocks: int,
        block_size: int | None = None,
    ) -> None:
        if num_scratch < 1 or timeout_s <= 0:
            raise LocalError(f"{num_scratch} scratch slots, a deadline of {timeout_s} s")
        self.ended: dict[str, int] = dict.fromkeys(
            ("ready", "abandoned", "handle_mismatch", "lease_lost", "transfer_failed"), 0
        )
        """Number of pulls by end; one that is given up counts then."""
        self.num_quarantined = 0
        """Blocks that a transfer may still write for pulls that were given up."""
        self._num_scratch = num_scratch
        self._max_tokens = max_tokens_in_flight
        self._timeout_s = timeout_s
        self._max_quarantined = max_quarantined_blocks
        self._block_size = block_size
        self._records: dict[int, _Record] = {}
        self._waiting: OrderedDict[int, _Record] = OrderedDict()
        self._running: OrderedDict[int, _Record] = OrderedDict()
        """Those with a deadline, the next one first."""
        self._free_slots = deque(range(num_scratch))
        self._tokens_in_flight = 0
        self._idle_since = self._now = float("-inf")

    @property
    def over_bound(self) -> bool:
        """Too much is quarantined for this process to go on."""
        return self.num_quarantined > self._max_quarantined

    @property
    def num_live(self) -> int:
        """Operations that were posted and have not ended, fenced ones included."""
        return len(self._records) - len(self._waiting)

    @property
    def num_waiting(self) -> int:
        """Pulls for which nothing was posted yet."""
        return len(self._waiting)

    def begin(self, pull_id: int, pull: Pull, now: float) -> list[Command]:
        """Queue a pull, or refuse its handle. Raises LocalError if the id is in use."""
        if pull_id in self._records:
            raise LocalError(f"pull {pull_id} began already")
        now = self._advance(now)
        reason = mismatch(pull, self._block_size)
        if reason:
            self.ended["handle_mismatch"] += 1
            return [
                PullFailed(pull_id, "handle_mismatch", reason),
                FreeBlocks(pull_id, pull.local_blocks),
            ]
        record = _Record(pull_id, pull, began_at=now)
        self._records[pull_id] = record
        self._take(record, Held.QUEUE, now)
        return self._start_waiting(now)

    def data_ended(self, pull_id: int, end: TransferEnd, now: float) -> list[Command]:
        """The copy is terminal. With the word it is judged at once, else the word is read."""
        if end.ok and end.word is None:
            return self._on(pull_id, PullEvent.DATA_CAME, "", now)
        events = (PullEvent.DATA_RIGHT, PullEvent.DATA_WRONG, PullEvent.DATA_FAILED)
        return self._judge(pull_id, end, events, now)

    def word_ended(self, pull_id: int, end: TransferEnd, now: float) -> list[Command]:
        """The read of the word is terminal."""
        events = (PullEvent.WORD_RIGHT, PullEvent.WORD_WRONG, PullEvent.WORD_FAILED)
        return self._judge(pull_id, end, events, now)

    def progressed(self, pull_id: int, num_bytes: int, now: float) -> None:
        """`num_bytes` of the data have come so far; more than before restart the deadline."""
        now = self._advance(now)
        record = self._records.get(pull_id)
        if record is None or record.state is not PullState.PULLING or num_bytes <= record.num_bytes:
            return
        record.num_bytes = num_bytes
        self._restart_deadline(record, now)

    def abandon(self, pull_id: int, now: float) -> list[Command]:
        """Nobody wants it any more (cancel, abort). Repeats and late ones change nothing."""
        return self._on(pull_id, PullEvent.ABANDON, "", now)

    def tick(self, now: float) -> list[Command]:
        """Give up what has been silent for too long."""
        now = self._advance(now)
        commands: list[Command] = []
        while (due := self.next_deadline()) is not None and due <= now:
            record = next(iter((self._running or self._waiting).values()))
            reason = f"no progress for {self._timeout_s} s while {record.state.value}"
            commands += self._on(record.pull_id, PullEvent.TIME_OUT, reason, now)
        return commands

    def next_deadline(self) -> float | None:
        """When `tick` will next have something to do."""
        for record in self._running.values():
            return record.deadline
        for record in self._waiting.values():
            return max(record.began_at, self._idle_since) + self._timeout_s
        return None

    def validate(self) -> None:
        """Raises LocalError where what is kept differs from what the states say."""
        held = {
            kind: [r for r in self._records.values() if kind in HOLDS[r.state]] for kind in Held
        }
        if list(self._waiting.values()) != held[Held.QUEUE]:
            raise LocalError("the queue is not those that wait, in order")
        if self._tokens_in_flight != sum(r.pull.num_tokens for r in held[Held.TOKENS]):
            raise LocalError(f"{self._tokens_in_flight} tokens in flight")
        slots = [r.slot for r in held[Held.SLOT]]
        if sorted([*slots, *self._free_slots]) != list(range(self._num_scratch)):
            raise LocalError(f"scratch slots {slots} held, {list(self._free_slots)} free")
        if self.num_quarantined != sum(len(r.pull.local_blocks) for r in held[Held.QUARANTINE]):
            raise LocalError(f"{self.num_quarantined} blocks quarantined")
        deadlines = [r.deadline for r in self._running.values()]
        if deadlines != sorted(r.deadline for r in held[Held.DEADLINE]):
            raise LocalError(f"deadlines out of order: {deadlines}")

    def _judge(
        self,
        pull_id: int,
        end: TransferEnd,
        events: tuple[PullEvent, PullEvent, PullEvent],
        now: float,
    ) -> list[Command]:
        """By the word: `events` are right, wrong, failed. A zero word is no lease's, also where a
        source refuses with it to copy anything."""
        right, wrong, failed = events
        record = self._records.get(pull_id)
        if record is None or end.word is None or not (end.ok or end.word == 0):
            return self._on(pull_id, failed, end.reason or "the transport gave no reason", now)
        if end.word == record.pull.handle.ranks[0].nonce:
            return self._on(pull_id, right, "", now)
        return self._on(pull_id, wrong, "the source let go of the blocks", now)

    def _on(self, pull_id: int, event: PullEvent, reason: str, now: float) -> list[Command]:
        """Move a pull by the table, then start those that now have room. Raises LocalError, and
        changes nothing, if the table has no such move."""
        record = self._records.get(pull_id)
        if record is None:
            return []
        after = NEXT.get((record.state, event))
        if after is None:
            raise LocalError(f"pull {pull_id}: {event.value} while {record.state.value}")
        if after is record.state:
            return []
        now = self._advance(now)
        return self._move(record, event, after, reason, now) + self._start_waiting(now)

    def _start_waiting(self, now: float) -> list[Command]:
        """In order: who is first and has no room keeps those behind it waiting."""
        commands: list[Command] = []
        while self._waiting and self._has_room(next(iter(self._waiting.values()))):
            record = next(iter(self._waiting.values()))
            event = PullEvent.START
            commands += self._move(record, event, NEXT[record.state, event], "", now)
        return commands

    def _has_room(self, record: _Record) -> bool:
        """A pull larger than the bound runs when no other does."""
        if not self._free_slots:
            return False
        if self._max_tokens is None or not self._tokens_in_flight:
            return True
        return self._tokens_in_flight + record.pull.num_tokens <= self._max_tokens

    def _move(
        self, record: _Record, event: PullEvent, after: PullState, reason: str, now: float
    ) -> list[Command]:
        before, record.state = record.state, after
        given_back, taken = CHANGES[before, after]
        for held in given_back:
            self._give_back(record, held, now)
        for held in taken:
            self._take(record, held, now)
        if not HOLDS[after]:
            del self._records[record.pull_id]
        commands: list[Command] = []
        if before not in FENCED:
            if event in COUNTED_AS:
                self.ended[COUNTED_AS[event]] += 1
            if event in FAILURES:
                commands.append(PullFailed(record.pull_id, FAILURES[event], reason))
        return [*commands, _ON_ENTRY[after](record)]

    def _take(self, record: _Record, held: Held, now: float) -> None:
        match held:
            case Held.QUEUE:
                self._waiting[record.pull_id] = record
            case Held.TOKENS:
                self._tokens_in_flight += record.pull.num_tokens
            case Held.SLOT:
                record.slot = self._free_slots.popleft()
            case Held.QUARANTINE:
                self.num_quarantined += len(record.pull.local_blocks)
            case _:
                self._restart_deadline(record, now)

    def _give_back(self, record: _Record, held: Held, now: float) -> None:
        match held:
            case Held.QUEUE:
                del self._waiting[record.pull_id]
            case Held.TOKENS:
                self._tokens_in_flight -= record.pull.num_tokens
            case Held.SLOT:
                self._free_slots.append(record.slot)
            case Held.QUARANTINE:
                self.num_quarantined -= len(record.pull.local_blocks)
            case _:
                del self._running[record.pull_id]
                self._idle_since = now

    def _restart_deadline(self, record: _Record, now: float) -> None:
        record.deadline = now + self._timeout_s
        self._running[record.pull_id] = record
        self._running.move_to_end(record.pull_id)

    def _advance(self, now: float) -> float:
        self._now = max(self._now, now)
        return self._now
