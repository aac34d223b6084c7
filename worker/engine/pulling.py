"""The borrowing end of the hand-off, driven: handles become transfers and references in the pool.

The rules are in `worker.handoff.sink`; here its commands are carried out. Lives in the engine's
thread; what transports report from their threads comes in through `post`.

A copy that ended in an error is tried again at once over the next transport that both sides have,
into the same blocks, which nothing writes any more. One that is silent is not: its blocks are in
quarantine, and the router sends the choice elsewhere.
"""

from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import msgspec

from protocol.blocks import unpack_ids
from protocol.errors import LocalError
from protocol.handoff import KvHandle
from protocol.out import FailureCode
from worker.engine.base import DecodingInfo
from worker.engine.batching import blocks_for
from worker.engine.messages import OperationEnded
from worker.engine.pairs import Pairs, Way
from worker.engine.sequences import ActiveSequence
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
from worker.kv.arena import ScratchWords
from worker.kv.pool import BlockPool
from worker.transfer.base import PullSpec, PullTicket, Transfer
from worker.transfer.select import Chosen, NoTransfer, choose

PROGRESS_S = 0.5
"""Progress is looked at, and told, this often."""


class PullReady(msgspec.Struct, frozen=True):
    """The sequence's KV is here and checked."""

    sequence: ActiveSequence
    info: DecodingInfo


class PullLost(msgspec.Struct, frozen=True):
    """The KV did not come; the blocks that were to hold it are taken care of."""

    sequence: ActiveSequence
    code: FailureCode
    message: str


class PullMoved(msgspec.Struct, frozen=True):
    """Bytes have arrived."""

    sequence: ActiveSequence
    done: int
    total: int


PullOutcome = PullReady | PullLost | PullMoved


@dataclass(slots=True, eq=False)
class _Pulling:
    """A pull that the sink knows."""

    pull: Pull
    transfer: Transfer
    spec: PullSpec
    started_at: float
    sequence: ActiveSequence | None
    """None once nobody waits for it."""
    reason: str = ""
    """Why this transport."""
    failures: tuple[str, ...] = ()
    """What the transports tried before said, `name: reason`."""
    tried: frozenset[str] = frozenset()
    """Those transports, and this one."""
    ticket: PullTicket | None = None
    num_bytes: int = 0
    quarantined: bool = False
    reported_at: float = 0.0
    lost: PullLost | None = None
    """What the router is to be told, unless another transport is tried."""


@dataclass(slots=True)
class PullCounts:
    """For `/metrics`."""

    results: dict[tuple[str, str], int] = field(default_factory=dict)
    num_bytes: dict[str, int] = field(default_factory=dict)

    def add(self, transport: str, result: str) -> None:
        self.results[transport, result] = self.results.get((transport, result), 0) + 1


