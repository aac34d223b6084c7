"""The prefix index against the truth, whatever became of the worker's events on their way: lost,
repeated, late, nonsense. It stays within its bounds, and after a snapshot it is right again."""

import random

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from protocol.events import KvCleared, KvEvent, KvRemoved, KvStored
from router.scheduling.prefix_index import PrefixIndex, depth_of

BLOCKS = [n.to_bytes(16, "big") for n in range(1, 13)]
CAPACITY = 2 * len(BLOCKS)
MAX_PAIRS = 64
REPORTS = 6
blocks = st.lists(st.sampled_from(BLOCKS), min_size=1, max_size=5)


class IndexMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.index = PrefixIndex(MAX_PAIRS)
        self.slot = self.index.join(CAPACITY)
        self.other = self.index.join(CAPACITY)
        self.index.change(self.other, 1, [KvStored(b"".join(BLOCKS[:3]))])
        self.truth: dict[bytes, None] = {}
        self.log: list[KvEvent] = []
        self.way: list[tuple[int, list[KvEvent]]] = []
        """Said and not arrived."""
        self.asked = False
        self.old_snapshots: list[tuple[int, list[bytes]]] = []

    def _say(self, event: KvEvent) -> None:
        self.log.append(event)
        self.way.append((len(self.log), [event]))

    def _hear(self, first: int, events: list[KvEvent]) -> None:
        self.asked |= self.index.change(self.slot, first, events)

    # -- the worker

    @rule(chosen=blocks)
    def store(self, chosen: list[bytes]) -> None:
        self.truth.update(dict.fromkeys(chosen))
        self._say(KvStored(b"".join(chosen)))

    @rule(chosen=blocks)
    def remove(self, chosen: list[bytes]) -> None:
        for block in chosen:
            self.truth.pop(block, None)
        self._say(KvRemoved(b"".join(chosen)))

    @rule()
    def clear(self) -> None:
        self.truth.clear()
        self._say(KvCleared())

    # -- the way

    @rule(seed=st.integers(0, 9))
    def deliver(self, seed: int) -> None:
        """One of those on their way, not always the first."""
        if self.way:
            self._hear(*self.way.pop(0 if seed else random.Random(seed).randrange(len(self.way))))

    @rule()
    def lose(self) -> None:
        if self.way:
            self.way.pop(0)

    @rule(back=st.integers(1, 6))
    def repeat(self, back: int) -> None:
        start = max(0, len(self.log) - len(self.way) - back)
        self._hear(start + 1, self.log[start : start + 2])

    @rule(
        first=st.integers(-(2**63), 2**64 - 1) | st.integers(-3, 30),
        hashes=st.binary(max_size=100),
        many=st.integers(1, 40),
    )
    def nonsense(self, first: int, hashes: bytes, many: int) -> None:
        """What the worker never said, under any number."""
        self._hear(first, [KvStored(hashes), KvRemoved(hashes[:40])] * many)

    @rule()
    def flood(self) -> None:
        """Far more blocks than the worker has."""
        number = len(self.log) + 1
        self._hear(number, [KvStored(random.Random(number).randbytes(16 * 300))])

    @rule(last=st.integers(-(2**63), 2**64 - 1) | st.integers(0, 30))
    def report_nonsense(self, last: int) -> None:
        self.asked |= self.index.heard_last(self.slot, last)

    @rule()
    def answer(self) -> None:
        if self.asked:
            self.asked = False
            self._give(len(self.log), list(self.truth))

    @rule()
    def answer_late(self) -> None:
        """A snapshot that was taken long ago comes now."""
        if self.old_snapshots:
            self._give(*self.old_snapshots.pop())

    @rule()
    def take_one(self) -> None:
        self.old_snapshots.append((len(self.log), list(self.truth)))

    def _give(self, last: int, hashes: list[bytes]) -> None:
        self.slot, again = self.index.replace(self.slot, last, hashes)
        self.asked |= again

    # -- what must hold

    @invariant()
    def it_is_bounded(self) -> None:
        self.index.validate()
        holder = self.index._holders[self.slot]
        assert holder.count <= CAPACITY
        assert len(holder.held_back) <= 64
        assert self.index.num_pairs <= MAX_PAIRS

    @invariant()
    def others_keep_what_they_hold(self) -> None:
        assert depth_of(self.index.match(BLOCKS[:3]), self.other) == 3

    def teardown(self) -> None:
        """All is quiet: reports come, questions are answered, nothing else is said. By then no lie
        about numbers stands; the next snapshot that anything asks for makes it right."""
        self.way.clear()
        last = len(self.log)
        for _ in range(REPORTS):
            asked = self.index.heard_last(self.slot, last)
            if asked or self.index.is_waiting(self.slot):
                self._give(last, list(self.truth))
        assert self.index.heard_last(self.slot, last + 1) or self.index.change(
            self.slot, last + 3, []
        )
        self._give(last + 1, list(self.truth))
        held = [block for block in BLOCKS if depth_of(self.index.match([block]), self.slot)]
        assert set(held) == set(self.truth)
        assert self.index._holders[self.slot].count == len(held)
        self.index.validate()


IndexMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
test_index_machine = IndexMachine.TestCase
