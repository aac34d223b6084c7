"""What lies between the processes: letters to be sent, one-sided memory, reads that are under way.

`Postbox` stands for the mailer: what one turn has to say to one mailbox is one envelope. `Reads`
stands for a transport: it keeps the operations of one sink, and the world moves them one block at a
time. Nothing here decides when.
"""

from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from protocol.handoff import Offer, TcpOffer
from worker.handoff.ends import TransferEnd
from worker.transfer.base import OnEnd, PullSpec

ZERO_BLOCK = b""
"""What nobody has written."""


class Violation(AssertionError):
    """Something that must never happen has happened."""


class Postbox:
    """Collects what is posted in one turn; `empty` gives the envelopes."""

    def __init__(self, envelope: Callable[[str, list[Any]], bytes]) -> None:
        self._envelope = envelope
        self._boxes: dict[str, list[Any]] = {}

    def post(self, subject: str, message: Any, *, reply: str = "", lazy: bool = False) -> None:
        self._boxes.setdefault(subject, []).append(message)

    def empty(self) -> list[tuple[str, bytes]]:
        boxes, self._boxes = self._boxes, {}
        return [(subject, self._envelope(subject, said)) for subject, said in boxes.items()]

    def flush_now(self) -> None:
        """The end of the turn does it."""


class Memory:
    """An arena: what each block holds. A block is written as a whole or position by position."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self.block_bytes = 16
        self.content: list[tuple[bytes, ...]] = [()] * num_blocks


class Words:
    """A lease table, or the scratch words of a sink. Each call is one aligned store."""

    def __init__(self, num_slots: int) -> None:
        self.num_slots = num_slots
        self.words = [0] * num_slots

    def write(self, slot: int, word: int) -> None:
        self.words[slot] = word

    def zero(self, slot: int) -> None:
        self.words[slot] = 0


@dataclass(slots=True, eq=False)
class Read:
    """One operation of a transport: the blocks of one pull, or one word."""

    source: str
    """The incarnation whose memory is read."""
    remote: tuple[int, ...]
    local: tuple[int, ...]
    lease_slot: int
    scratch_slot: int
    """Where the word goes; -1 for data."""
    on_end: OnEnd
    nonce: int
    early: int | None = None
    """What a source that looks too soon has found."""
    num_done: int = 0
    aborted: bool = False
    end: TransferEnd | None = None
    """Nothing of it lands any more; waits to be told."""

    @property
    def num_bytes_done(self) -> int:
        return self.num_done

    @property
    def is_word(self) -> bool:
        return self.scratch_slot >= 0

    @property
    def pull_id(self) -> int:
        """As the puller's callback has it."""
        number: int = self.on_end.args[0]  # type: ignore[attr-defined]
        return number

    def abort(self) -> None:
        self.aborted = True


@dataclass(slots=True, eq=False)
class Reads:
    """The transport of one worker: implements `Transfer` as far as the engine uses it."""

    incarnation: str
    memory: Memory
    scratch: Words
    name: str = "shm"
    live: list[Read] = field(default_factory=list)

    def start(self, *_: object) -> None: ...

    def offer(self) -> Offer:
        return TcpOffer(self.incarnation, 0)

    def refuse(self, offer: Offer) -> str:
        return "" if isinstance(offer, TcpOffer) else "not an offer of ours"

    def pull(self, spec: PullSpec, on_end: OnEnd) -> Read:
        return self._begin(spec, on_end, spec.remote, spec.local, -1)

    def read_word(self, spec: PullSpec, scratch_slot: int, on_end: OnEnd) -> None:
        for other in self.live:
            if other.scratch_slot == scratch_slot:
                raise Violation(f"scratch slot {scratch_slot} belongs to two reads")
        self._begin(spec, on_end, array("I"), array("I"), scratch_slot)

    def num_live(self) -> int:
        return len(self.live)

    def stop(self) -> bool:
        return not self.live

    def _begin(
        self,
        spec: PullSpec,
        on_end: OnEnd,
        remote: Sequence[int],
        local: Sequence[int],
        scratch_slot: int,
    ) -> Read:
        assert isinstance(spec.offer, TcpOffer)
        read = Read(
            spec.offer.host, tuple(remote), tuple(local), spec.slot, scratch_slot, on_end,
            spec.nonce,
        )  # fmt: skip
        if any(other.pull_id == read.pull_id for other in self.live):
            raise Violation("the word is read while the data is live")
        self.live.append(read)
        return read

    def land(self, number: int, content: tuple[bytes, ...]) -> None:
        """The next block of this operation arrives."""
        read = self.live[number]
        self.memory.content[read.local[read.num_done]] = content
        read.num_done += 1

    def land_word(self, number: int, word: int, *, two_sided: bool) -> None:
        """The word arrives: in its scratch slot, or with the data's end."""
        read = self.live[number]
        if two_sided:
            word = word if read.early is None else read.early
            read.end = TransferEnd(ok=True, word=word, num_bytes=read.num_done)
        else:
            self.scratch.words[read.scratch_slot] = word
            read.end = TransferEnd(ok=True, word=self.scratch.words[read.scratch_slot])

    def finish(self, number: int) -> None:
        """All bytes are here."""
        read = self.live[number]
        read.end = TransferEnd(ok=True, num_bytes=read.num_done)

    def fail(self, number: int, reason: str, *, peer_gone: bool = False) -> None:
        self.live[number].end = TransferEnd(ok=False, reason=reason, peer_gone=peer_gone)

    def tell(self, number: int) -> None:
        """The end of an operation reaches the engine."""
        read = self.live.pop(number)
        assert read.end is not None
        read.on_end(read.end)
