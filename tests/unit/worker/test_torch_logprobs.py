"""Log-probabilities, penalties and grammars on the torch engine, against `transformers`."""

import json
import math
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from torch import Tensor

import baton
from protocol.out import TokenLogprob
from protocol.sampling import Sampling
from tests.unit.worker.engine_world import Attempt, new_key
from tests.unit.worker.tiny_llama import (
    BLOCK,
    TorchWorld,
    make_model,
    prompt_of,
    reference,
    running,
    sampling_of,
)
from text.assets import load_assets
from text.tokenizer import Tokenizer
from worker.engine import torch_logprobs
from worker.engine.base import DecodeJob, PrefillJob
from worker.engine.runner import Chunk, Scores
from worker.engine.torch_logprobs import score, score_prompt
from worker.engine.torch_sampling import sample

DEMO = Path(baton.__file__).parent / "demo_model"
CLOSE = 1e-4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("logprobs") / "model")


def submit(world: TorchWorld, prompt: Sequence[int], sampling: Sampling, **rest: Any) -> Any:
    key = new_key()
    job = DecodeJob(key, "choice/0", array("I", prompt), sampling, **rest)
    world.stepper.submit(job)
    return key


async def answer(world: TorchWorld, prompt: Sequence[int], sampling: Sampling) -> Attempt:
    attempt = await world.recorder.over(submit(world, prompt, sampling))
    assert attempt.failed is None
    return attempt


def close(found: TokenLogprob | None, row: Tensor, token: int, num_top: int) -> None:
    """`row` is the reference's log-probabilities."""
    assert found is not None
    assert math.isclose(found.logprob, float(row[token]), abs_tol=CLOSE)
    assert len(found.top) == num_top
    best = row.topk(max(num_top, 1)).values.tolist()[:num_top]
    for (one, value), other in zip(found.top, best, strict=True):
        assert math.isclose(value, other, abs_tol=CLOSE)
        assert math.isclose(value, float(row[one]), abs_tol=CLOSE)


def test_scores_are_log_softmax_with_ties_by_the_lower_id() -> None:
    logits = torch.tensor([[1.0, 3.0, 3.0, 0.0, 3.0], [0.0, 0.0, 0.0, 0.0, 0.0]])
    first, second = score(logits, [3, 4], 2)
    rows = logits.double().log_softmax(-1)
    assert [token for token, _ in first.top] == [1, 2]
    assert math.isclose(first.logprob, float(rows[0, 3]), abs_tol=1e-6)
    assert [token for token, _ in second.top] == [0, 1]
    assert [one.top for one in score(logits, [0, 0], 0)] == [[], []]
    assert [len(one.top) for one in score(logits, [0, 0], 99)] == [5, 5]


def test_only_rows_that_ask_are_scored_and_before_any_option() -> None:
    logits = torch.stack([torch.randn(30, generator=torch.Generator().manual_seed(1))] * 3)
    hard = Sampling(9, temperature=1.5, logit_bias={4: 50.0}, min_p=0.5)
    asked = Scores(num_top=1)
    chunks = [
        Chunk([0], [1], 0, True, hard, 0),
        Chunk([0], [1], 0, True, hard, 0, scores=asked),
        Chunk([0], [1], 0, True, hard, 0, scores=Scores(prompt_num_top=2)),
    ]
    raw = logits[1].clone()
    assert sample(logits, chunks, frozenset()) == [4, 4, 4]
    assert asked.sampled is not None
    assert math.isclose(asked.sampled.logprob, float(raw.log_softmax(-1)[4]), abs_tol=1e-6)
    assert asked.sampled.top[0][0] == int(raw.argmax())
    assert chunks[2].scores is not None
    assert chunks[2].scores.sampled is None


