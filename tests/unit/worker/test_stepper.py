"""Engines with nothing imitated: what they say, and that nothing is left behind."""

import asyncio
import threading
from collections.abc import Callable
from dataclasses import replace

import pytest
from msgspec import structs

from protocol.errors import ConfigError, LocalError
from protocol.handoff import TcpOffer
from protocol.sampling import Sampling
from tests.unit.worker.engine_world import (
    GREEDY,
    PATIENCE_S,
    RANDOM,
    SMALL,
    hand_over,
    new_key,
    prompt_of,
    running,
    text_of,
)
from worker.engine.base import DecodeJob, PrefillJob
from worker.engine.simulated import build_simulated, expected_tokens
from worker.engine.stepper import StepperConfig
from worker.transfer.base import Transfer
from worker.transfer.shm import ShmTransfer
from worker.transfer.tcp import TcpTransfer

MAKERS: list[Callable[[], Transfer]] = [ShmTransfer, lambda: TcpTransfer(host="127.0.0.1")]


@pytest.mark.parametrize("maker", MAKERS, ids=["shm", "tcp"])
@pytest.mark.parametrize("sampling", [GREEDY, RANDOM], ids=["greedy", "random"])
async def test_handed_over_choice_equals_the_expected_one(
    maker: Callable[[], Transfer], sampling: Sampling
) -> None:
    async with (
        running(transfers=[maker()], worker="p") as p,
        running(transfers=[maker()], worker="d") as d,
    ):
        for num_tokens in (1, 3, 4, 5, 8, 33):
            prompt = prompt_of(num_tokens, salt=num_tokens)
            result, attempt = await hand_over(p, d, prompt, sampling)
            wanted = expected_tokens(prompt, sampling, 24, SMALL)
            assert result.first is not None
            assert result.handle is not None
            assert result.prompt_tokens == num_tokens
            assert result.handle.num_tokens == num_tokens
            assert result.first.index == 0
            assert attempt.deltas[0].index == 1
            assert result.first.ids + attempt.ids == wanted
            assert result.first.text + attempt.text == text_of(wanted)
            assert attempt.finish == "length"
            assert attempt.decoding is not None
            assert attempt.decoding.transport == d.info.transports[0]
            num_blocks = -(-num_tokens // SMALL.block_size)
            assert attempt.decoding.transfer_bytes == num_blocks * 4 * 16
        stats = d.stepper.stats()
        assert stats.transfers == {(d.info.transports[0], "ok"): 6}
        assert stats.decoded_tokens == 6 * 23
        await p.idle()
        assert p.stepper.stats().leases_ended == {"released": 6, "revoked": 0, "expired": 0}


async def test_first_transport_that_fits_is_used_and_none_that_fits_fails() -> None:
    async with (
        running(transfers=[TcpTransfer(host="127.0.0.1")]) as p,
        running(transfers=[ShmTransfer(), TcpTransfer(host="127.0.0.1")]) as d,
        running(transfers=[ShmTransfer()]) as other,
    ):
        _, attempt = await hand_over(p, d, prompt_of(9))
        assert attempt.decoding is not None
        assert attempt.decoding.transport == "tcp"
        _, attempt = await hand_over(p, other, prompt_of(9))
        assert attempt.failed is not None
        assert (attempt.failed.leg, attempt.failed.code) == ("transfer", "transfer_failed")
        assert "shm" in attempt.failed.message


async def test_many_choices_at_once_on_both_paths() -> None:
    config = replace(SMALL, num_blocks=256)
    async with running(config, worker="p") as p, running(config, worker="d") as d:
        prompts = [prompt_of(3 + index, salt=index) for index in range(20)]
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(hand_over(p, d, prompt, RANDOM)) for prompt in prompts]
            keys = [d.decode(prompt, RANDOM) for prompt in prompts]
        for prompt, task, key in zip(prompts, tasks, keys, strict=True):
            wanted = expected_tokens(prompt, RANDOM, 24, config)
            result, attempt = task.result()
            assert result.first is not None
            assert result.first.ids + attempt.ids == wanted
            alone = await d.over(key)
            assert (alone.ids, alone.text) == (wanted, text_of(wanted))


async def test_choice_goes_on_from_any_token_with_equal_tokens_and_text() -> None:
    sampling = Sampling(max_tokens=20, temperature=1.0, seed=3, stop=["zzz", "qqq"])
    prompt = prompt_of(10)
    wanted = expected_tokens(prompt, sampling, 20, SMALL)
    async with running(worker="p") as p, running(worker="d") as d:
        whole = await d.over(d.decode(prompt, sampling))
        assert whole.ids == wanted
        for number in range(1, 20):
            sent = "".join(delta.text for delta in whole.deltas[:number])
            given = {"output_ids": wanted[:number], "chars_sent": len(sent)}
            rest = await d.over(d.decode(prompt, sampling, **given))
            assert rest.deltas[0].index == number
            assert (rest.ids, rest.text) == (wanted[number:], whole.text[len(sent) :])
            first = (await p.over(p.prefill(prompt, sampling, **given))).prefilled
            assert first is not None
            assert first.first is not None
            assert first.first.index == number
            assert first.first.ids == wanted[number : number + 1]
            if first.handle is not None:
                p.stepper.release([first.handle.handle_id])


