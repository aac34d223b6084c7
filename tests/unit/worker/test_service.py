"""The service over a bus in memory: jobs are idempotent, and nobody works for no one."""

import asyncio
import logging
from collections.abc import AsyncIterator

import pytest

from protocol.codec import decode_pong, decode_snapshot, encode
from protocol.jobs import (
    Cancel,
    Done,
    GetAssets,
    GetKvSnapshot,
    JobEnvelope,
    Ping,
    Prefill,
    Release,
    Renew,
    Replay,
    Tokens,
)
from protocol.out import (
    Accepted,
    Decoding,
    Failed,
    Prefilled,
    Progress,
    Refused,
    StepFrame,
)
from tests.unit.worker.service_world import (
    ASSETS,
    INCARNATION,
    PATIENCE_S,
    SAMPLING,
    SUBJECTS,
    WORKER,
    ServiceWorld,
    decode,
    delta_of,
    handle_of,
    key_of,
    made,
    prefill,
)
from text.assets import encode as encode_assets
from worker.engine.base import DecodingInfo, EngineError, PrefillResult
from worker.service import EXIT_UNHEALTHY
from worker.telemetry import CHANGE_S


@pytest.fixture
async def world() -> AsyncIterator[ServiceWorld]:
    world = await made()
    yield world
    world.service.close()
    for bus in [*world.buses, world.bus]:
        await bus.close()


def lent(attempt: int) -> PrefillResult:
    return PrefillResult(2, 0, delta_of(attempt, 0), handle_of(f"h{attempt}"))


# -- jobs


async def test_a_repeated_job_is_run_once_and_says_its_state_again(world: ServiceWorld) -> None:
    assert await world.router.tell(decode(1), decode(1)) == [Accepted(1)]
    assert len(world.engine.submitted) == 1
    world.service.decoding(key_of(1), DecodingInfo())
    world.service.step([(key_of(1), delta_of(1, 0))])
    again = await world.router.tell(decode(1))
    assert again == [Decoding(1), StepFrame([delta_of(1, 0)])] * 2
    assert len(world.engine.submitted) == 1


async def test_accepted_is_said_only_when_no_better_answer_comes_soon(world: ServiceWorld) -> None:
    assert await world.router.tell(prefill(1), prefill(2)) == []
    world.service.prefilled(key_of(1), lent(1))
    await world.router.until(lambda: len(world.router.outs) == 2)
    assert [type(out) for out in world.router.outs] == [Prefilled, Accepted]
    assert world.router.outs[1] == Accepted(2)


async def test_a_handle_is_told_though_the_job_was_accepted_before(world: ServiceWorld) -> None:
    await world.router.tell(prefill(1))
    await world.router.until(lambda: world.router.outs == [Accepted(1)])
    world.service.accepted(key_of(1), handle_of("early"))
    world.service.prefilled(key_of(1), PrefillResult(2, 0, delta_of(1, 0), None))
    replayed = await world.router.tell(Replay(1, 0))
    assert replayed[-2] == Accepted(1, handle_of("early"))
    assert isinstance(replayed[-1], Prefilled)


async def test_replay_repeats_the_outcome_and_the_deltas_asked_for(world: ServiceWorld) -> None:
    await world.router.tell(decode(1))
    world.service.decoding(key_of(1), DecodingInfo(transport="shm", transfer_bytes=9))
    for index in range(4):
        world.service.step([(key_of(1), delta_of(1, index, finish=index == 3))])
    await world.router.settle()
    said = [Decoding(1, 0, "shm", 9), StepFrame([delta_of(1, 2), delta_of(1, 3, finish=True)])]
    assert await world.router.tell(Replay(1, 2)) == said


async def test_replay_of_a_prefill_repeats_the_handle_that_is_lent(world: ServiceWorld) -> None:
    await world.router.tell(prefill(1))
    world.hub.drop_next(1, SUBJECTS.out("r", WORKER))
    world.service.prefilled(key_of(1), lent(1))
    await world.router.settle()
    assert world.router.outs == []
    (out,) = await world.router.tell(Replay(1, 0))
    assert isinstance(out, Prefilled)
    assert out.handle == handle_of("h1")
    assert world.engine.released == []


