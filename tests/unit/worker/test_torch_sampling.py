import math
from collections import Counter

import msgspec
import pytest
import torch
from torch import Tensor

from protocol.sampling import Sampling
from worker.engine.runner import Chunk
from worker.engine.torch_logits import forbid_end
from worker.engine.torch_sampling import draw, kept_tokens, sample, uniform

VOCAB = 50


def random_logits(seed: int, *, size: int = VOCAB, spread: float = 3.0) -> Tensor:
    return spread * torch.randn(size, generator=torch.Generator().manual_seed(seed))


def chunk(sampling: Sampling, index: int = 0) -> Chunk:
    return Chunk([0], [1], 0, True, sampling, index, index)


def options(**changes: object) -> Sampling:
    return msgspec.structs.replace(Sampling(max_tokens=8), **changes)


def kept(logits: Tensor, **changes: object) -> set[int]:
    return set(kept_tokens(logits, options(**changes))[0].tolist())


def theirs(logits: Tensor, temperature: float, top_k: int, top_p: float) -> tuple[set[int], Tensor]:
    """What transformers' warpers keep, and the probabilities they leave."""
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    rows, ids = logits.unsqueeze(0).double(), torch.zeros(1, 1, dtype=torch.int64)
    rows = TemperatureLogitsWarper(temperature)(ids, rows)
    if top_k:
        rows = TopKLogitsWarper(top_k)(ids, rows)
    if top_p < 1:
        rows = TopPLogitsWarper(top_p)(ids, rows)
    return set((rows[0] > -math.inf).nonzero().view(-1).tolist()), rows[0].softmax(-1)


def test_greedy_is_the_largest_and_the_lowest_id_of_equals() -> None:
    logits = torch.stack([random_logits(1), random_logits(2), torch.zeros(VOCAB)])
    logits[1, [7, 30]] = 99.0
    expected = [int(logits[0].argmax()), 7, 0]
    assert sample(logits, [chunk(options(temperature=0.0))] * 3, frozenset()) == expected


@pytest.mark.parametrize("temperature", [0.3, 1.0, 1.7])
@pytest.mark.parametrize("top_k", [0, 1, 5, VOCAB, 2 * VOCAB])
@pytest.mark.parametrize("top_p", [1.0, 0.9, 0.5, 0.01])
def test_the_tokens_that_are_kept_are_those_of_transformers(
    temperature: float, top_k: int, top_p: float
) -> None:
    for seed in range(5):
        logits = random_logits(seed)
        ids, probabilities = kept_tokens(
            logits, options(temperature=temperature, top_k=top_k, top_p=top_p)
        )
        expected, weights = theirs(logits, temperature, top_k, top_p)
        assert set(ids.tolist()) == expected
        assert ids.tolist() == sorted(expected)
        ours = probabilities / probabilities.sum()
        assert torch.allclose(ours, weights[ids], atol=1e-12)


def test_equals_of_the_last_of_top_k_are_kept_as_transformers_does() -> None:
    logits = torch.tensor([1.0, 5.0, 3.0, 3.0, 3.0, 0.0])
    assert kept(logits, top_k=2) == {1, 2, 3, 4} == theirs(logits, 1.0, 2, 1.0)[0]


def test_top_p_takes_the_lower_id_of_equals() -> None:
    logits = torch.zeros(10)
    assert kept(logits, top_p=0.35) == {0, 1, 2, 3}
    assert kept(logits, top_p=0.3) == {0, 1, 2}
    assert kept(logits, top_p=0.0) == {0}


