"""Engines with nothing imitated: how a choice ends, and which jobs fail alone."""

from dataclasses import replace

from msgspec import structs

from protocol.sampling import Sampling
from tests.unit.worker.engine_world import (
    GREEDY,
    SMALL,
    new_key,
    prompt_of,
    running,
    text_of,
)
from worker.engine.base import DecodeJob
from worker.engine.simulated import expected_tokens


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
