"""The next token from logits. Pure: logits, options and (seed, output index) decide it.

No generator state crosses a step, a leg or a worker: output `i` gets its own random number. It
knows no model and no KV.
"""

from collections.abc import Sequence
from hashlib import blake2b
from typing import Final

import torch
from torch import Tensor

from protocol.sampling import Sampling
from worker.engine.runner import Chunk
from worker.engine.torch_logits import adjust, is_adjusted
from worker.engine.torch_logprobs import raw_rows, score_sampled

_BITS: Final = 52
"""With the half added in the middle of each step, still exact in float64."""


def sample(logits: Tensor, chunks: Sequence[Chunk], eos_ids: frozenset[int]) -> list[int]:
    """The token of each row of `logits` (`[len(chunks), vocab]`, float32; changed in place), and
    its log-probability where `chunk.scores` asks."""
    raw = raw_rows(logits, chunks)
    for row, chunk in enumerate(chunks):
        if is_adjusted(chunk):
            adjust(logits[row], chunk, eos_ids)
    tokens: list[int] = logits.argmax(dim=-1).tolist()  # the lowest id where some are equal
    for row, chunk in enumerate(chunks):
        if chunk.sampling.temperature > 0:
            number = uniform(chunk.sampling.seed, chunk.output_index)
            tokens[row] = draw(logits[row], chunk.sampling, number)
    score_sampled(raw, chunks, tokens)
    return tokens


def uniform(seed: int, output_index: int) -> float:
    """A number in (0, 1), exclusive, for output `output_index` of a choice with this seed."""
    digest = blake2b(f"{seed}/{output_index}".encode(), digest_size=8).digest()
    return ((int.from_bytes(digest, "little") >> (64 - _BITS)) + 0.5) / (1 << _BITS)


def draw(logits: Tensor, sampling: Sampling, number: float) -> int:
    """The token at `number` of the cumulative distribution over the kept tokens, by id.

    In order of ids, not of probability: two tokens that change places by float noise would
    otherwise move every boundary between them.
    """
    ids, probabilities = kept_tokens(logits, sampling)
    cumulative = probabilities.cumsum(0)
    at = torch.searchsorted(cumulative, number * float(cumulative[-1]), right=True)
    return int(ids[min(int(at), len(ids) - 1)])


def kept_tokens(logits: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """Ids (ascending) that temperature, `top_k`, `top_p` and `min_p` leave, in this order, and
    their probabilities in float64, which sum up to 1 before `top_p` takes its part.

    `top_k` keeps all that equal the k-th; `top_p` keeps the fewest of the most probable (the lower
    id first among equals) that reach it, so at least one; `min_p` keeps the most probable and all
    that have at least that share of its probability.
    """
    ids = _most_likely(logits, sampling.top_k)
    kept = logits[ids].double()
    # The largest is subtracted before the division: no temperature, however small, overflows.
    probabilities = torch.softmax((kept - kept.max()) / sampling.temperature, dim=0)
    if 0 <= sampling.top_p < 1:
        chosen = _nucleus(probabilities, sampling.top_p)
        ids, probabilities = ids[chosen], probabilities[chosen]
    if sampling.min_p > 0:
        chosen = probabilities >= sampling.min_p * probabilities.max()
        chosen[probabilities.argmax()] = True
        ids, probabilities = ids[chosen], probabilities[chosen]
    return ids, probabilities


def _nucleus(probabilities: Tensor, top_p: float) -> Tensor:
    """Places (ascending) of the fewest that reach `top_p`."""
    ordered, order = probabilities.sort(descending=True, stable=True)
    before = ordered.cumsum(0) - ordered
    within = before < top_p
    within[0] = True
    return order[within].sort().values


def _most_likely(logits: Tensor, top_k: int) -> Tensor:
    """Ids of the `top_k` largest logits (0: all), ascending; none that is forbidden."""
    possible = logits > float("-inf")
    if 0 < top_k < logits.shape[-1]:
        possible &= logits >= logits.topk(top_k).values[-1]
    ids = possible.nonzero().view(-1)
    # Everything is forbidden, or nothing is a number: the first token, as greedy would.
    return ids if len(ids) else ids.new_zeros(1)