async def test_handle_of_an_older_prefill_serves_a_longer_output() -> None:
    prompt, wanted = prompt_of(10), expected_tokens(prompt_of(10), GREEDY, 24, SMALL)
    async with running(worker="p") as p, running(worker="d") as d:
        result = (await p.over(p.prefill(prompt))).prefilled
        assert result is not None
        assert result.handle is not None
        for number in (0, 1, 7, 20):
            output = wanted[:number]
            key = d.decode(prompt, handle=result.handle, output_ids=output, chars_sent=number)
            assert (await d.over(key)).ids == wanted[number:]
        p.stepper.release([result.handle.handle_id])


async def test_cached_prefix_is_not_computed_again_and_the_tokens_are_equal() -> None:
    async with running() as w:
        for num_tokens, cached in ((13, 12), (12, 8), (4, 0), (1, 0)):
            prompt = prompt_of(num_tokens, salt=num_tokens)
            first = await w.over(w.decode(prompt))
            again = await w.over(w.decode(prompt))
            assert first.decoding is not None
            assert again.decoding is not None
            assert (first.decoding.cached_tokens, again.decoding.cached_tokens) == (0, cached)
            assert first.ids == again.ids == expected_tokens(prompt, GREEDY, 24, SMALL)


async def test_output_is_cached_too_and_salt_keeps_caches_apart() -> None:
    async with running() as w:
        prompt = prompt_of(9)
        first = await w.over(w.decode(prompt))
        longer = prompt + first.ids[:16]
        assert (await w.over(w.decode(longer))).decoding is not None
        assert w.stepper.stats().cached_tokens == 24
        await w.over(w.decode(longer, cache_salt="mine"))
        assert w.stepper.stats().cached_tokens == 24


async def test_only_missing_blocks_are_pulled() -> None:
    async with running(worker="p") as p, running(worker="d") as d:
        prompt = prompt_of(14)
        await d.over(d.decode(prompt[:9]))
        _, attempt = await hand_over(p, d, prompt)
        assert attempt.decoding is not None
        assert attempt.decoding.transfer_bytes == 2 * 4 * 16
        assert attempt.ids == expected_tokens(prompt, GREEDY, 24, SMALL)[1:]
        again = (await hand_over(p, d, prompt))[1]
        assert again.decoding is not None
        assert again.decoding.transfer_bytes == 4 * 16
        boundary = prompt_of(16)
        await d.over(d.decode(boundary))
        local = (await hand_over(p, d, boundary))[1]
        assert local.decoding is not None
        assert (local.decoding.transport, local.decoding.transfer_bytes) == ("cache", 0)
        assert local.ids == expected_tokens(boundary, GREEDY, 24, SMALL)[1:]


