"""Which tokens of which sequences run in one step. Pure: numbers in, numbers out.

It knows nothing of blocks, of who waits, or of what a token costs.
"""

from collections.abc import Sequence


def plan_step(remaining: Sequence[int], *, max_step_tokens: int, min_prefill: int) -> list[int]:
    """How many tokens each running sequence gets, given how many it has left to compute.

    A sequence with one token left decodes: all of these run, so that nobody's next token waits
    for somebody's prompt. What is left of `max_step_tokens` goes to prompts in order, in chunks.
    Prompts get `min_prefill` tokens also when the decoding ones use up the budget: they must not
    starve.
    """
    counts = [1 if left == 1 else 0 for left in remaining]
    budget = max(max_step_tokens - sum(counts), min_prefill)
    for index, left in enumerate(remaining):
        if left > 1 and budget > 0:
            counts[index] = min(left, budget)
            budget -= counts[index]
    return counts


def blocks_for(num_tokens: int, block_size: int) -> int:
    """Blocks that hold `num_tokens` tokens, the last one perhaps partly filled."""
    return -(-num_tokens // block_size)
