"""What a request asks of the logits before a token is drawn: bias, penalties, grammar, no end yet.

One row at a time, in place, and only rows that ask: others cost a comparison. The order is that of
vLLM and transformers. It knows neither temperature nor randomness.
"""

from array import array
from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

from protocol.sampling import Sampling
from worker.engine.runner import Chunk

_NEVER: Final = float("-inf")
_BITS: Final = 8


def is_adjusted(chunk: Chunk) -> bool:
    """Whether `adjust` would change anything."""
    sampling = chunk.sampling
    return (
        chunk.allowed is not None
        or chunk.num_output < sampling.min_tokens
        or sampling.repetition_penalty != 1
        or sampling.presence_penalty != 0
        or sampling.frequency_penalty != 0
        or bool(sampling.logit_bias)
    )


def adjust(logits: Tensor, chunk: Chunk, eos_ids: frozenset[int]) -> None:
    """Apply the options of `chunk` to its row (`[vocab]`, float32)."""
    sampling = chunk.sampling
    if sampling.logit_bias:
        add_bias(logits, sampling.logit_bias)
    if chunk.num_output < sampling.min_tokens:
        forbid_end(logits, sampling, eos_ids, chunk.allowed)
    if sampling.repetition_penalty != 1:
        penalise_repetition(logits, chunk.history, sampling.repetition_penalty)
    if sampling.presence_penalty or sampling.frequency_penalty:
        output = chunk.history[chunk.num_prompt :]
        penalise_output(logits, output, sampling.presence_penalty, sampling.frequency_penalty)
    if chunk.allowed is not None:
        allow_only(logits, chunk.allowed)


def add_bias(logits: Tensor, biases: dict[int, float]) -> None:
    """Add to single ids; those that the model does not have are left out."""
    known = {token: bias for token, bias in biases.items() if 0 <= token < len(logits)}
    ids = torch.tensor(list(known), dtype=torch.int64, device=logits.device)
    logits[ids] += torch.tensor(list(known.values()), dtype=logits.dtype, device=logits.device)


def forbid_end(
    logits: Tensor, sampling: Sampling, eos_ids: frozenset[int], allowed: bytearray | None = None
) -> None:
    """Before `min_tokens`, what would end the answer cannot be sampled.

    Unless a grammar allows nothing else: it wins, as no text that obeys it is that long.
    """
    ends = {i for i in (*eos_ids, *sampling.stop_token_ids) if 0 <= i < len(logits)}
    if allowed is None or _allows_more_than(ends, allowed):
        logits[sorted(ends)] = _NEVER


def penalise_repetition(logits: Tensor, history: Sequence[int], penalty: float) -> None:
    """Of every id in prompt or output: divide what is positive, multiply what is negative."""
    ids = _ids(history, logits)
    seen = logits[ids]
    # An id that occurs twice is written twice, with the same value.
    logits[ids] = torch.where(seen < 0, seen * penalty, seen / penalty)


def penalise_output(
    logits: Tensor, output: Sequence[int], presence: float, frequency: float
) -> None:
    """Of every id in the output: subtract once, and once for each time it occurs."""
    counts = torch.bincount(_ids(output, logits))
    ids = counts.nonzero().view(-1)
    logits[ids] -= presence + frequency * counts[ids].to(logits.dtype)


def allow_only(logits: Tensor, allowed: bytearray) -> None:
    """Forbid what has no bit in `allowed`, and what is beyond it."""
    packed = torch.frombuffer(allowed, dtype=torch.uint8).to(logits.device)
    places = torch.arange(_BITS, dtype=torch.uint8, device=logits.device)
    bits = ((packed.unsqueeze(1) >> places) & 1).view(-1)[: len(logits)]
    logits[: len(bits)].masked_fill_(bits == 0, _NEVER)
    logits[len(bits) :] = _NEVER


def _allows_more_than(ends: set[int], allowed: bytearray) -> bool:
    rest = bytearray(allowed)
    for token in ends:
        if token // _BITS < len(rest):
            rest[token // _BITS] &= ~(1 << token % _BITS)
    return rest.count(0) < len(rest)


def _ids(tokens: Sequence[int], logits: Tensor) -> Tensor:
    """As an index. A copy: an array whose memory a tensor holds could not grow."""
    if not isinstance(tokens, array):
        return torch.tensor(list(tokens), dtype=torch.int64, device=logits.device)
    if not tokens:
        return torch.zeros(0, dtype=torch.int64, device=logits.device)
    return torch.frombuffer(tokens, dtype=torch.int32).to(logits.device, torch.int64)
