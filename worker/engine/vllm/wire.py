"""vLLM's JSON: the body of a request from our sampling options, and what comes back.

Prompts go out as token ids and token ids come back, so vLLM's own text is never used. It knows no
sockets and no jobs; the shapes are those of vLLM 0.32.
"""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Final

import msgspec

from protocol.out import TokenLogprob
from protocol.sampling import Sampling

_SEED_STEP: Final = 1_000_003
_SEEDS: Final = 1 << 63
_TOKEN_ID: Final = "token_id:"
_MAX_DIGITS: Final = 10
_MAX_SHOWN: Final = 40
_MAX_TOKEN_ID: Final = 2**32 - 1
MAX_LINE_BYTES: Final = 64 << 20
"""The first chunk repeats the prompt's ids: a line of a million tokens is normal."""

REMOTE_DECODE: Final[Mapping[str, Any]] = {"do_remote_decode": True, "do_remote_prefill": False}
"""Asks a server to keep the blocks and to say where they are."""

TokenId = Annotated[int, msgspec.Meta(ge=0, le=_MAX_TOKEN_ID)]


class Unmappable(ValueError):
    """These options cannot be said in vLLM's words; one line for the client."""


class WireError(ValueError):
    """What came is not what vLLM 0.32 sends."""


class Logprobs(msgspec.Struct, gc=False):
    tokens: list[str] = []
    token_logprobs: list[float | None] = []
    top_logprobs: list[dict[str, float] | None] | None = None


class PromptLogprob(msgspec.Struct, gc=False):
    logprob: float
    rank: int | None = None


class Choice(msgspec.Struct, gc=False):
    token_ids: list[TokenId] | None = None
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    logprobs: Logprobs | None = None
    prompt_logprobs: list[dict[str, PromptLogprob] | None] | None = None


class ErrorObject(msgspec.Struct, gc=False):
    message: str = ""
    code: int | str | None = None
    param: str | None = None


class Answer(msgspec.Struct, gc=False):
    """A whole answer, or one chunk of a stream."""

    choices: list[Choice] = []
    error: ErrorObject | None = None
    kv_transfer_params: dict[str, Any] | None = None


_answers: Final = msgspec.json.Decoder(Answer)


def decode_answer(data: bytes) -> Answer:
    """Raises WireError."""
    try:
        return _answers.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise WireError(f"vLLM's answer cannot be read: {error}") from None


def prefill_body(model: str, ids: Sequence[int], *, cache_salt: str) -> dict[str, Any]:
    """One token is the least that vLLM computes; the decode side computes it again, as it should
    be sampled, so here it is the cheapest one."""
    body: dict[str, Any] = {
        "model": model,
        "prompt": list(ids),
        "max_tokens": 1,
        "temperature": 0,
        # whatever token it is: blocks of a request that ended by itself are not lent everywhere
        "ignore_eos": True,
        "stream": False,
    }
    if cache_salt:
        body["cache_salt"] = cache_salt
    return body


def decode_body(
    model: str,
    ids: Sequence[int],
    sampling: Sampling,
    *,
    num_output: int,
    max_new: int,
    cache_salt: str,
) -> dict[str, Any]:
    """Go on after `ids`, whose last `num_output` are output already. Raises Unmappable.

    Stop strings are not sent: the text is ours, and it ends where ours says."""
    if sampling.grammar and num_output:
        raise Unmappable("vLLM cannot go on in the middle of a grammar")
    body: dict[str, Any] = {
        "model": model,
        "prompt": list(ids),
        "max_tokens": max_new,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "min_p": sampling.min_p,
        # a resumed choice must not draw its first random numbers again
        "seed": (sampling.seed + num_output * _SEED_STEP) % _SEEDS,
        "repetition_penalty": sampling.repetition_penalty,
        "presence_penalty": sampling.presence_penalty,
        "frequency_penalty": sampling.frequency_penalty,
        "stop_token_ids": list(sampling.stop_token_ids),
        "ignore_eos": sampling.ignore_eos,
        "min_tokens": min(max(0, sampling.min_tokens - num_output), max_new),
        "stream": True,
        "return_token_ids": True,
    }
    if cache_salt:
        body["cache_salt"] = cache_salt
    if sampling.logit_bias:
        body["logit_bias"] = {str(key): value for key, value in sampling.logit_bias.items()}
    if sampling.logprobs >= 0:
        body["logprobs"] = sampling.logprobs
        body["return_tokens_as_token_ids"] = True
    if sampling.grammar:
        body["structured_outputs"] = {"json": sampling.grammar}
    return body


def token_logprobs(choice: Choice, num_top: int) -> list[TokenLogprob | None]:
    """One for each of the choice's ids; None where vLLM said nothing."""
    said = choice.logprobs
    count = len(choice.token_ids or ())
    if said is None or len(said.token_logprobs) != count:
        return [None] * count
    tops = said.top_logprobs or [None] * count
    if len(tops) != count:
        return [None] * count
    return [
        None if own is None else TokenLogprob(own, _top(top or {}, num_top))
        for own, top in zip(said.token_logprobs, tops, strict=False)
    ]


def prompt_logprobs(
    choice: Choice, ids: Sequence[int], num_top: int
) -> list[TokenLogprob | None] | None:
    """One for each prompt token; the first has none. None if vLLM said nothing."""
    said = choice.prompt_logprobs
    if said is None or len(said) != len(ids):
        return None
    found: list[TokenLogprob | None] = []
    for token, entry in zip(ids, said, strict=True):
        own = entry.get(str(token)) if entry else None
        if entry is None or own is None:
            found.append(None)
            continue
        # beside the likeliest ones the token itself is listed, with its own rank
        ranked = sorted(
            (value.rank or 0, _token_id(key), value.logprob) for key, value in entry.items()
        )
        top = [(key, logprob) for rank, key, logprob in ranked if rank <= num_top]
        found.append(TokenLogprob(own.logprob, top))
    return found


def _top(named: Mapping[str, float], num_top: int) -> list[tuple[int, float]]:
    pairs = []
    for name, logprob in named.items():
        if not name.startswith(_TOKEN_ID):
            raise WireError(f"a token named {name[:_MAX_SHOWN]!r} where an id was asked for")
        pairs.append((_token_id(name.removeprefix(_TOKEN_ID)), logprob))
    return sorted(pairs, key=lambda pair: -pair[1])[:num_top]


def _token_id(text: str) -> int:
    """Raises WireError for what is none."""
    if not (text.isascii() and text.isdecimal() and len(text) <= _MAX_DIGITS):
        raise WireError(f"{text[:_MAX_SHOWN]!r} is no token id")
    return int(text)


class EventLines:
    """Splits a stream of bytes into the payloads of server-sent events."""

    def __init__(self) -> None:
        self._rest = bytearray()
        self.is_done = False
        """`[DONE]` has come."""

    def feed(self, data: bytes) -> list[bytes]:
        """The payloads that are whole now. Raises WireError for a line without end."""
        whole, newline, rest = data.rpartition(b"\n")
        if not newline:
            self._rest += data
            if len(self._rest) > MAX_LINE_BYTES:
                raise WireError(f"a line of more than {MAX_LINE_BYTES} bytes")
            return []
        if self._rest:
            whole = bytes(self._rest) + whole
        self._rest = bytearray(rest)
        found: list[bytes] = []
        for line in whole.split(b"\n"):
            if self.is_done or not line.startswith(b"data:"):
                continue
            payload = line[5:].strip()
            if payload == b"[DONE]":
                self.is_done = True
            else:
                found.append(payload)
        return found
