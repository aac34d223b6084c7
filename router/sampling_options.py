"""The sampling fields of a body as the wire's options: checked, bounded, with the model's defaults.

Every refusal is a ClientError that names the field. It knows no prompt and no tokenizer, only how
many ids there are.
"""

from dataclasses import dataclass
from typing import Any, Final

from protocol.errors import ClientError
from protocol.openai import ChatRequest, CompletionRequest, SamplingFields
from protocol.sampling import Sampling

MAX_STOPS: Final = 16
MAX_STOP_CHARS: Final = 1024
MAX_STOP_IDS: Final = 128
MAX_BIASES: Final = 1024
MAX_LOGPROBS: Final = 20
SEED_SPACE: Final = 1 << 63
_MAX_TOP_K: Final = 1 << 31
_SMALLEST: Final = 1e-9
"""Where 0 itself is outside a range."""


@dataclass(frozen=True, slots=True)
class Defaults:
    """What `generation_config.json` sets where the client sets nothing."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    max_tokens: int | None = None


def read_defaults(config: dict[str, Any]) -> Defaults:
    """What is no number or outside its range is left out: no client could mend it."""

    def number(key: str, default: float, low: float, high: float) -> float:
        value = config.get(key)
        if isinstance(value, bool) or not isinstance(value, int | float):
            return default
        return float(value) if low <= value <= high else default

    limit = config.get("max_new_tokens")
    greedy = config.get("do_sample") is False
    return Defaults(
        temperature=0.0 if greedy else number("temperature", 1.0, 0.0, 2.0),
        top_p=number("top_p", 1.0, _SMALLEST, 1.0),
        top_k=0 if greedy else int(number("top_k", 0, 0, _MAX_TOP_K)),
        min_p=number("min_p", 0.0, 0.0, 1.0),
        repetition_penalty=number("repetition_penalty", 1.0, _SMALLEST, 2.0),
        max_tokens=limit if isinstance(limit, int) and limit > 0 else None,
    )


def resolve(
    request: ChatRequest | CompletionRequest, defaults: Defaults, vocab_size: int, grammar: str
) -> Sampling:
    """All but what differs between choices: `max_tokens`, `seed` and `prompt_logprobs` are the
    caller's to replace. Raises ClientError."""
    min_p = _or(request.min_p, defaults.min_p)
    repetition = _or(request.repetition_penalty, defaults.repetition_penalty)
    presence = _or(request.presence_penalty, 0.0)
    frequency = _or(request.frequency_penalty, 0.0)
    temperature = _or(request.temperature, defaults.temperature)
    top_p = _or(request.top_p, defaults.top_p)
    top_k = defaults.top_k if request.top_k is None else request.top_k
    in_range("temperature", temperature, 0.0, 2.0)
    in_range("top_p", top_p, 0.0, 1.0, above_low=True)
    in_range("top_k", top_k, -1, _MAX_TOP_K)
    in_range("min_p", min_p, 0.0, 1.0)
    in_range("repetition_penalty", repetition, 0.0, 2.0, above_low=True)
    in_range("presence_penalty", presence, -2.0, 2.0)
    in_range("frequency_penalty", frequency, -2.0, 2.0)
    return Sampling(
        max_tokens=1,
        temperature=temperature,
        top_p=top_p,
        top_k=max(top_k, 0),
        stop=_stops(request),
        stop_token_ids=_stop_ids(request, vocab_size),
        min_tokens=request.min_tokens or 0,
        ignore_eos=bool(request.ignore_eos),
        include_stop=bool(request.include_stop_str_in_output),
        skip_special_tokens=request.skip_special_tokens is not False,
        min_p=min_p,
        repetition_penalty=repetition,
        presence_penalty=presence,
        frequency_penalty=frequency,
        logit_bias=_logit_bias(request, vocab_size),
        logprobs=_logprobs(request),
        grammar=grammar,
    )


def check_min_tokens(min_tokens: int, max_tokens: int) -> None:
    """Raises ClientError."""
    in_range("min_tokens", min_tokens, 0, max_tokens)


def in_range(name: str, value: float, low: float, high: float, *, above_low: bool = False) -> None:
    """Raises ClientError; `above_low`: `low` itself is outside."""
    if above_low and value == low:
        raise invalid(name, f"`{name}` must be above {low:g}")
    if not low <= value <= high:
        raise invalid(name, f"`{name}` must be from {low:g} to {high:g}")


def invalid(param: str, message: str) -> ClientError:
    """A 400 for a value that its field cannot have."""
    return ClientError(400, message, code="invalid_value", param=param)


def _or(value: float | None, default: float) -> float:
    return default if value is None else float(value)


def _logprobs(request: ChatRequest | CompletionRequest) -> int:
    """As `Sampling.logprobs`: chats say yes or no and how many, completions only how many."""
    if isinstance(request, CompletionRequest):
        if request.logprobs is None:
            return -1
        in_range("logprobs", request.logprobs, 0, MAX_LOGPROBS)
        return request.logprobs
    top = request.top_logprobs or 0
    in_range("top_logprobs", top, 0, MAX_LOGPROBS)
    if request.logprobs:
        return top
    if top:
        raise invalid("top_logprobs", "`top_logprobs` is only allowed when `logprobs` is true")
    return -1


def _logit_bias(request: SamplingFields, vocab_size: int) -> dict[int, float]:
    biases = request.logit_bias or {}
    if len(biases) > MAX_BIASES:
        raise invalid("logit_bias", f"`logit_bias` has at most {MAX_BIASES} entries")
    found: dict[int, float] = {}
    for key, value in biases.items():
        # longer ones are no ids, and Python refuses to read numbers of thousands of digits
        if not (key.isascii() and key.isdigit() and len(key) <= 20 and int(key) < vocab_size):
            message = f"`logit_bias` has keys from 0 to {vocab_size - 1}, not {key[:40]!r}"
            raise invalid("logit_bias", message)
        if not -100.0 <= value <= 100.0:
            raise invalid("logit_bias", f"`logit_bias` {key} must be from -100 to 100")
        found[int(key)] = float(value)
    return found


def _stop_ids(request: SamplingFields, vocab_size: int) -> list[int]:
    ids = request.stop_token_ids or []
    if len(ids) > MAX_STOP_IDS or not all(0 <= token_id < vocab_size for token_id in ids):
        message = f"`stop_token_ids` takes at most {MAX_STOP_IDS} ids from 0 to {vocab_size - 1}"
        raise invalid("stop_token_ids", message)
    return ids


def _stops(request: SamplingFields) -> list[str]:
    stop = [request.stop] if isinstance(request.stop, str) else request.stop or []
    if len(stop) > MAX_STOPS or any(len(text) > MAX_STOP_CHARS for text in stop):
        message = f"`stop` takes at most {MAX_STOPS} strings of {MAX_STOP_CHARS} characters"
        raise invalid("stop", message)
    if not all(stop):
        raise invalid("stop", "`stop` has an empty string")
    return stop