class Puller:
    """Fetches the blocks of decode legs that come with a handle."""

    def __init__(
        self,
        pool: BlockPool,
        sink: Sink,
        transfers: Sequence[Transfer],
        scratch: ScratchWords,
        *,
        block_bytes: int,
        post: Callable[[OperationEnded], None],
        why: Mapping[str, str] | None = None,
    ) -> None:
        """`why` says of each transport why it runs."""
        self._pool = pool
        self._sink = sink
        self._transfers = list(transfers)
        self._scratch = scratch
        self._block_bytes = block_bytes
        self._post = post
        self._why = why or {}
        self._pulls: dict[int, _Pulling] = {}
        self._ids: dict[ActiveSequence, int] = {}
        self._next_id = 1
        self._looked_at = 0.0
        self.counts = PullCounts()
        self.pairs = Pairs()

    @property
    def num_pulling(self) -> int:
        """Sequences that wait for their KV."""
        return len(self._ids)

    @property
    def over_bound(self) -> bool:
        """More blocks are in quarantine than this worker may lose sight of."""
        return self._sink.over_bound

    def begin(self, sequence: ActiveSequence, now: float) -> list[PullOutcome]:
        """Fetch what the placed `sequence` lacks. The blocks it got for that are its own again only
        with `PullReady`."""
        handle = sequence.handle
        if handle is None or len(handle.ranks) != 1:
            return [PullLost(sequence, "handle_mismatch", "the handle is not of one rank")]
        missing = _missing_blocks(sequence, handle)
        if not missing:
            return self._begin_cached(sequence, handle)
        return self._attempt(sequence, handle, missing, now)

    def _attempt(
        self,
        sequence: ActiveSequence,
        handle: KvHandle,
        missing: range,
        now: float,
        *,
        failures: tuple[str, ...] = (),
        tried: frozenset[str] = frozenset(),
    ) -> list[PullOutcome]:
        """Over the best transport that was not tried yet."""
        chosen = self._choose(handle, tried, now)
        if isinstance(chosen, NoTransfer):
            if failures:
                return [PullLost(sequence, "transfer_failed", "; ".join(failures))]
            self.counts.add("none", "transfer_failed")
            return [PullLost(sequence, "transfer_failed", f"no transport fits: {chosen}")]
        rank = handle.ranks[0]
        try:
            remote = unpack_ids(rank.blocks)[missing.start : missing.stop]
        except ValueError:
            return [PullLost(sequence, "handle_mismatch", "the handle's blocks are damaged")]
        local = sequence.blocks[missing.start : missing.stop]
        spec = PullSpec(
            chosen.offer, remote, array("I", local), self._block_bytes, rank.slot, rank.nonce
        )
        expected = sequence.content_hash(handle.num_tokens)
        num_tokens = handle.num_tokens - missing.start * sequence.limits.block_size
        pull = Pull(handle, expected, tuple(local), tuple(remote), num_tokens)
        del sequence.blocks[missing.start : missing.stop]
        pulling = _Pulling(
            pull,
            chosen.transfer,
            spec,
            now,
            sequence,
            reason=chosen.reason,
            failures=failures,
            tried=tried | {chosen.transfer.name},
            reported_at=now,
        )
        return self._start(pulling, now)

    def ended(self, message: OperationEnded, now: float) -> list[PullOutcome]:
        """An operation is terminal."""
        pulling = self._pulls.get(message.pull_id)
        if pulling is not None and not message.is_word:
            pulling.num_bytes = max(pulling.num_bytes, message.end.num_bytes)
        handle = self._sink.word_ended if message.is_word else self._sink.data_ended
        return self._run(handle(message.pull_id, message.end, now), now)

    def abandon(self, sequence: ActiveSequence, now: float) -> None:
        """Nobody waits for it any more."""
        pull_id = self._ids.pop(sequence, None)
        if pull_id is not None:
            pulling = self._pulls[pull_id]
            pulling.sequence = None
            self.counts.add(pulling.transfer.name, "abandoned")
            self._run(self._sink.abandon(pull_id, now), now)

    def tick(self, now: float) -> list[PullOutcome]:
        """Look at how far the pulls are; give up those that make no progress."""
        outcomes: list[PullOutcome] = []
        deadline = self._sink.next_deadline()
        due = deadline is not None and deadline <= now
        if self._pulls and (due or now - self._looked_at >= PROGRESS_S):
            self._looked_at = now
            for pull_id, pulling in self._pulls.items():
                outcomes += self._look(pull_id, pulling, now)
        if due:
            outcomes += self._run(self._sink.tick(now), now)
        return outcomes

    def next_deadline(self) -> float | None:
        deadline = self._sink.next_deadline()
        if not self._pulls:
            return deadline
        look = self._looked_at + PROGRESS_S
        return look if deadline is None else min(deadline, look)

    def validate(self) -> None:
        """Raises LocalError where a rule is broken."""
        self._sink.validate()
        if any(self._pulls[number].sequence is not one for one, number in self._ids.items()):
            raise LocalError("a pull is of another sequence than the one that waits for it")

    def _begin_cached(self, sequence: ActiveSequence, handle: KvHandle) -> list[PullOutcome]:
        """All of it is in our own cache, computed from the same tokens under the same model."""
        if sequence.content_hash(handle.num_tokens) != handle.content_hash:
            return [
                PullLost(sequence, "handle_mismatch", "the handle is of another prompt or model")
            ]
        return [PullReady(sequence, DecodingInfo(transport="cache"))]

    def _choose(self, handle: KvHandle, tried: frozenset[str], now: float) -> Chosen | NoTransfer:
        """One that failed with this source a moment ago only if no other one fits."""
        offers = handle.ranks[0].offers
        failing = self.pairs.failing(handle.worker, handle.incarnation, now)
        try:
            chosen = choose(self._transfers, offers, without=tried | failing, why=self._why)
            if isinstance(chosen, NoTransfer) and not failing <= tried:
                chosen = choose(self._transfers, offers, without=tried, why=self._why)
        except Exception as error:  # noqa: BLE001  an offer is the peer's word
            return NoTransfer((f"the offers are damaged: {error!r}",))
        if isinstance(chosen, Chosen):
            self.pairs.used(handle.worker, Way(chosen.transfer.name, chosen.reason))
        return chosen

    def _start(self, pulling: _Pulling, now: float) -> list[PullOutcome]:
        pull_id, self._next_id = self._next_id, self._next_id + 1
        if not self._pulls:
            self._looked_at = now
        self._pulls[pull_id] = pulling
        if pulling.sequence is not None:
            self._ids[pulling.sequence] = pull_id
        return self._run(self._sink.begin(pull_id, pulling.pull, now), now)

    def _look(self, pull_id: int, pulling: _Pulling, now: float) -> list[PullOutcome]:
        """One that waits for room is told of as well: those before it have deadlines."""
        done = pulling.ticket.num_bytes_done if pulling.ticket is not None else 0
        if pulling.ticket is not None:
            if done <= pulling.num_bytes:
                return []
            pulling.num_bytes = done
            self._sink.progressed(pull_id, done, now)
        if pulling.sequence is None or now - pulling.reported_at < PROGRESS_S:
            return []
        pulling.reported_at = now
        total = len(pulling.spec.local) * self._block_bytes if pulling.ticket is not None else 0
        return [PullMoved(pulling.sequence, done, total)]

    def _run(self, commands: Sequence[Command], now: float) -> list[PullOutcome]:
        outcomes: list[PullOutcome] = []
        for command in commands:
            match command:
                case PostData(pull_id=pull_id):
                    self._post_data(pull_id, self._pulls[pull_id])
                case PostWord(pull_id=pull_id, scratch_slot=slot):
                    self._post_word(pull_id, self._pulls[pull_id], slot)
                case Quarantine(pull_id=pull_id, blocks=blocks):
                    outcomes += self._quarantine(self._pulls[pull_id], blocks)
                case FreeBlocks(pull_id=pull_id, blocks=blocks):
                    outcomes += self._free(self._pulls.pop(pull_id), blocks, now)
                case Ready(pull_id=pull_id):
                    outcomes += self._ready(self._pulls.pop(pull_id), now)
                case PullFailed(pull_id=pull_id, code=code, message=message):
                    self._failed(self._pulls[pull_id], code, message, now)
        return outcomes

    def _post_data(self, pull_id: int, pulling: _Pulling) -> None:
        on_end = partial(self._on_end, pull_id, False)
        try:
            pulling.ticket = pulling.transfer.pull(pulling.spec, on_end)
        except Exception as error:  # noqa: BLE001  a handle's offer is the peer's word
            on_end(TransferEnd(ok=False, reason=f"refused: {error}"))

    def _post_word(self, pull_id: int, pulling: _Pulling, slot: int) -> None:
        on_end = partial(self._on_end, pull_id, True)
        self._scratch.zero(slot)
        try:
            pulling.transfer.read_word(pulling.spec, slot, on_end)
        except Exception as error:  # noqa: BLE001  as above
            on_end(TransferEnd(ok=False, reason=f"refused: {error}"))

    def _on_end(self, pull_id: int, is_word: bool, end: TransferEnd) -> None:
        """Called in the transport's thread, or in ours."""
        self._post(OperationEnded(pull_id, is_word, end))

    def _quarantine(self, pulling: _Pulling, blocks: Sequence[int]) -> list[PullOutcome]:
        """Nobody wants the bytes any more: the transport may stop sooner than its source does."""
        pulling.quarantined = True
        self._pool.quarantine(blocks)
        if pulling.ticket is not None:
            pulling.ticket.abort()
        return [pulling.lost] if pulling.lost is not None else []

    def _free(self, pulling: _Pulling, blocks: Sequence[int], now: float) -> list[PullOutcome]:
        if pulling.quarantined:
            self._pool.unquarantine(blocks)
            return []
        lost = pulling.lost
        if lost is None:
            self._pool.release(blocks)
            return []
        sequence, first = lost.sequence, lost.sequence.num_stored
        sequence.blocks[first:first] = blocks
        if pulling.ticket is None or lost.code != "transfer_failed":
            return [lost]
        return self._attempt(
            sequence,
            pulling.pull.handle,
            range(first, first + len(blocks)),
            now,
            failures=(*pulling.failures, f"{pulling.transfer.name}: {lost.message}"),
            tried=pulling.tried,
        )

    def _ready(self, pulling: _Pulling, now: float) -> list[PullOutcome]:
        transport, num_bytes = pulling.transfer.name, len(pulling.spec.local) * self._block_bytes
        self.counts.add(transport, "ok")
        self.counts.num_bytes[transport] = self.counts.num_bytes.get(transport, 0) + num_bytes
        sequence = pulling.sequence
        if sequence is None:
            self._pool.release(pulling.pull.local_blocks)
            return []
        del self._ids[sequence]
        first = sequence.num_stored
        sequence.blocks[first:first] = pulling.pull.local_blocks
        seconds = now - pulling.started_at
        source = pulling.pull.handle.worker
        info = DecodingInfo(
            0, transport, num_bytes, seconds, source=source, transport_reason=pulling.reason
        )
        return [PullReady(sequence, info)]

    def _failed(self, pulling: _Pulling, code: FailureCode, message: str, now: float) -> None:
        """What becomes of it is decided with what becomes of its blocks, which comes next."""
        name, handle = pulling.transfer.name, pulling.pull.handle
        self.counts.add(name, code)
        if code == "transfer_failed" and pulling.ticket is not None:
            self.pairs.failed(handle.worker, handle.incarnation, name, now)
        sequence, pulling.sequence = pulling.sequence, None
        if sequence is not None:
            del self._ids[sequence]
            pulling.lost = PullLost(sequence, code, message)


def _missing_blocks(sequence: ActiveSequence, handle: KvHandle) -> range:
    """Which blocks of the handle are not in the sequence's cached prefix."""
    end = blocks_for(handle.num_tokens, sequence.limits.block_size)
    return range(sequence.num_stored, end)