@pytest.mark.parametrize(
    "changes", [{}, {"temperature": 0.6}, {"top_k": 6}, {"top_p": 0.8}, {"top_k": 9, "top_p": 0.7}]
)
def test_draws_are_distributed_as_softmax_says(changes: dict[str, object]) -> None:
    """Chi-square with a fixed seed: 0.9999 of right samplers pass, and this one always does."""
    logits = random_logits(3, size=12, spread=1.0)
    sampling = options(seed=11, **changes)
    num_draws = 4000
    counts = Counter(draw(logits, sampling, uniform(11, i)) for i in range(num_draws))
    _, expected = theirs(logits, sampling.temperature, sampling.top_k, sampling.top_p)
    likely = [(counts[i], num_draws * float(p)) for i, p in enumerate(expected) if p > 0]
    assert sum(count for count, _ in likely) == num_draws
    chi_square = sum((seen - mean) ** 2 / mean for seen, mean in likely)
    freedom = len(likely) - 1
    assert chi_square < freedom + 3.9 * math.sqrt(2 * freedom) + 4


def test_numbers_are_uniform_and_depend_on_seed_and_index_alone() -> None:
    numbers = [uniform(seed, index) for seed in range(-20, 20) for index in range(100)]
    assert all(0 < number < 1 for number in numbers)
    assert len(set(numbers)) == len(numbers)
    tenths = Counter(int(10 * number) for number in numbers)
    assert max(tenths.values()) - min(tenths.values()) < 120
    assert uniform(1, 11) != uniform(11, 1)
    assert (uniform(7, 3), uniform(-1, 0)) == (
        0.7133945216688186,
        0.8507581699087708,
    )  # on every machine
    assert uniform(1 << 200, 0) != uniform(0, 0)


def test_the_ends_of_the_range_are_the_ends_of_the_vocabulary() -> None:
    logits = torch.zeros(4)
    almost_one = 1 - 2.0**-53
    assert draw(logits, options(), 2.0**-53) == 0
    assert draw(logits, options(), almost_one) == 3
    assert draw(logits, options(), 0.25) == 1
    assert draw(torch.tensor([0.0, -math.inf]), options(), almost_one) == 0


@pytest.mark.parametrize("temperature", [1e-6, 1e-300, 5e-324, 1e300])
def test_no_temperature_breaks_it(temperature: float) -> None:
    logits = random_logits(4)
    token = draw(logits, options(temperature=temperature), 0.5)
    assert 0 <= token < VOCAB
    if temperature < 1:
        assert token == int(logits.argmax())


def test_min_tokens_forbids_what_would_end_the_answer() -> None:
    sampling = options(min_tokens=2, stop_token_ids=[5, -1, 10_000])
    logits = torch.zeros(10)
    forbid_end(logits, sampling, frozenset({2, 99}))
    assert set((logits == -math.inf).nonzero().view(-1).tolist()) == {2, 5}


def test_min_tokens_holds_for_greedy_and_drawn_rows() -> None:
    logits = torch.zeros(2, 10)
    logits[:, 2] = 50.0
    rows = [
        chunk(options(temperature=0.0, min_tokens=1)),
        chunk(options(temperature=1.0, min_tokens=1)),
    ]
    greedy, drawn = sample(logits.clone(), rows, frozenset({2}))
    assert greedy == 0
    assert drawn != 2
    later = [Chunk([0], [1], 0, True, row.sampling, 1, 1) for row in rows]
    assert sample(logits.clone(), later, frozenset({2})) == [2, 2]


def test_with_nothing_left_it_still_answers() -> None:
    logits = torch.full((2, 3), -math.inf)
    assert sample(logits, [chunk(options(temperature=0.0)), chunk(options())], frozenset()) == [
        0,
        0,
    ]
    nothing = torch.full((3,), math.nan)
    assert draw(nothing, options(top_k=2, top_p=0.5), 0.4) == 0


def test_rows_do_not_depend_on_each_other() -> None:
    logits = torch.stack([random_logits(seed) for seed in range(6)])
    rows = [
        chunk(options(temperature=t, seed=s, top_k=k), i)
        for i, (t, s, k) in enumerate(
            [(0.0, 0, 0), (1.0, 1, 0), (0.5, 1, 3), (1.0, 1, 0), (0.0, 5, 0), (2.0, 9, 20)]
        )
    ]
    together = sample(logits.clone(), rows, frozenset())
    alone = [sample(logits[i : i + 1].clone(), [rows[i]], frozenset())[0] for i in range(6)]
    assert together == alone