@pytest.mark.parametrize("cut", [[30], [1] * 30, [7, 16, 7], [4, 4, 22]])
@pytest.mark.parametrize("num_prompt", [1, 2, 17, 30])
def test_prompt_is_scored_in_any_chunks_and_bounded_pieces(
    cut: list[int], num_prompt: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each position once, by the row before it, with few rows of logits at a time."""
    vocab = 50
    monkeypatch.setattr(torch_logprobs, "_MAX_NUMBERS", 3 * vocab)
    hidden = torch.randn(30, vocab, generator=torch.Generator().manual_seed(2))
    history = prompt_of(30, vocab=vocab)
    found: list[TokenLogprob] = []
    start, most = 0, 0

    def to_logits(rows: Tensor) -> Tensor:
        nonlocal most
        most = max(most, len(rows))
        return rows

    for count in cut:
        scores = Scores(prompt_num_top=2, prompt_from=len(found) + 1)
        ids = history[start : start + count]
        chunk = Chunk([0], ids, start, False, Sampling(9), 0, 0, history, num_prompt, scores=scores)
        assert len(chunk.scored) == len(range(len(found) + 1, min(start + count + 1, num_prompt)))
        score_prompt(chunk, hidden[start : start + count], to_logits, vocab)
        found += scores.prompt
        start += count
    assert most <= 3
    assert len(found) == num_prompt - 1
    rows = hidden.log_softmax(-1)
    for position, one in enumerate(found, 1):
        close(one, rows[position - 1], history[position], 2)


async def test_output_logprobs_are_those_of_transformers(folder: Path) -> None:
    async with running(folder) as world:
        for length in (1, 17, 60):
            prompt = prompt_of(length)
            sampling = Sampling(10, temperature=0.9, seed=5, top_p=0.8, logprobs=5, ignore_eos=True)
            found = await answer(world, prompt, sampling)
            rows = reference(folder).logits([*prompt, *found.ids]).log_softmax(-1)
            for delta in found.deltas:
                assert delta.logprobs is not None
                close(delta.logprobs[0], rows[length + delta.index - 1], delta.ids[0], 5)


async def test_prompt_logprobs_are_those_of_transformers(folder: Path) -> None:
    """In chunks, with a warm cache, and beside a plain answer."""
    async with running(folder, max_step_tokens=24) as world:
        for length in (1, 2, 16, 17, 100):
            prompt = prompt_of(length, salt=length)
            rows = reference(folder).logits(prompt).log_softmax(-1)
            for _ in range(2):
                plain = submit(world, prompt_of(40), sampling_of(8))
                key = submit(world, prompt, sampling_of(3, prompt_logprobs=3))
                decoding = (await world.recorder.over(key)).decoding
                assert decoding is not None
                assert decoding.prompt_logprobs is not None
                assert len(decoding.prompt_logprobs) == length
                assert decoding.prompt_logprobs[0] is None
                for position in range(1, length):
                    close(
                        decoding.prompt_logprobs[position],
                        rows[position - 1],
                        prompt[position],
                        3,
                    )
                assert (await world.recorder.over(plain)).failed is None


async def test_prompt_that_is_put_back_half_way_is_scored_once(folder: Path) -> None:
    """Three answers grow into the blocks of the one whose prompt is being scored."""
    async with running(folder, max_step_tokens=4, num_blocks=13) as world:
        # All three need another block when the long prompt is about half done.
        prompts = [prompt_of(BLOCK + more, salt=more) for more in (1, 2, 4)]
        prompts.append(prompt_of(6 * BLOCK - 3))
        sampling = sampling_of(2 * BLOCK, prompt_logprobs=1, logprobs=1)
        keys = [submit(world, prompt, sampling) for prompt in prompts]
        for prompt, key in zip(prompts, keys, strict=True):
            attempt = await world.recorder.over(key)
            assert attempt.decoding is not None
            found = attempt.decoding.prompt_logprobs
            assert found is not None
            assert len(found) == len(prompt)
            rows = reference(folder).logits([*prompt, *attempt.ids]).log_softmax(-1)
            for position in range(1, len(prompt)):
                close(found[position], rows[position - 1], prompt[position], 1)
            for delta in attempt.deltas:
                assert delta.logprobs is not None
                close(delta.logprobs[0], rows[len(prompt) - 1 + delta.index], delta.ids[0], 1)
        assert world.stepper.stats().preemptions > 0


def penalised(
    folder: Path, prompt: Sequence[int], sampling: Sampling, num_tokens: int
) -> tuple[list[int], list[float]]:
    """Greedy with penalties over the reference's logits, token by token, and the margins."""
    ids, margins = list(prompt), []
    for _ in range(num_tokens):
        row = reference(folder).logits(ids)[-1]
        for token, bias in sampling.logit_bias.items():
            row[token] += bias
        for token in set(ids):
            penalty = sampling.repetition_penalty
            row[token] = row[token] * penalty if row[token] < 0 else row[token] / penalty
        for token in ids[len(prompt) :]:
            row[token] -= sampling.frequency_penalty
        for token in set(ids[len(prompt) :]):
            row[token] -= sampling.presence_penalty
        best = row.topk(2).values
        margins.append(float(best[0] - best[1]))
        ids.append(int(row.argmax()))
    return ids[len(prompt) :], margins


async def test_penalties_hold_over_the_legs_and_over_a_resume(folder: Path) -> None:
    sampling = sampling_of(
        16, repetition_penalty=1.3, presence_penalty=0.4, frequency_penalty=0.3,
        logit_bias={7: 1.5, 11: -2.0},
    )  # fmt: skip
    prompt = prompt_of(20)
    wanted, margins = penalised(folder, prompt, sampling, 16)
    assert min(margins) > 1e-4
    plain = sampling_of(16)
    async with running(folder) as world:
        assert (await answer(world, prompt, plain)).ids != wanted
        assert (await answer(world, prompt, sampling)).ids == wanted
        key = new_key()
        world.stepper.submit(PrefillJob(key, "choice/0", array("I", prompt), sampling))
        prefilled = (await world.recorder.over(key)).prefilled
        assert prefilled is not None
        assert prefilled.first is not None
        assert prefilled.handle is not None
        assert prefilled.first.ids == wanted[:1]
        world.stepper.release([prefilled.handle.handle_id])
        key = submit(world, prompt, sampling, output_ids=wanted[:7])
        assert (await world.recorder.over(key)).ids == wanted[7:]


async def test_demo_model_obeys_a_schema() -> None:
    """Whatever it would rather say, drawn and greedy."""
    schema = {
        "type": "object",
        "properties": {
            "city": {"enum": ["Paris", "Rome"]},
            "ok": {"type": "boolean"},
            "code": {"type": "string", "pattern": "^[a-z]{2,4}$"},
        },
        "required": ["city", "ok", "code"],
        "additionalProperties": False,
    }
    tokenizer = Tokenizer.from_assets(load_assets(DEMO))
    prompt = tokenizer.encode("Tell me about", add_special_tokens=True)
    async with running(DEMO, max_step_tokens=64) as world:
        base = Sampling(200, grammar=json.dumps(schema), logprobs=0)
        keys = [
            submit(world, prompt, msgspec.structs.replace(base, temperature=heat, seed=seed))
            for seed, heat in enumerate((0.0, 0.7, 1.0, 2.0))
        ]
        for key in keys:
            attempt = await world.recorder.over(key)
            assert attempt.finish == "stop"
            found = json.loads(attempt.text)
            assert set(found) == {"city", "ok", "code"}
            assert found["city"] in ("Paris", "Rome")
            assert isinstance(found["ok"], bool)
            assert 2 <= len(found["code"]) <= 4
