"""Workers that lie: about their load, their attempts, other workers' attempts, other names.

Two workers can do everything; one of them says whatever comes to its mind. The other one's choices
are as if it were not there, every choice ends once, and the books agree.
"""

import asyncio
import math
import random
from collections.abc import Callable
from typing import Any

import pytest

from protocol.bus import Message
from protocol.codec import encode
from protocol.events import KvEvents, KvStored, LoadReport
from protocol.handoff import KvHandle
from protocol.jobs import Decode, Prefill
from protocol.out import (
    Accepted,
    Decoding,
    Delta,
    Failed,
    Out,
    OutEnvelope,
    Prefilled,
    Progress,
    Refused,
    StepFrame,
)
from router import claims
from router.claims import MAX_WAITS, Advance, Labels
from router.scheduling import events as ev
from router.scheduling.limits import Limits
from tests.unit.router.dispatch_world import (
    PATIENCE_S,
    SUBJECTS,
    DispatchWorld,
    WireWorker,
    dispatching,
)
from tests.unit.router.test_inbox import World, delta, handle

BIG = 2**63 - 1
LIMITS = Limits(accept_timeout_s=0.5, silence_timeout_s=60.0, suspect_s=0.05)


@pytest.fixture
def world() -> World:
    return World()


# -- one attempt's words


def test_a_worker_cannot_speak_for_another_ones_attempts(world: World) -> None:
    """Its own name, the other's incarnation and attempt: both can be had by listening."""
    sink = world.add(1)
    words: list[Out] = [StepFrame([delta(1, 0, finish=True)]), Failed(1, "decode", "engine", "x")]
    lie = OutEnvelope("liar", "inc", 1, words)
    world.inbox.on_out(Message(SUBJECTS.out("r", "liar"), encode(lie)))
    assert (sink.ids, [type(event) for event in world.fed]) == ([], [])
    world.say(StepFrame([delta(1, 0, finish=True)]))
    assert sink.ids == [0]
    assert ev.Ended(1) in world.fed


def test_a_first_token_under_another_attempts_number_ends_nothing_of_it(world: World) -> None:
    victim = world.add(1)
    own = world.add(2)
    world.say(Prefilled(2, 4, 0, delta(1, 0, finish=True), None))
    assert victim.ids == []
    assert own.ids == [0]
    assert ev.Ended(1) not in world.fed


@pytest.mark.parametrize(
    "lie",
    [
        Delta(1, 0, [-1], "x"), Delta(1, 0, [2**32], "x"), Delta(1, 0, [1, BIG], "x"),
        Delta(1, 0, [7] * 65, "x"), Delta(1, 0, [], "x"),
    ],
)  # fmt: skip
def test_a_delta_that_cannot_be_ends_its_attempt_and_no_other(world: World, lie: Delta) -> None:
    """No ids, more than were asked for, or none at all: and the rest of the frame is heard."""
    own, other = world.add(1), world.add(2)
    world.say(StepFrame([lie, delta(2, 0)]))
    assert (own.ids, other.ids) == ([], [0])
    [failed] = [event for event in world.fed if isinstance(event, ev.AttemptFailed)]
    assert (failed.attempt, failed.code) == (1, "engine")
    assert not world.attempts.live[1].choice.output


def test_more_tokens_than_were_asked_for_are_not_taken_piece_by_piece(world: World) -> None:
    sink = world.add(1)
    for index in range(100):
        world.say(StepFrame([delta(1, index)]))
    assert len(sink.ids) == 64
    assert any(isinstance(event, ev.AttemptFailed) for event in world.fed)


