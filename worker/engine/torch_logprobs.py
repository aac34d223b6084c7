"""Log-probabilities from logits, for those who ask: of a sampled token, and of a prompt's tokens.

Of the model's own distribution, in float32, before any option has touched it. It knows no requests.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Final

import torch
from torch import Tensor

from protocol.out import TokenLogprob
from worker.engine.runner import Chunk

_MAX_NUMBERS: Final = 1 << 23
"""Logits that are held at once for a prompt: 32 MB of them, whatever its length."""


def score(logits: Tensor, tokens: Sequence[int], num_top: int) -> list[TokenLogprob]:
    """How likely each row of `logits` (`[len(tokens), vocab]`) holds its token, and the `num_top`
    likeliest (the lower id first among equals)."""
    logprobs = logits.float().log_softmax(-1)
    index = torch.tensor(tokens, dtype=torch.int64, device=logits.device).unsqueeze(1)
    own: list[float] = logprobs.gather(1, index).squeeze(1).tolist()
    tops = _top(logprobs, min(num_top, logprobs.shape[1]))
    return [TokenLogprob(one, top) for one, top in zip(own, tops, strict=True)]


def raw_rows(logits: Tensor, chunks: Sequence[Chunk]) -> dict[int, Tensor]:
    """Copies of the rows whose chunks ask for the sampled token's log-probability."""
    return {
        row: logits[row : row + 1].clone()
        for row, chunk in enumerate(chunks)
        if chunk.scores is not None and chunk.scores.num_top >= 0
    }


def score_sampled(raw: dict[int, Tensor], chunks: Sequence[Chunk], tokens: Sequence[int]) -> None:
    """Fill in the scores of sampled tokens, from the rows as they were."""
    for row, logits in raw.items():
        scores = chunks[row].scores
        if scores is not None:
            scores.sampled = score(logits, [tokens[row]], scores.num_top)[0]


def score_prompt(
    chunk: Chunk, hidden: Tensor, to_logits: Callable[[Tensor], Tensor], vocab_size: int
) -> None:
    """Fill in the scores of the prompt's tokens; `hidden` has one row for each of the chunk's."""
    scores, wanted = chunk.scores, chunk.scored
    if scores is None or not wanted:
        return
    size = max(1, _MAX_NUMBERS // vocab_size)
    for start in range(wanted.start, wanted.stop, size):
        end = min(start + size, wanted.stop)
        rows = hidden[start - 1 - chunk.start : end - 1 - chunk.start]
        tokens = list(chunk.history[start:end])
        scores.prompt += score(to_logits(rows), tokens, scores.prompt_num_top)


def _top(logprobs: Tensor, count: int) -> Iterator[list[tuple[int, float]]]:
    if count < 1:
        yield from ([] for _ in range(len(logprobs)))
        return
    # All that equal the last of them too: which of these `topk` takes, it does not say.
    least = logprobs.topk(count).values[:, -1:]
    rows, ids = (logprobs >= least).nonzero(as_tuple=True)
    values = logprobs[rows, ids]
    ends = torch.bincount(rows, minlength=len(logprobs)).cumsum(0).tolist()
    start = 0
    for end in ends:
        ordered, order = values[start:end].sort(descending=True, stable=True)
        best = ids[start:end][order[:count]].tolist()
        yield list(zip(best, ordered[:count].tolist(), strict=True))
        start = end
