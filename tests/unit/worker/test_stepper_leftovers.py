"""Engines with nothing imitated: whatever ends and however, nothing is left behind."""

import asyncio
import threading
from dataclasses import replace

import pytest

from protocol.errors import ConfigError, LocalError
from protocol.handoff import TcpOffer
from protocol.sampling import Sampling
from tests.unit.worker.engine_world import (
    GREEDY,
    PATIENCE_S,
    SMALL,
    new_key,
    prompt_of,
    running,
)
from worker.engine.base import DecodeJob, PrefillJob
from worker.engine.simulated import build_simulated
from worker.engine.stepper import StepperConfig
from worker.transfer.base import Transfer
from worker.transfer.shm import ShmTransfer
from worker.transfer.tcp import TcpTransfer


@pytest.mark.parametrize("kind", ["waiting", "prefilling", "prefilled", "decoding"])
async def test_cancel_leaves_nothing(kind: str) -> None:
    config = replace(SMALL, max_running=1)
    async with running(config, max_running=1) as w:
        if kind == "prefilled":
            key = w.prefill(prompt_of(10))
            await w.over(key)
            assert w.stepper.load().lent_blocks == 3
        else:
            w.runner.shut()
            key = w.decode(prompt_of(10), Sampling(max_tokens=1000))
            await w.runner.entered.wait()
        if kind == "waiting":
            key = w.decode(prompt_of(10), Sampling(max_tokens=1000))
        if kind == "decoding":
            w.runner.open()
            await w.recorder.until(lambda: len(w.recorder.of(key).deltas) > 2)
        w.stepper.cancel(key)
        heard = len(w.recorder.of(key).deltas)
        w.runner.open()
        if kind == "waiting":
            w.stepper.cancel(next(iter(w.recorder.attempts)))
        await w.idle()
        assert len(w.recorder.of(key).deltas) == heard
        assert w.recorder.of(key).failed is None
        assert w.is_clean()


async def test_cancel_of_a_prefilled_attempt_revokes_its_lease() -> None:
    async with running(worker="p") as p, running(worker="d") as d:
        key = p.prefill(prompt_of(10))
        result = (await p.over(key)).prefilled
        assert result is not None
        p.stepper.cancel(key)
        await p.idle()
        assert p.stepper.stats().leases_ended["revoked"] == 1
        pull = d.decode(prompt_of(10), handle=result.handle, output_ids=[97])
        failed = (await d.over(pull)).failed
        assert failed is not None
        assert (failed.leg, failed.code) == ("transfer", "lease_lost")


async def test_job_that_comes_again_while_its_blocks_are_lent_ends_at_once() -> None:
    """The service has forgotten the attempt (`Done`): it waits for a word that must come."""
    async with running() as w:
        key = w.prefill(prompt_of(10))
        await w.over(key)
        w.recorder.attempts.clear()
        w.stepper.submit(PrefillJob(key, "choice/0", prompt_of(10), GREEDY))
        failed = (await w.over(key)).failed
        assert failed is not None
        assert (failed.leg, failed.code) == ("prefill", "aborted")
        assert w.stepper.load().lent_blocks == 3
        w.stepper.cancel(key)


async def test_lease_lives_while_it_is_renewed_and_ends_when_it_is_not() -> None:
    async with running(worker="p", lease_s=30.0) as p:
        result = (await p.over(p.prefill(prompt_of(10)))).prefilled
        assert result is not None
        assert result.handle is not None
        assert result.handle.lease_s == 30.0
        for _ in range(3):
            p.clock.ahead_s += 20.0
            p.stepper.renew([result.handle.handle_id])
            await p.over(p.decode(prompt_of(2), Sampling(max_tokens=1)))
            assert p.stepper.load().lent_blocks == 3
        p.clock.ahead_s += 31.0
        p.stepper.renew([])
        await p.idle()
        assert p.stepper.stats().leases_ended == {"released": 0, "revoked": 0, "expired": 1}


async def test_lease_ends_by_itself_when_nobody_says_anything() -> None:
    async with running(lease_s=0.05) as w:
        await w.over(w.prefill(prompt_of(10)))
        await w.idle()
        assert w.stepper.stats().leases_ended["expired"] == 1


async def test_prefill_waits_for_a_free_lease_slot() -> None:
    async with running(replace(SMALL, num_leases=1)) as w:
        first, second = w.prefill(prompt_of(5)), w.prefill(prompt_of(5, salt=1))
        result = (await w.over(first)).prefilled
        assert result is not None
        assert result.handle is not None
        await w.recorder.until(lambda: w.recorder.of(second).accepted)
        assert w.recorder.of(second).prefilled is None
        w.stepper.release([result.handle.handle_id])
        assert (await w.over(second)).prefilled is not None
        w.stepper.cancel(second)


async def test_those_who_wait_for_a_lease_let_the_pull_pass_that_ends_it() -> None:
    async with running(replace(SMALL, num_leases=1, max_running=1), max_running=1) as w:
        first = w.prefill(prompt_of(5))
        result = (await w.over(first)).prefilled
        assert result is not None
        assert result.first is not None
        second = w.prefill(prompt_of(5, salt=1))
        await w.recorder.until(lambda: w.recorder.of(second).accepted)
        pull = w.decode(prompt_of(5), handle=result.handle, output_ids=result.first.ids)
        assert (await w.over(pull)).failed is None
        w.stepper.release([result.handle.handle_id])
        assert (await w.over(second)).prefilled is not None
        w.stepper.cancel(second)


