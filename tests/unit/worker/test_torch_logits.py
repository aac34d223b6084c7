"""Biases, penalties and grammar against transformers, and what they leave to be drawn."""

import math
from array import array
from collections import Counter
from collections.abc import Sequence

import msgspec
import pytest
import torch
from torch import Tensor

from protocol.sampling import Sampling
from worker.engine.runner import Chunk
from worker.engine.torch_logits import adjust, is_adjusted
from worker.engine.torch_sampling import sample

VOCAB = 40
PROMPT = [3, 9, 3, 17, 39]
OUTPUT = [5, 9, 5, 5, 0]
ENDS = frozenset({7, 38})


def random_logits(seed: int, *, size: int = VOCAB) -> Tensor:
    return 3.0 * torch.randn(size, generator=torch.Generator().manual_seed(seed))


def bits(allowed: Sequence[int], size: int = VOCAB) -> bytearray:
    mask = bytearray(-(-size // 8))
    for token in allowed:
        mask[token >> 3] |= 1 << (token & 7)
    return mask


def row(
    *, prompt: Sequence[int] = PROMPT, output: Sequence[int] = OUTPUT,
    allowed: bytearray | None = None, index: int | None = None, **changes: object,
) -> Chunk:  # fmt: skip
    sampling = msgspec.structs.replace(Sampling(max_tokens=99), **changes)
    ids = array("I", [*prompt, *output])
    at = len(output) if index is None else index
    return Chunk(
        [0], ids[-1:], len(ids) - 1, True, sampling, at, len(output), ids, len(prompt), allowed
    )


def adjusted(logits: Tensor, chunk: Chunk) -> Tensor:
    logits = logits.clone()
    assert is_adjusted(chunk)
    adjust(logits, chunk, ENDS)
    return logits


def ids_of(chunk: Chunk) -> Tensor:
    return torch.tensor([list(chunk.history)])


def theirs(logits: Tensor, chunk: Chunk) -> Tensor:
    """The scores that transformers' processors leave, in the order of its own `generate`; presence
    and frequency, which it lacks, from their definition."""
    from transformers import (
        LogitsProcessorList,
        MinNewTokensLengthLogitsProcessor,
        MinPLogitsWarper,
        PrefixConstrainedLogitsProcessor,
        RepetitionPenaltyLogitsProcessor,
        SequenceBiasLogitsProcessor,
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )

    s, ids = chunk.sampling, ids_of(chunk)
    scores = logits.unsqueeze(0).clone()
    before = LogitsProcessorList()
    if s.logit_bias:
        bias = [[[token], value] for token, value in s.logit_bias.items()]
        before.append(SequenceBiasLogitsProcessor(bias))
    if s.min_tokens:
        ends = sorted({*ENDS, *s.stop_token_ids})
        before.append(MinNewTokensLengthLogitsProcessor(chunk.num_prompt, s.min_tokens, ends))
    if s.repetition_penalty != 1:
        before.append(RepetitionPenaltyLogitsProcessor(s.repetition_penalty))
    scores = before(ids, scores)
    for token, count in Counter(chunk.history[chunk.num_prompt :]).items():
        scores[0, token] -= s.presence_penalty + count * s.frequency_penalty
    after = LogitsProcessorList()
    if chunk.allowed is not None:
        allowed = chunk.allowed
        able = [i for i in range(8 * len(allowed)) if allowed[i >> 3] >> (i & 7) & 1]
        after.append(PrefixConstrainedLogitsProcessor(lambda batch, sent: able, 1))
    if s.temperature > 0:
        after.append(TemperatureLogitsWarper(s.temperature))
    if s.top_k:
        after.append(TopKLogitsWarper(s.top_k))
    if s.top_p < 1:
        after.append(TopPLogitsWarper(s.top_p))
    if s.min_p:
        after.append(MinPLogitsWarper(s.min_p))
    return after(ids, scores)[0]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    "options",
    [
        {"logit_bias": {5: 4.5, 0: -100.0, 39: 1.25}},
        {"min_tokens": 9, "stop_token_ids": [11]},
        {"repetition_penalty": 1.7},
        {"repetition_penalty": 0.6},
        {"presence_penalty": 1.5},
        {"frequency_penalty": -0.75},
        {"presence_penalty": -0.5, "frequency_penalty": 1.25, "repetition_penalty": 1.3},
        {"logit_bias": {5: 4.5, 9: -3.0}, "repetition_penalty": 1.2, "frequency_penalty": 0.5,
         "presence_penalty": 0.25, "min_tokens": 6},
    ],
)  # fmt: skip
def test_every_option_is_that_of_transformers(seed: int, options: dict[str, object]) -> None:
    logits = random_logits(seed)
    chunk = row(temperature=0.0, **options)
    assert torch.allclose(adjusted(logits, chunk), theirs(logits, chunk), atol=1e-6)


def test_the_order_is_theirs_where_it_matters() -> None:
    """A bias that turns a sign decides whether a penalty multiplies or divides."""
    logits = torch.zeros(VOCAB)
    logits[5] = -2.0
    chunk = row(logit_bias={5: 5.0}, repetition_penalty=2.0, frequency_penalty=0.5)
    assert float(adjusted(logits, chunk)[5]) == (-2.0 + 5.0) / 2.0 - 3 * 0.5


def test_penalties_look_at_what_they_say() -> None:
    """Repetition at prompt and output, presence and frequency at the output alone."""
    logits = torch.full((VOCAB,), 4.0)
    changed = {
        name: set((adjusted(logits, row(**{name: 2.0})) != 4.0).nonzero().view(-1).tolist())
        for name in ("repetition_penalty", "presence_penalty", "frequency_penalty")
    }
    assert changed["repetition_penalty"] == {*PROMPT, *OUTPUT}
    assert changed["presence_penalty"] == changed["frequency_penalty"] == {*OUTPUT}
    assert float(adjusted(logits, row(frequency_penalty=1.0))[5]) == 1.0
    assert float(adjusted(logits, row(presence_penalty=1.0))[5]) == 3.0


def test_the_sequence_may_grow_after_a_step() -> None:
    """No tensor keeps the memory of its array."""
    chunk = row(repetition_penalty=1.5, presence_penalty=0.5)
    adjusted(random_logits(0), chunk)
    assert isinstance(chunk.history, array)
    chunk.history.append(1)
    nothing = row(prompt=[1], output=[], presence_penalty=1.0)
    assert torch.equal(adjusted(random_logits(0), nothing), random_logits(0))


def test_rows_that_ask_for_nothing_are_not_touched() -> None:
    assert not is_adjusted(row())
    assert not is_adjusted(row(min_tokens=5))
    assert not is_adjusted(row(temperature=0.0, top_k=3, top_p=0.5, min_p=0.1, seed=4))


def test_grammar_forbids_what_has_no_bit_and_what_is_beyond() -> None:
    able = [0, 7, 8, 21, 22]
    for size in (23, 24, 33, 40, 64):
        left = adjusted(torch.zeros(VOCAB), row(allowed=bits(able, size)))
        assert (left == 0).nonzero().view(-1).tolist() == able
    short = torch.zeros(20)
    adjust(short, row(allowed=bits([2, 30])), ENDS)
    assert (short == 0).nonzero().view(-1).tolist() == [2]


def test_grammar_wins_over_min_tokens_only_where_nothing_else_is_possible() -> None:
    some = adjusted(torch.zeros(VOCAB), row(min_tokens=9, allowed=bits([7, 12])))
    assert (some == 0).nonzero().view(-1).tolist() == [12]
    only = adjusted(torch.zeros(VOCAB), row(min_tokens=9, allowed=bits([7, 38])))
    assert (only == 0).nonzero().view(-1).tolist() == [7, 38]


def test_greedy_obeys_all_of_it() -> None:
    logits = torch.zeros(VOCAB)
    logits[5], logits[20], logits[21], logits[7] = 9.0, 8.0, 7.0, 20.0
    greedy = {"temperature": 0.0, "min_tokens": 9}

    def of(**changes: object) -> int:
        return sample(logits.unsqueeze(0).clone(), [row(**greedy, **changes)], ENDS)[0]

    assert of() == 5
    assert of(frequency_penalty=0.5) == 20
    assert of(presence_penalty=1.5) == 20
    assert of(repetition_penalty=1.2) == 20
    assert of(logit_bias={21: 5.0}) == 21
    assert of(allowed=bits([21, 22, 7])) == 21


COMBINATIONS: list[dict[str, object]] = [
    {"temperature": 0.7, "min_p": 0.2},
    {"temperature": 1.6, "top_k": 9, "top_p": 0.9, "min_p": 0.05},
    {"temperature": 1.2, "repetition_penalty": 1.4, "top_p": 0.95},
    {"temperature": 1.0, "presence_penalty": 1.0, "frequency_penalty": 0.4, "top_k": 12},
    {"temperature": 0.9, "logit_bias": {1: 2.0, 2: -100.0, 5: 1.0}, "min_p": 0.02},
    {"temperature": 1.3, "min_tokens": 9, "frequency_penalty": -0.3, "top_p": 0.97},
    {"temperature": 1.5, "allowed": bits([1, 2, 3, 5, 7, 30, 31]), "repetition_penalty": 1.5},
]


@pytest.mark.parametrize("options", COMBINATIONS)
def test_draws_are_distributed_as_the_exact_probabilities(options: dict[str, object]) -> None:
    """A G-test over 4000 draws; seeds are fixed, so what passes once passes always."""
    logits = 0.4 * random_logits(12)
    num_draws = 4000
    chunks = [row(seed=23, index=i, **options) for i in range(num_draws)]
    tokens = sample(logits.repeat(num_draws, 1), chunks, ENDS)
    expected = theirs(logits.double(), chunks[0]).softmax(-1)
    counts = Counter(tokens)
    likely = {i: num_draws * float(p) for i, p in enumerate(expected) if p > 0}
    assert set(counts) <= set(likely)
    g = 2 * sum(n * math.log(n / likely[token]) for token, n in counts.items())
    freedom = max(len(likely) - 1, 1)
    # About the 0.9999 quantile of the chi-square distribution (Wilson and Hilferty).
    bound = freedom * (1 - 2 / (9 * freedom) + 3.72 * math.sqrt(2 / (9 * freedom))) ** 3
    assert g < bound, (g, freedom)
    assert sample(logits.repeat(num_draws, 1), chunks, ENDS) == tokens


@pytest.mark.parametrize("min_p", [0.0, 0.05, 0.5, 1.0, 3.0])
@pytest.mark.parametrize("rest", [{}, {"top_k": 6}, {"top_p": 0.7}, {"temperature": 2.0}])
def test_min_p_keeps_what_transformers_keeps(min_p: float, rest: dict[str, object]) -> None:
    from worker.engine.torch_sampling import kept_tokens

    for seed in range(5):
        logits, chunk = random_logits(seed), row(output=[], min_p=min(min_p, 1.0), **rest)
        sampling = msgspec.structs.replace(chunk.sampling, min_p=min_p)
        expected = (theirs(logits, chunk) > -math.inf).nonzero().view(-1).tolist()
        assert kept_tokens(logits, sampling)[0].tolist() == expected
    nothing = torch.full((VOCAB,), math.nan)
    assert len(kept_tokens(nothing, sampling)[0])
