"""Which token a simulated model says next, and how likely it held it, from a fold over the KV.

Words of lower-case letters, and perhaps an end. With a grammar: the same letters where they are
allowed, and what closes a piece of JSON soon. It knows no KV, no arena and no time.
"""

import math
from collections.abc import Iterator, Sequence
from hashlib import blake2b
from itertools import islice
from typing import Final

from protocol.out import TokenLogprob
from protocol.sampling import Sampling

Fold = blake2b
"""Over the bytes of all positions so far."""

EOS_ID: Final = 257
NUM_DRAWN: Final = 262
"""Ids below this may be said: the vocabulary of bytes. Of a larger one the others only are read."""
_LETTERS: Final = b"abcdefghijklmnopqrstuvwxyz"
_SPACE: Final = 32
_ALPHABET: Final = (*_LETTERS, _SPACE, EOS_ID)
_OTHERS: Final = tuple(token for token in range(NUM_DRAWN) if token not in _ALPHABET)
_CLOSING: Final[tuple[int, ...]] = (EOS_ID, *b'"}]:,0123456789tfn')
"""Under a grammar, where no letter fits or a word is over: the first of these that is allowed."""
_WHITESPACE: Final = frozenset(b" \t\r\n")


def _spaces(word_lengths: Sequence[int]) -> tuple[bool, ...]:
    """For each output index of one round of words: is it the space behind a word?"""
    pattern: list[bool] = []
    for length in word_lengths:
        pattern += [False] * length + [True]
    return tuple(pattern)


_IS_SPACE: Final = _spaces((4, 3, 6, 2, 7, 5, 9, 3, 8))


def draw(
    fold: Fold,
    sampling: Sampling,
    index: int,
    *,
    eos_every: int = 0,
    allowed: bytearray | None = None,
) -> int:
    """The token of output `index`: a letter, or the space that ends a word, or the end."""
    drawn = fold
    if sampling.temperature > 0:
        drawn = fold.copy()
        seed = sampling.seed.to_bytes(16, "little", signed=True)
        drawn.update(seed + index.to_bytes(8, "little"))
    number = _number(drawn)
    if not eos_every and allowed is None:
        return _plain(number, index)
    may_end = not sampling.ignore_eos and index >= sampling.min_tokens
    ends = eos_every and may_end and number % eos_every == 0
    token = EOS_ID if ends else _plain(number, index)
    return token if allowed is None else _fitting(token, allowed, may_end=may_end)


def scored(fold: Fold, index: int, token: int, num_top: int) -> TokenLogprob:
    """The log-probability of `token` as output `index` (below 0: in the prompt).

    The likeliest token has 1/2, the next 1/4 and so on through the vocabulary, in an order that
    the fold decides: the greedy token, the alphabet from there, then all the others.
    """
    ranked = list(_ranked(_number(fold), index))
    top = [(one, _logprob(rank)) for rank, one in enumerate(islice(ranked, max(num_top, 0)))]
    rank = ranked.index(token) if token < NUM_DRAWN else token
    return TokenLogprob(_logprob(rank), top)


def _number(fold: Fold) -> int:
    return int.from_bytes(fold.digest()[:8], "little")


def _plain(number: int, index: int) -> int:
    if _IS_SPACE[index % len(_IS_SPACE)]:
        return _SPACE
    return _LETTERS[(number >> 32) % len(_LETTERS)]


def _fitting(token: int, allowed: bytearray, *, may_end: bool) -> int:
    """`token` if the grammar allows it and a word goes on, else what closes, else the lowest."""
    possible = [
        i for i in range(min(8 * len(allowed), NUM_DRAWN)) if allowed[i >> 3] >> (i & 7) & 1
    ]
    if not may_end and possible != [EOS_ID]:
        possible = [i for i in possible if i != EOS_ID]
    if token in possible and token not in (_SPACE, EOS_ID):
        return token
    closing = next((one for one in _CLOSING if one in possible), None)
    if closing is not None:
        return closing
    # A larger vocabulary may have only others to say.
    others = possible or [i for i in range(8 * len(allowed)) if allowed[i >> 3] >> (i & 7) & 1]
    return next((one for one in others if one not in _WHITESPACE), others[0])


def _ranked(number: int, index: int) -> Iterator[int]:
    first = _ALPHABET.index(_plain(number, index))
    yield from _ALPHABET[first:]
    yield from _ALPHABET[:first]
    yield from _OTHERS


def _logprob(rank: int) -> float:
    return -(rank + 1) * math.log(2)