async def test_replay_of_an_unknown_attempt_says_so(world: ServiceWorld) -> None:
    (out,) = await world.router.tell(Replay(9, 0))
    assert isinstance(out, Failed)
    assert (out.attempt, out.code) == (9, "unknown_attempt")


async def test_done_forgets_and_leaves_the_handle_alone(world: ServiceWorld) -> None:
    await world.router.tell(prefill(1))
    world.service.prefilled(key_of(1), lent(1))
    await world.router.tell(Done([1]))
    assert len(world.service.outbox) == 0
    assert world.engine.cancelled == world.engine.released == []


async def test_done_for_what_still_runs_stops_it(world: ServiceWorld) -> None:
    await world.router.tell(decode(1), Done([1]))
    assert world.engine.cancelled == [key_of(1)]


async def test_a_record_whose_done_was_lost_goes_after_the_linger(world: ServiceWorld) -> None:
    await world.router.tell(decode(1), decode(2))
    world.service.step([(key_of(1), delta_of(1, 0, finish=True))])
    for _ in range(59):
        world.router.beat()
        await world.router.settle()
        world.sweep_for(1)
    assert len(world.service.outbox) == 2
    world.sweep_for(2)
    assert len(world.service.outbox) == 1
    assert world.engine.cancelled == []


@pytest.mark.parametrize("phase", ["queued", "prefilled", "decoding", "ended", "unknown"])
async def test_cancel_in_every_phase_leaves_no_record(world: ServiceWorld, phase: str) -> None:
    if phase != "unknown":
        await world.router.tell(prefill(1) if phase == "prefilled" else decode(1))
    if phase == "prefilled":
        world.service.prefilled(key_of(1), lent(1))
    if phase in ("decoding", "ended"):
        world.service.decoding(key_of(1), DecodingInfo())
        world.service.step([(key_of(1), delta_of(1, 0, finish=phase == "ended"))])
    await world.router.settle()
    before = len(world.router.outs)
    await world.router.tell(Cancel(1))
    assert world.engine.cancelled == [key_of(1)]
    assert len(world.service.outbox) == 0
    assert len(world.router.outs) == before


async def test_a_prefill_that_ends_after_its_cancel_gives_its_blocks_back(
    world: ServiceWorld,
) -> None:
    await world.router.tell(prefill(1), Cancel(1))
    world.service.prefilled(key_of(1), lent(1))
    assert world.engine.released == ["h1"]
    assert await world.router.tell() == []


async def test_handles_are_renewed_and_released_by_name(world: ServiceWorld) -> None:
    await world.router.tell(Renew(["a", "b"]), Release(["a"]))
    assert (world.engine.renewed, world.engine.released) == (["a", "b"], ["a"])


async def test_a_draining_worker_refuses_new_jobs_and_answers_for_old_ones(
    world: ServiceWorld,
) -> None:
    await world.router.tell(decode(1))
    world.service.refuse("draining")
    assert await world.router.tell(decode(2)) == [Refused(2, "draining")]
    assert await world.router.tell(decode(1)) == [Accepted(1)]
    assert (await world.reports())[-1].draining


async def test_a_job_of_the_wrong_role_is_refused() -> None:
    for role, job in (("prefill", decode(1)), ("decode", prefill(1))):
        world = await made(role)  # type: ignore[arg-type]
        assert await world.router.tell(job) == [Refused(1, "wrong_role")]
        for bus in [*world.buses, world.bus]:
            await bus.close()


