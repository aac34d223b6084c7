import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.engine.batching import blocks_for, plan_step


def test_decoding_sequences_go_first_and_prompts_share_the_rest_in_order() -> None:
    counts = plan_step([10, 1, 10, 1, 10], max_step_tokens=16, min_prefill=4)
    assert counts == [10, 1, 4, 1, 0]


def test_long_prompt_is_cut_into_chunks() -> None:
    assert plan_step([1000], max_step_tokens=64, min_prefill=4) == [64]


def test_prompts_do_not_starve_when_the_decoding_ones_use_up_the_budget() -> None:
    assert plan_step([1] * 8 + [100], max_step_tokens=8, min_prefill=4) == [1] * 8 + [4]


def test_nothing_to_do() -> None:
    assert plan_step([], max_step_tokens=8, min_prefill=4) == []


@given(
    st.lists(st.integers(1, 200), max_size=40),
    st.integers(1, 100),
    st.integers(1, 8),
)
def test_everybody_decodes_nobody_gets_too_much_and_somebody_moves(
    remaining: list[int], max_step_tokens: int, min_prefill: int
) -> None:
    counts = plan_step(remaining, max_step_tokens=max_step_tokens, min_prefill=min_prefill)
    num_decoding = remaining.count(1)
    assert all(0 <= count <= left for count, left in zip(counts, remaining, strict=True))
    assert all(count for count, left in zip(counts, remaining, strict=True) if left == 1)
    assert sum(counts) <= max(max_step_tokens, num_decoding + min_prefill)
    assert not remaining or sum(counts) > 0
    prompts = [count for count, left in zip(counts, remaining, strict=True) if left > 1]
    assert not prompts or prompts[0] > 0


@pytest.mark.parametrize(("tokens", "blocks"), [(0, 0), (1, 1), (4, 1), (5, 2), (8, 2)])
def test_blocks_for(tokens: int, blocks: int) -> None:
    assert blocks_for(tokens, 4) == blocks