def test_repeats_and_holes_are_no_sign_of_life(world: World) -> None:
    world.add(1)
    world.say(StepFrame([delta(1, 0)]))
    heard = world.attempts.live[1].heard_at
    for index in (0, 0, BIG, 5, -3):
        world.now += 1.0
        world.say(StepFrame([Delta(1, index, [3], "x")]))
    assert world.attempts.live[1].heard_at == heard


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf, -5.0, 1e300])
def test_times_and_counts_that_cannot_be_do_not_break_the_metrics(
    world: World, number: float
) -> None:
    world.add(1, "prefill")
    world.say(Prefilled(1, 9, -5, None, handle(), number, number))
    world.add(2)
    world.say(Decoding(2, BIG, "tcp", -(2**60), number, None, "p", "x" * 5000))
    for metric in ("baton_prefill_seconds_sum", "baton_prefill_queue_seconds_sum"):
        value = world.metrics.registry.get_sample_value(metric, {"model": "m"})
        assert value is not None
        assert 0 <= value <= claims.MAX_SECONDS
    took = world.metrics.registry.get_sample_value(
        "baton_kv_transfer_seconds_sum", {"model": "m", "transport": "tcp"}
    )
    assert took is not None
    assert 0 <= took <= claims.MAX_SECONDS
    assert world.attempts.live[2].choice.cached_tokens == 0
    assert len(world.metrics.pairs.for_people()[0]["reason"]) <= claims.MAX_TEXT


def test_words_of_workers_make_no_labels_without_end(world: World) -> None:
    for number in range(300):
        world.add(number)
        world.say(Decoding(number, 0, f"transport{number}", 1, 0.1, None, "p"))
        world.say(Refused(number, f"reason {number}"))
    kinds = {
        sample.labels["transport"]
        for metric in world.metrics.transfers.collect()
        for sample in metric.samples
    }
    assert len(kinds) <= claims.MAX_LABELS + 1
    causes = {
        sample.labels["cause"]
        for metric in world.metrics.notes.collect()
        for sample in metric.samples
        if sample.labels["kind"] == "refused"
    }
    assert causes == {"other"}
    assert Labels(2).of("<script>") == "other"


@pytest.mark.parametrize(
    "bent",
    [
        {"worker": "other"}, {"incarnation": "other"}, {"handle_id": ""}, {"handle_id": "h" * 200},
        {"lease_s": math.nan}, {"lease_s": -1.0}, {"lease_s": math.inf}, {"lease_s": 0.0},
    ],
)  # fmt: skip
def test_a_handle_of_somebody_else_or_without_a_lease_is_not_held(
    world: World, bent: dict[str, Any]
) -> None:
    world.add(1, "prefill")
    fields = {name: getattr(handle(), name) for name in KvHandle.__struct_fields__}
    lie = KvHandle(**{**fields, **bent})
    world.say(Accepted(1, lie), Prefilled(1, 2, 0, None, lie))
    assert [type(event) for event in world.fed] == [ev.AttemptFailed, ev.AttemptFailed]


def test_progress_that_does_not_move_on_is_none() -> None:
    honest = Advance()
    assert all(honest.moved(done, 10) for done in range(1, 11))
    assert honest.moved(2, 10), "preempted: it begins anew"
    stuck = Advance()
    assert [stuck.moved(3, 9) for _ in range(5)] == [True, False, False, False, False]
    for lie in ((-1, 5), (9, 5), (1, BIG), (BIG, BIG)):
        assert not Advance().moved(*lie)
    waiting = Advance()
    said = [waiting.moved(0, 0) for _ in range(MAX_WAITS + 5)]
    assert said == [True] * MAX_WAITS + [False] * 5
    assert waiting.moved(0, 7), "its turn has come"
    swaying = Advance()
    assert sum(swaying.moved(number % 2, 9) for number in range(1000)) < 200


def test_long_words_are_cut(world: World) -> None:
    world.add(1)
    world.say(Failed(1, "decode", "engine", "x" * 100_000))
    [failed] = [event for event in world.fed if isinstance(event, ev.AttemptFailed)]
    assert len(failed.message) == claims.MAX_TEXT


# -- a whole fleet