async def test_more_open_jobs_than_the_bound_are_refused(
    world: ServiceWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("worker.service.MAX_OPEN", 2)
    assert await world.router.tell(decode(1), decode(2), decode(3)) == [Refused(3, "full")]
    world.service.step([(key_of(1), delta_of(1, 0, finish=True))])
    await world.router.settle()
    assert await world.router.tell(decode(4)) == []


async def test_token_ids_that_are_none_fail_the_job_at_once(world: ServiceWorld) -> None:
    (out,) = await world.router.tell(Prefill(1, "c/0", Tokens(b"123"), SAMPLING))
    assert isinstance(out, Failed)
    assert (out.leg, out.code) == ("prefill", "invalid_request")
    assert world.service.num_bad == 1


async def test_a_job_that_breaks_the_engine_does_not_take_the_others_with_it(
    world: ServiceWorld, caplog: pytest.LogCaptureFixture
) -> None:
    world.engine.crash = RuntimeError("boom")
    await world.router.tell(decode(1), Release(["h"]))
    assert world.engine.released == ["h"]
    assert "job failed router=r job=Decode" in caplog.text


# -- questions


async def test_ping_assets_and_snapshot_are_answered(world: ServiceWorld) -> None:
    subject = SUBJECTS.jobs(WORKER, INCARNATION)

    async def ask(job: Ping | GetAssets | GetKvSnapshot) -> bytes:
        body = encode(JobEnvelope("r", [job]))
        return (await world.router.bus.request(subject, body, timeout_s=PATIENCE_S)).payload

    pong = decode_pong(await ask(Ping()))
    assert (pong.worker, pong.incarnation) == (WORKER, INCARNATION)
    assert await ask(GetAssets(ASSETS.digest)) == encode_assets(ASSETS)
    assert await ask(GetAssets("other")) == b""
    snapshot = decode_snapshot(await ask(GetKvSnapshot()))
    assert (snapshot.last_id, snapshot.hashes) == (7, b"a" * 16 + b"b" * 16)


async def test_rubbish_is_counted_and_said_once_a_minute(
    world: ServiceWorld, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "baton.worker")

    async def rubbish(count: int) -> None:
        for _ in range(count):
            world.router.bus.publish(SUBJECTS.jobs(WORKER, INCARNATION), b"\xc1")
            world.router.bus.publish(SUBJECTS.routers, b"rubbish")
        nameless = encode(JobEnvelope("no.name", [Ping()]))
        world.router.bus.publish(SUBJECTS.jobs(WORKER, INCARNATION), nameless)
        await world.router.settle()

    await rubbish(3)
    await rubbish(2)
    assert world.service.num_bad == 12
    assert caplog.text.count("ignored bad messages") == 1
    world.clock.now += 60.0
    await rubbish(1)
    assert caplog.text.count("ignored bad messages") == 2


# -- routers


async def test_a_silent_router_loses_its_jobs_and_others_keep_theirs(world: ServiceWorld) -> None:
    other = await world.another("other")
    await world.router.tell(decode(1))
    await other.tell(decode(1))
    for _ in range(17):
        world.sweep_for(1)
        other.beat()
        await other.settle()
    assert world.engine.cancelled == [key_of(1)]
    assert [world.service.outbox.is_open(key_of(1, name)) for name in ("r", "other")] == [
        False,
        True,
    ]


async def test_nobody_is_silent_while_our_own_bus_is_away(world: ServiceWorld) -> None:
    await world.router.tell(decode(1))
    world.sweep_for(10)
    world.hub.down()
    world.sweep_for(100)
    world.hub.up()
    world.sweep_for(14)
    assert world.engine.cancelled == []
    world.sweep_for(3)
    assert world.engine.cancelled == [key_of(1)]


async def test_a_process_that_stood_still_blames_nobody(world: ServiceWorld) -> None:
    await world.router.tell(decode(1))
    world.clock.now += 3600.0
    world.service.sweep()
    assert world.engine.cancelled == []


async def test_a_router_that_leaves_takes_its_jobs_with_it(world: ServiceWorld) -> None:
    await world.router.tell(decode(1), decode(2))
    world.router.beat(leaving=True)
    await world.router.settle()
    assert world.engine.cancelled == [key_of(1), key_of(2)]
    assert len(world.service.outbox) == 0


async def test_a_router_that_comes_back_is_numbered_on(world: ServiceWorld) -> None:
    """Else it could not see what it misses until the new numbers pass the old ones."""
    await world.router.tell(Replay(1, 0))
    await world.router.tell(Replay(2, 0))
    world.sweep_for(20)
    assert (await world.reports())[-1].last_seq == {}
    await world.router.tell(Replay(3, 0))
    assert world.router.seqs == [1, 2, 3]
    assert (await world.reports())[-1].last_seq == {"r": 3}


# -- envelopes


async def test_one_turn_is_one_envelope_and_numbers_have_no_gap(world: ServiceWorld) -> None:
    await world.router.tell(decode(1), decode(2))
    world.service.decoding(key_of(1), DecodingInfo())
    world.service.decoding(key_of(2), DecodingInfo())
    world.service.step([(key_of(1), delta_of(1, 0)), (key_of(2), delta_of(2, 0))])
    await world.router.settle()
    world.service.step([(key_of(1), delta_of(1, 1))])
    await world.router.settle()
    first, second = world.router.envelopes
    frame = StepFrame([delta_of(1, 0), delta_of(2, 0)])
    assert first.outs == [Decoding(1), Decoding(2), frame]
    assert (first.seq, second.seq) == (1, 2)


async def test_what_the_bus_refuses_uses_up_a_number_that_reports_tell(
    world: ServiceWorld,
) -> None:
    await world.router.tell(decode(1))
    world.bus._pending_bytes = 100  # a full buffer
    text = "x" * 200
    world.service.failed(key_of(1), EngineError("decode", "engine", text))
    await world.router.settle()
    assert world.router.envelopes == []
    world.bus._pending_bytes = 1 << 20
    assert (await world.reports())[-1].last_seq == {"r": 1}
    assert await world.router.tell(Replay(1, 0)) == [Failed(1, "decode", "engine", text)]
    assert world.router.seqs == [2]


async def test_progress_is_told_twice_a_second_at_most(world: ServiceWorld) -> None:
    await world.router.tell(decode(1), prefill(2))
    for step in range(20):
        world.clock.now += 0.1
        world.service.progress(key_of(1), "decode", step, 20)
        world.service.progress(key_of(2), "prefill", step, 20)
        world.service.progress(key_of(3), "prefill", step, 20)
        await world.router.settle()
    told = [out for out in world.router.outs if isinstance(out, Progress)]
    assert 3 <= len([out for out in told if out.attempt == 1]) <= 4
    assert {out.attempt for out in told} == {1, 2}


async def test_reports_carry_the_load(world: ServiceWorld) -> None:
    (report,) = await world.reports()
    assert (report.running, report.num_blocks, report.free_blocks) == (0, 16, 16)


async def test_a_router_that_comes_is_told_at_once_and_a_flood_of_them_is_not(
    world: ServiceWorld,
) -> None:
    told: asyncio.Queue[float] = asyncio.Queue()
    loop = asyncio.get_running_loop()
    await world.router.bus.subscribe(SUBJECTS.all_events, lambda _: told.put_nowait(loop.time()))
    world.router.beat()
    await world.router.settle()
    assert told.empty()  # one that has been here waits for its turn
    times = []
    marks: list[int] = []
    mark = loop.call_later(0.9 * CHANGE_S, lambda: marks.append(told.qsize()))
    async with asyncio.timeout(PATIENCE_S):
        for _ in range(3):
            for _ in range(50):
                world.router.beat(joining=True)
            times.append(await told.get())
            if len(times) == 1:
                assert not marks  # it did not wait
    mark.cancel()
    assert told.empty()
    assert times[2] - times[0] > 1.5 * CHANGE_S


# -- the end


async def test_leaving_aborts_what_runs_so_that_it_moves_at_once(world: ServiceWorld) -> None:
    await world.router.tell(decode(1), prefill(2))
    world.service.prefilled(key_of(2), lent(2))
    world.service.close()
    await world.bus.flush(timeout_s=PATIENCE_S)
    await world.router.settle()
    failed = [out for out in world.router.outs if isinstance(out, Failed)]
    assert [(out.attempt, out.code) for out in failed] == [(1, "aborted")]
    assert world.engine.cancelled == [key_of(1)]


async def test_an_unhealthy_engine_ends_the_process(world: ServiceWorld) -> None:
    world.service.unhealthy("quarantine")
    assert await world.router.tell(decode(1)) == [Refused(1, "unhealthy")]
    async with asyncio.timeout(PATIENCE_S):
        assert await world.exits.get() == EXIT_UNHEALTHY