@pytest.mark.parametrize("at", [0, 30, 64 * 4 - 1])
async def test_one_wrong_byte_in_lent_blocks_changes_the_tokens(at: int) -> None:
    prompt = prompt_of(16)
    async with running(worker="p") as p, running(worker="d") as d:
        result = (await p.over(p.prefill(prompt))).prefilled
        assert result is not None
        assert result.handle is not None
        assert result.first is not None
        used = [i for i in range(64) if any(p.arena.block(i))]
        p.arena.block(used[at // 64])[at % 64] ^= 1
        key = d.decode(prompt, handle=result.handle, output_ids=result.first.ids)
        wanted = expected_tokens(prompt, GREEDY, 24, SMALL)
        assert (await d.over(key)).ids != wanted[1:]
        p.stepper.release([result.handle.handle_id])


async def test_wrong_byte_in_the_prefix_cache_changes_the_tokens() -> None:
    async with running() as w:
        prompt = prompt_of(16)
        right = await w.over(w.decode(prompt))
        w.arena.block(0)[5] ^= 1
        assert (await w.over(w.decode(prompt))).ids != right.ids


async def test_too_small_a_pool_preempts_the_youngest_and_all_tokens_are_right() -> None:
    config = replace(SMALL, num_blocks=12)
    sampling = Sampling(max_tokens=30, temperature=1.0, seed=5)
    async with running(config) as w:
        prompts = [prompt_of(6, salt=index) for index in range(6)]
        keys = [w.decode(prompt, sampling) for prompt in prompts]
        for prompt, key in zip(prompts, keys, strict=True):
            attempt = await w.over(key)
            assert attempt.ids == expected_tokens(prompt, sampling, 30, config)
            assert attempt.text == text_of(attempt.ids)
        assert w.stepper.stats().preemptions > 0


async def test_pulled_choice_that_is_preempted_is_computed_again_here() -> None:
    config = replace(SMALL, num_blocks=12)
    async with running(SMALL, worker="p") as p, running(config, worker="d") as d:
        prompts = [prompt_of(8, salt=index) for index in range(4)]
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(hand_over(p, d, prompt)) for prompt in prompts]
        for prompt, task in zip(prompts, tasks, strict=True):
            assert task.result()[1].ids == expected_tokens(prompt, GREEDY, 24, config)[1:]
        assert d.stepper.stats().preemptions > 0


async def test_long_prompt_is_computed_in_chunks_beside_a_decoding_choice() -> None:
    async with running(max_step_tokens=16) as w:
        w.runner.shut()
        short = w.decode(prompt_of(3), Sampling(max_tokens=60))
        await w.runner.entered.wait()
        long = w.prefill(prompt_of(100, salt=1), Sampling(max_tokens=1))
        w.runner.open()
        await w.over(short)
        await w.over(long)
        beside = [step for step in w.runner.steps if len(step) == 2]
        assert [chunk for _, chunk in beside] == [
            (start, min(15, 100 - start), start + 15 >= 100) for start in range(0, 100, 15)
        ]
        assert {chunk[1:] for chunk, _ in beside} == {(1, True)}


async def test_progress_is_told_twice_a_second_at_most() -> None:
    async with running(max_step_tokens=4) as w:
        key = w.prefill(prompt_of(40), Sampling(max_tokens=1))
        assert (await w.over(key)).progress == []
        w.runner.shut()
        key = w.prefill(prompt_of(40, salt=1), Sampling(max_tokens=1))
        await w.runner.entered.wait()
        w.clock.ahead_s += 0.6
        w.runner.open()
        assert (await w.over(key)).progress == [("prefill", 4, 40)]


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


async def test_handle_of_another_prompt_model_or_length_is_refused() -> None:
    other_model = replace(SMALL, name="other")
    async with (
        running(worker="p") as p,
        running(worker="d") as d,
        running(other_model, worker="o") as o,
    ):
        result = (await p.over(p.prefill(prompt_of(10)))).prefilled
        assert result is not None
        assert result.handle is not None
        wrong = [
            (d, prompt_of(10, salt=1), result.handle),
            (d, prompt_of(11), result.handle),
            (d, prompt_of(10), structs.replace(result.handle, ranks=[])),
            (d, prompt_of(10), structs.replace(result.handle, block_size=8)),
            (o, prompt_of(10), result.handle),
        ]
        for world, prompt, handle in wrong:
            failed = (await world.over(world.decode(prompt, handle=handle, output_ids=[9]))).failed
            assert failed is not None
            assert failed.code == "handle_mismatch"
        await d.over(d.decode(prompt_of(12)))
        local = structs.replace(result.handle, num_tokens=12)
        key = d.decode(prompt_of(12), handle=local, output_ids=[9])
        failed = (await d.over(key)).failed
        assert failed is not None
        assert failed.code == "handle_mismatch"
        p.stepper.release([result.handle.handle_id])


async def test_stop_string_ends_and_is_cut_on_both_legs() -> None:
    prompt = prompt_of(10)
    text = text_of(expected_tokens(prompt, GREEDY, 24, SMALL))
    for stop, at in ((text[4:7], 4), (text[0], 0)):
        sampling = Sampling(max_tokens=24, temperature=0.0, stop=[stop])
        async with running() as w:
            attempt = await w.over(w.decode(prompt, sampling))
            assert (attempt.text, attempt.finish) == (text[:at], "stop")
            assert attempt.deltas[-1].stop == stop
            kept = structs.replace(sampling, include_stop=True)
            assert (await w.over(w.decode(prompt, kept))).text == text[: at + len(stop)]
            later = structs.replace(sampling, min_tokens=24)
            assert (await w.over(w.decode(prompt, later))).text == text
    async with running() as w:
        first_letter = Sampling(max_tokens=24, temperature=0.0, stop=[text[0]])
        result = (await w.over(w.prefill(prompt, first_letter))).prefilled
        assert result is not None
        assert result.first is not None
        assert (result.first.finish, result.first.text, result.handle) == ("stop", "", None)


async def test_end_token_is_counted_and_not_shown() -> None:
    config = replace(SMALL, eos_every=5)
    sampling = Sampling(max_tokens=200, temperature=0.0)
    async with running(config) as w:
        wanted = expected_tokens(prompt_of(10), sampling, 200, config)
        attempt = await w.over(w.decode(prompt_of(10), sampling))
        assert attempt.ids == wanted
        assert wanted[-1] == 257
        assert attempt.text == text_of(wanted)
        assert (attempt.finish, attempt.deltas[-1].stop) == ("stop", None)
        again = await w.over(w.decode(prompt_of(10), sampling, output_ids=wanted))
        assert (again.ids, again.finish) == ([], "stop")
        later = structs.replace(sampling, min_tokens=50)
        assert len((await w.over(w.decode(prompt_of(10), later))).ids) > 50


async def test_stop_token_id_ends() -> None:
    wanted = expected_tokens(prompt_of(10), GREEDY, 24, SMALL)
    sampling = Sampling(max_tokens=24, temperature=0.0, stop_token_ids=[wanted[4]])
    async with running() as w:
        attempt = await w.over(w.decode(prompt_of(10), sampling))
        end = wanted.index(wanted[4])
        assert attempt.ids == wanted[: end + 1]
        assert attempt.text == text_of(wanted[:end])
        assert (attempt.finish, attempt.deltas[-1].stop) == ("stop", wanted[4])


async def test_one_token_needs_no_hand_off() -> None:
    async with running() as w:
        one = Sampling(max_tokens=1, temperature=0.0)
        result = (await w.over(w.prefill(prompt_of(10), one))).prefilled
        assert result is not None
        assert result.first is not None
        assert (result.first.finish, result.handle) == ("length", None)
        attempt = await w.over(w.decode(prompt_of(10), one))
        assert attempt.ids == result.first.ids


async def test_full_context_ends_with_length() -> None:
    config = replace(SMALL, max_context=20)
    async with running(config) as w:
        attempt = await w.over(w.decode(prompt_of(10), Sampling(max_tokens=500)))
        assert (len(attempt.ids), attempt.finish) == (10, "length")
    async with running(replace(SMALL, num_blocks=5)) as w:
        assert w.info.capacity.max_context == 20
        attempt = await w.over(w.decode(prompt_of(10), Sampling(max_tokens=500)))
        assert (len(attempt.ids), attempt.finish) == (10, "length")


async def test_bad_jobs_fail_alone() -> None:
    async with running(replace(SMALL, max_context=50)) as w:
        good = w.decode(prompt_of(10))
        bad = {
            w.decode([1, 262]): "invalid_request",
            w.decode([1, -1]): "invalid_request",
            w.decode([]): "invalid_request",
            w.decode([1], output_ids=[97], chars_sent=5): "invalid_request",
            w.decode(prompt_of(50)): "context_length",
            w.prefill(prompt_of(51)): "context_length",
        }
        for key, code in bad.items():
            failed = (await w.over(key)).failed
            assert failed is not None
            assert failed.code == code
        assert (await w.over(good)).ids == expected_tokens(prompt_of(10), GREEDY, 24, SMALL)


async def test_job_that_is_known_is_ignored() -> None:
    async with running() as w:
        key = new_key()
        for _ in range(3):
            w.stepper.submit(DecodeJob(key, "c/0", prompt_of(10), GREEDY))
        assert len((await w.over(key)).ids) == 24
        lent = new_key()
        w.stepper.submit(PrefillJob(lent, "c/0", prompt_of(10), GREEDY))
        await w.over(lent)
        w.stepper.submit(PrefillJob(lent, "c/0", prompt_of(10), GREEDY))
        assert len((await w.over(w.decode(prompt_of(3)))).ids) == 24
        assert w.stepper.load().lent_blocks == 3
        w.stepper.cancel(lent)


async def test_accepted_is_said_only_if_nothing_else_is() -> None:
    async with running(max_step_tokens=4) as w:
        w.runner.shut()
        blocker = w.decode(prompt_of(3))
        await w.runner.entered.wait()
        w.runner.open()
        long = await w.over(w.decode(prompt_of(40)))
        await w.over(blocker)
        assert long.accepted == 1
        assert (await w.over(w.decode(prompt_of(3, salt=2)))).accepted == 0


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


async def test_steps_move_while_there_is_work_and_rest_when_there_is_none() -> None:
    async with running() as w:
        await w.over(w.decode(prompt_of(10)))
        await w.idle()
        before = w.stepper.load().steps
        assert before >= 24
        await w.idle()
        assert w.stepper.load().steps == before


async def test_kv_events_and_snapshot_agree_over_evictions() -> None:
    async with running(replace(SMALL, num_blocks=16)) as w:
        for salt in range(10):
            await w.over(w.decode(prompt_of(14, salt=salt)))
            snapshot = w.stepper.kv_snapshot()
            assert snapshot.last_id == w.recorder.last_event
            assert set(snapshot.hashes) == w.recorder.cached
        assert w.recorder.cached


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
    await recorder.until(lambda: stepper.load().waiting == 0)
    async with asyncio.timeout(PATIENCE_S):
        assert await stepper.stop()
    assert not recorder.of(key).deltas