REPORTS = [
    LoadReport(0, 0, 64, free, 0, 0, steps, kv)
    for free in (-BIG, -1, 0, 1, 64, BIG)
    for steps in (0, -5, BIG)
    for kv in (0, -1, BIG)
] + [
    LoadReport(BIG, -BIG, -5, 3, BIG, -1, 0, 0), LoadReport(-1, -1, 0, 0, 0, 0, 0, 0),
    LoadReport(1, 0, BIG, BIG, 0, 0, 1, 5, {"router": BIG}), LoadReport(0, 0, 64, 64, 0, 0, 9, 0),
]  # fmt: skip


async def serve(worker: WireWorker, heard: Callable[[], None]) -> None:
    """An honest worker of both roles: eight tokens for every job, which name job and place."""
    done = 0
    while True:
        jobs = [job for job in worker.jobs if isinstance(job, Prefill | Decode)]
        for job in jobs[done:]:
            have = len(job.output) // 4
            deltas = [
                Delta(job.attempt, index, [index], "x", "length" if index == 7 else "")
                for index in range(have, 8)
            ]
            worker.say(Decoding(job.attempt), StepFrame(deltas))
        done = len(jobs)
        heard()
        worker.changed.clear()
        await worker.changed.wait()


def lies(rng: random.Random, attempts: list[int], number: int) -> list[Out]:
    """Well-formed messages that make no sense, some about attempts that exist."""
    told: list[Out] = []
    for _ in range(rng.randrange(1, 5)):
        attempt = rng.choice([*attempts, rng.randrange(40), BIG, -1])
        index = rng.choice([0, 1, 3, 7, 8, BIG, -1])
        ids = rng.choice([[1], [1, 2, 3], [], [-1], [BIG], list(range(50))])
        bent = KvHandle(
            rng.choice(["h", "", "x" * 300]), rng.choice(["liar", "good"]),
            rng.choice(["lie", "inc"]), 16, 4, b"h" * 16, rng.choice([30.0, -1.0, math.nan]), [],
        )  # fmt: skip
        word = Delta(attempt, index, ids, "lie", rng.choice(["", "", "stop"]))  # type: ignore[arg-type]
        told.append(
            rng.choice([
                StepFrame([word] * rng.randrange(1, 4)), Accepted(attempt, bent), Accepted(attempt),
                Refused(attempt, "no"), Prefilled(attempt, -3, BIG, word, bent, math.nan, -1.0),
                Prefilled(attempt, 16, 0, None, bent),
                Decoding(attempt, -1, f"t{number}", -BIG, math.inf, None, "good"),
                Progress(attempt, "prefill", rng.choice([-1, 5, BIG]), 9),
                Failed(attempt, "decode", rng.choice(["engine", "lease_lost", "aborted"]), "x"),
            ])
        )  # fmt: skip
    return told


async def lie_about(world: DispatchWorld, liar: WireWorker, rng: random.Random, n: int) -> None:
    """Under its own name and subject, with any incarnation; and a report, and KV events."""
    attempts = list(world.dispatch._attempts.live)
    incarnation = rng.choice(["lie", "inc", "dead"])
    seq = rng.choice([n, n + 100, 1, BIG, -4])
    envelope = OutEnvelope("liar", incarnation, seq, lies(rng, attempts, n))
    liar.bus.publish(SUBJECTS.out("router", "liar"), encode(envelope))
    name, process = rng.choice([("liar", "lie"), ("liar", "lie"), ("liar", "ghost")])
    world.dispatch.feed(ev.WorkerReported(name, process, rng.choice(REPORTS)))
    first = rng.choice([0, 1, n, BIG, -9])
    stored = KvEvents(first, [KvStored(rng.randbytes(16 * rng.randrange(200)))])
    world.dispatch.feed(ev.KvChanged("liar", "lie", stored.first_id, stored.events))
    await world.settle()


