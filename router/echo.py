"""The prompt as `echo` gives it back, and where each of its tokens begins in it.

A prompt that came as text is given back as it came; one that came as ids is decoded, by the rule of
the completion's own text (`skip_special_tokens`).
"""

from collections.abc import Sequence
from dataclasses import dataclass

from router.logprobs import TokenPlaces
from text.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class Echo:
    """One prompt."""

    text: str
    ids: Sequence[int]
    offsets: Sequence[int]
    """Character of `text` with which each token begins; empty if nobody asked."""


def echo_of(
    prompt: str | None,
    ids: Sequence[int],
    tokenizer: Tokenizer,
    *,
    skip_special_tokens: bool,
    with_offsets: bool,
) -> Echo:
    """`prompt` None: it came as ids. Takes about a microsecond a token."""
    if prompt is not None and not with_offsets:
        return Echo(prompt, ids, ())
    # special tokens that are written in a text are in that text; the begin before it is not
    skip = skip_special_tokens and prompt is None
    places = TokenPlaces(tokenizer, skip_special_tokens=skip)
    lead = int(prompt is not None and _has_begin(prompt, ids, tokenizer))
    found = [places.push(token_id) for token_id in ids[lead:]]
    offsets = [0] * lead + [place for place, _ in found]
    if prompt is None:
        return Echo("".join([text for _, text in found]) + places.finish(), ids, offsets)
    end = len(prompt)  # a tokenizer may write more than it read
    return Echo(prompt, ids, [min(offset, end) for offset in offsets])


def _has_begin(prompt: str, ids: Sequence[int], tokenizer: Tokenizer) -> bool:
    """Whether the first id is a begin that the tokenizer has added."""
    begin = tokenizer.bos_id
    if begin is None or not ids or ids[0] != begin:
        return False
    is_written = prompt.startswith(tokenizer.token(begin) or "\0")
    return not is_written or list(ids[1:2]) == [begin]
