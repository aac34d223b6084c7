"""The hand-off under every schedule that hypothesis finds, and what happens without the check."""

from collections import Counter
from collections.abc import Callable
from random import Random
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from tests.model.handoff_world import NUM_LEASES, Checks, Decode, Violation, World

SINK = st.integers(0, 1)
INDEX = st.integers(0, 3)


def thawed(machine: "HandoffMachine") -> bool:
    return not machine.world.prefill.frozen


class HandoffMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.world = World()

    def sink(self, which: int) -> Decode:
        return self.world.sinks[which]

    @precondition(thawed)
    @rule(num_blocks=st.integers(1, 4), store=st.booleans(), lend=st.booleans())
    def prefill(self, num_blocks: int, store: bool, lend: bool) -> None:
        self.world.prefill.prefill(num_blocks, store)
        if lend:
            self.world.prefill.lend(-1, self.world.now)
            self.world.prefill.finish(-1)

    @precondition(thawed)
    @rule(index=INDEX)
    def lend(self, index: int) -> None:
        self.world.prefill.lend(index, self.world.now)

    @precondition(thawed)
    @rule(index=INDEX)
    def finish_prefill(self, index: int) -> None:
        self.world.prefill.finish(index)

    @precondition(thawed)
    @rule(index=INDEX, revoke=st.booleans(), reuse=st.booleans())
    def end_lease(self, index: int, revoke: bool, reuse: bool) -> None:
        source, handles = self.world.prefill.source, self.world.prefill.recent(index)
        (source.revoke if revoke else source.release)(handles, self.world.now)
        if reuse:
            self.world.prefill.prefill(4, False)

    @precondition(thawed)
    @rule(index=INDEX)
    def renew(self, index: int) -> None:
        self.world.prefill.source.renew(self.world.prefill.recent(index), self.world.now)

    @precondition(thawed)
    @rule()
    def expire(self) -> None:
        self.world.prefill.source.expire(self.world.now)

    @rule()
    def freeze_or_thaw(self) -> None:
        self.world.prefill.frozen = not self.world.prefill.frozen

    @rule(seconds=st.sampled_from([1.0, 11.0, 31.0]))
    def time_passes(self, seconds: float) -> None:
        self.world.now += seconds

    @rule(which=SINK, index=INDEX, two_sided=st.booleans(), odds=st.integers(0, 7))
    def begin(self, which: int, index: int, two_sided: bool, odds: int) -> None:
        self.sink(which).begin(index, two_sided, odds == 7, self.world.now)

    @rule(which=SINK, index=INDEX, num_steps=st.integers(1, 4))
    def step(self, which: int, index: int, num_steps: int) -> None:
        for _ in range(num_steps):
            self.sink(which).step(index)

    @rule(which=SINK, index=INDEX)
    def deliver(self, which: int, index: int) -> None:
        self.sink(which).deliver(index, self.world.now)

    @rule(which=SINK, index=INDEX)
    def fail(self, which: int, index: int) -> None:
        self.sink(which).fail(index)

    @rule(which=SINK, index=INDEX)
    def deliver_again(self, which: int, index: int) -> None:
        self.sink(which).deliver_again(index, self.world.now)

    @rule(which=SINK, index=INDEX)
    def abandon(self, which: int, index: int) -> None:
        self.sink(which).abandon(index, self.world.now)

    @rule(which=SINK, index=INDEX, num_bytes=st.integers(0, 3))
    def progress(self, which: int, index: int, num_bytes: int) -> None:
        self.sink(which).progress(index, num_bytes, self.world.now)

    @rule(which=SINK)
    def tick(self, which: int) -> None:
        self.sink(which).tick(self.world.now)

    @rule(which=SINK)
    def finish_decode(self, which: int) -> None:
        self.sink(which).finish()

    @invariant()
    def nothing_is_corrupt(self) -> None:
        self.world.validate()

    def teardown(self) -> None:
        self.world.settle()


TestHandoff = HandoffMachine.TestCase
TestHandoff.settings = settings(
    max_examples=150, stateful_step_count=50, deadline=None, derandomize=True
)


def schedule(world: World, rng: Random, num_steps: int) -> None:
    """A busy life with few handles: many pulls, of which many lose their lease."""
    prefill, source = world.prefill, world.prefill.source

    def new_handle(index: int) -> None:
        prefill.prefill(1 + index, index == 0)
        prefill.lend(-1, world.now)
        prefill.finish(-1)

    def reuse(index: int) -> None:
        source.release(prefill.recent(index), world.now)
        prefill.prefill(3, False)
        prefill.finish(-1)

    def pass_time(index: int) -> None:
        world.now += index
        source.expire(world.now)

    def at_a_sink(move: Callable[[Decode, int], None]) -> Callable[[int], None]:
        return lambda index: move(rng.choice(world.sinks), index)

    actions: list[tuple[int, Callable[[int], Any]]] = [
        (4, new_handle),
        (2, reuse),
        (1, pass_time),
        (1, lambda index: source.revoke(prefill.recent(index), world.now)),
        (6, at_a_sink(lambda sink, index: sink.begin(index, rng.random() < 0.3, False, world.now))),
        (60, at_a_sink(lambda sink, index: sink.step(index))),
        (24, at_a_sink(lambda sink, index: sink.deliver(index, world.now))),
        (1, at_a_sink(lambda sink, index: sink.fail(index))),
        (1, at_a_sink(lambda sink, index: sink.deliver_again(index, world.now))),
        (1, at_a_sink(lambda sink, index: sink.abandon(index, world.now))),
        (1, at_a_sink(lambda sink, index: sink.tick(world.now))),
        (4, at_a_sink(lambda sink, index: sink.finish())),
    ]
    weights = [weight for weight, _ in actions]
    for _ in range(num_steps):
        _, action = rng.choices(actions, weights)[0]
        action(rng.randrange(NUM_LEASES))
        world.validate()


@pytest.mark.parametrize("seed", range(4))
def test_many_pulls_some_ready_some_lost_none_stale(seed: int) -> None:
    world = World()
    schedule(world, Random(seed), 3000)
    world.settle()
    total = Counter[str]()
    for sink in world.sinks:
        total.update(sink.sink.ended)
    assert total["ready"] > 15
    assert total["lease_lost"] > 15
    assert min(total["abandoned"], total["transfer_failed"]) > 0


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("checks", ["none", "word first"])
def test_without_the_check_or_with_it_too_early_stale_bytes_are_used(
    checks: Checks, seed: int
) -> None:
    with pytest.raises(Violation, match="is ready with"):
        schedule(World(checks), Random(seed), 3000)