@pytest.mark.parametrize("seed", range(6))
async def test_a_liar_harms_only_what_it_was_given(seed: int) -> None:
    rng = random.Random(seed)
    async with dispatching(LIMITS) as world:
        good = await world.worker("good", "both")
        liar = await world.worker("liar", "both", "lie")
        server = asyncio.create_task(serve(good, lambda: None))
        clients = []
        for number in range(24):
            clients.append(world.submit(f"q{number}/0"))
            await lie_about(world, liar, rng, number)
            world.report(good)
            world.dispatch.scheduler.validate()
        world.dispatch.feed(ev.WorkerUnlisted("liar", "lie"))
        world.dispatch.feed(ev.WorkerUnreachable("liar", "lie"))
        world.dispatch.feed(ev.WorkerLeaving("liar", "lie"))
        for number in range(200):
            if all(client.over for client in clients):
                break
            await lie_about(world, liar, rng, number)
            world.report(good)
            await asyncio.sleep(0.01)
        server.cancel()
        assert all(client.over for client in clients), "a choice that never ended"
        honest = 0
        for client in clients:  # the client itself asserts order, and one end
            assert len(client.ids) <= 8
            legs = world.dispatch.scheduler.past(client.spec.choice).legs
            if all(leg.worker == "good" for leg in legs):
                honest += 1
                assert (client.error, client.text) == (None, "x" * 8)
        assert honest > 0
        assert not world.dispatch.num_inflight
        index = world.dispatch.scheduler._t.fleet.index
        index.validate()
        assert index.num_pairs <= 2 * 64 * 2


async def test_a_choice_on_the_honest_worker_hears_none_of_it() -> None:
    """All of the liar's words are about attempts that it does not own."""
    rng = random.Random(3)
    async with dispatching(LIMITS) as world:
        good = await world.worker("good", "both")
        client = world.submit("q/0")
        await good.job(Decode)
        liar = await world.worker("liar", "prefill", "lie")
        for number in range(60):
            await lie_about(world, liar, rng, number)
        assert client.ids == []
        assert not client.over
        server = asyncio.create_task(serve(good, lambda: None))
        await client.end()
        server.cancel()
        assert (client.error, client.text) == (None, "x" * 8)


async def test_a_worker_that_only_answers_does_not_keep_a_choice() -> None:
    """It says for ever that it decodes, and its engine seems to step: no token comes."""
    limits = Limits(
        accept_timeout_s=5.0, stall_timeout_s=0.05, replay_timeout_s=0.05, silence_timeout_s=60.0
    )
    async with dispatching(limits) as world:
        liar = await world.worker("liar", "both", "lie")
        client = world.submit("q/0")
        job = await liar.job(Decode)
        assert isinstance(job, Decode)
        good = await world.worker("good", "both")
        server = asyncio.create_task(serve(good, lambda: None))
        async with asyncio.timeout(PATIENCE_S):
            while not client.over:
                liar.say(Decoding(job.attempt), Accepted(job.attempt))
                await world.settle()
                await asyncio.sleep(0.002)
        server.cancel()
        assert (client.error, client.text) == (None, "x" * 8)


async def test_a_worker_under_another_ones_incarnation_breaks_no_books() -> None:
    """Incarnations are no secret: the registry's value of the liar names the honest one's."""
    async with dispatching(LIMITS) as world:
        good = await world.worker("good", "both")
        await world.worker("liar", "both", "inc")
        world.dispatch.scheduler.validate()
        server = asyncio.create_task(serve(good, lambda: None))
        world.dispatch.feed(ev.WorkerLeaving("liar", "inc"))
        world.dispatch.scheduler.validate()
        client = world.submit("q/0")
        await client.end()
        world.dispatch.feed(ev.WorkerUnlisted("liar", "inc"))
        world.dispatch.feed(ev.WorkerLeaving("good", "inc"))
        world.dispatch.scheduler.validate()
        server.cancel()
        assert (client.error, client.text) == (None, "x" * 8)