async def test_drain_waits_for_choices_and_leases() -> None:
    async with running() as w:
        async with asyncio.timeout(PATIENCE_S):
            await w.stepper.drain()
        w.runner.shut()
        decoding = w.decode(prompt_of(10))
        lent = w.prefill(prompt_of(10, salt=1))
        await w.runner.entered.wait()
        async with asyncio.TaskGroup() as group:
            drained = group.create_task(w.stepper.drain())
            w.runner.open()
            await w.over(decoding)
            result = (await w.over(lent)).prefilled
            assert result is not None
            assert result.handle is not None
            await w.over(w.decode(prompt_of(2)))
            assert not drained.done()
            w.stepper.release([result.handle.handle_id])


async def test_crashed_step_fails_all_and_says_so_once() -> None:
    async with running() as w:
        w.healthy = False
        w.runner.shut()
        keys = [w.decode(prompt_of(10, salt=index)) for index in range(3)]
        await w.runner.entered.wait()
        w.runner.crash = ZeroDivisionError("device")
        w.runner.open()
        later = w.decode(prompt_of(4))
        for key in (*keys, later):
            failed = (await w.over(key)).failed
            assert failed is not None
            assert failed.code == "engine"
        assert len(w.recorder.reasons) == 1
        assert "device" in w.recorder.reasons[0]
        await w.idle()
        assert w.is_clean()


async def test_broken_rule_of_our_own_fails_all_and_ends_the_engine() -> None:
    async with running() as w:
        w.healthy = False
        w.runner.shut()
        keys = [w.decode(prompt_of(10)), w.prefill(prompt_of(10))]
        await w.runner.entered.wait()
        w.runner.forgets_a_token = True
        w.runner.open()
        keys.append(w.decode(prompt_of(4)))
        for key in keys:
            failed = (await w.over(key)).failed
            assert failed is not None
            assert failed.code == "engine"
        later = (await w.over(w.decode(prompt_of(4)))).failed
        assert later is not None
        assert later.code == "engine"
        assert len(w.recorder.reasons) == 1
        await w.idle()


async def test_start_that_fails_leaves_nothing_running() -> None:
    async with running(transfers=[TcpTransfer(host="127.0.0.1")]) as w:
        taken = w.stepper
        offer = (await w.over(w.prefill(prompt_of(3)))).prefilled
        assert offer is not None
        assert offer.handle is not None
        (tcp,) = offer.handle.ranks[0].offers
        assert isinstance(tcp, TcpOffer)
        shm = ShmTransfer()
        transfers: list[Transfer] = [shm, TcpTransfer(host="127.0.0.1", port=tcp.port)]
        second = build_simulated(SMALL, transfers, StepperConfig("w", "inc"))
        with pytest.raises(ConfigError):
            await second.start(w.recorder)
        assert not [one for one in threading.enumerate() if one.name.startswith("shm-copy")]
        assert await second.stop()
        with pytest.raises(LocalError):
            await taken.start(w.recorder)
        w.stepper.release([offer.handle.handle_id])


async def test_nothing_is_heard_after_stop_and_misuse_is_told() -> None:
    config = StepperConfig("w", "inc")
    stepper = build_simulated(replace(SMALL, step_s=3600.0), [ShmTransfer()], config)
    with pytest.raises(LocalError, match="not started"):
        stepper.cancel(new_key())
    async with running() as w:
        recorder = w.recorder
    await stepper.start(recorder)
    key = new_key()
    stepper.submit(DecodeJob(key, "c/0", prompt_of(10), GREEDY))
    assert stepper.load().waiting == 1
    async with asyncio.timeout(PATIENCE_S):
        assert await stepper.stop()
    assert not recorder.of(key).deltas


async def test_an_engine_that_hangs_in_its_first_step_does_not_seem_idle() -> None:
    async with running() as w:
        assert (w.stepper.load().running, w.stepper.load().waiting) == (0, 0)
        w.runner.shut()
        first = w.decode(prompt_of(10), Sampling(max_tokens=2))
        await w.runner.entered.wait()
        second = w.decode(prompt_of(10), Sampling(max_tokens=2))
        assert (w.stepper.load().running, w.stepper.load().waiting) == (0, 2)
        w.stepper.cancel(second)
        assert w.stepper.load().waiting == 1
        w.runner.open()
        await w.over(first)
        await w.idle()
        assert (w.stepper.load().running, w.stepper.load().waiting) == (0, 0)


async def test_an_engine_that_hangs_does_not_seem_idle_when_its_jobs_were_taken_away() -> None:
    async with running() as w:
        w.runner.shut()
        only = w.decode(prompt_of(10), Sampling(max_tokens=2))
        await w.runner.entered.wait()
        w.stepper.cancel(only)
        assert w.stepper.load().waiting == 1
        w.runner.open()
        await w.idle()
        assert (w.stepper.load().running, w.stepper.load().waiting) == (0, 0)
