"""OpenAI's request bodies as structs, and the one place that decodes them.

Unknown fields are ignored; a field we know but do not support is a 400 that names it, unless it has
the value that means nothing (`UNSUPPORTED` lists both).
"""

import re
from typing import Any, Final, TypeVar

import msgspec

from protocol.errors import ClientError


class StreamOptions(msgspec.Struct):
    include_usage: bool | None = None


class SamplingFields(msgspec.Struct, kw_only=True):
    """What chat and plain completions share."""

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    n: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    seed: int | None = None
    min_tokens: int | None = None
    ignore_eos: bool | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    cache_salt: str | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    min_p: float | None = None
    logit_bias: dict[str, float] | None = None
    response_format: dict[str, Any] | None = None
    guided_json: str | dict[str, Any] | bool | None = None
    structured_outputs: dict[str, Any] | None = None
    # Known, not supported here: see UNSUPPORTED.
    guided_regex: Any = None
    guided_choice: Any = None
    guided_grammar: Any = None
    prompt_logprobs: Any = None
    use_beam_search: bool | None = None


class ChatRequest(SamplingFields, kw_only=True):
    messages: list[dict[str, Any]]
    max_completion_tokens: int | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    tools: list[Any] | None = None
    tool_choice: Any = None
    functions: list[Any] | None = None
    function_call: Any = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    modalities: list[str] | None = None
    audio: Any = None
    chat_template: str | None = None


class CompletionRequest(SamplingFields, kw_only=True):
    prompt: str | list[int | str | list[int]]
    echo: bool | None = None
    suffix: str | None = None
    logprobs: int | None = None
    best_of: int | None = None


UNSUPPORTED: Final[dict[str, tuple[Any, ...]]] = {
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
    "prompt_logprobs": (),
    "use_beam_search": (False,),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "audio": (),
    "chat_template": (),
    "continue_final_message": (False,),
    "suffix": ("",),
}
"""Field -> values that ask for nothing. None (absent or null) always asks for nothing."""


def _asks(value: Any, neutral: tuple[Any, ...]) -> bool:
    """Whether a field's value wants what we do not have. 0 and false are two things here, which
    Python takes for equal."""
    if value is None:
        return False
    return not any(
        value == one and isinstance(value, bool) == isinstance(one, bool) for one in neutral
    )


_chat: Final = msgspec.json.Decoder(ChatRequest)
_completion: Final = msgspec.json.Decoder(CompletionRequest)
_PATH: Final = re.compile(r" - at `\$\.?([^`]*)`")

R = TypeVar("R", ChatRequest, CompletionRequest)


def decode_chat(body: bytes) -> ChatRequest:
    """Raises ClientError(400) with the offending parameter."""
    return _checked(_chat, body)


def decode_completion(body: bytes) -> CompletionRequest:
    """Raises ClientError(400) with the offending parameter."""
    return _checked(_completion, body)


def _checked(decoder: "msgspec.json.Decoder[R]", body: bytes) -> R:
    try:
        request = decoder.decode(body)
    except msgspec.ValidationError as error:
        raise _invalid(str(error)) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        message = f"the body is not valid JSON: {error}"
        raise ClientError(400, message, code="invalid_json") from None
    for name, neutral in UNSUPPORTED.items():
        if _asks(getattr(request, name, None), neutral):
            message = f"`{name}` is not supported by this server"
            raise ClientError(400, message, code="unsupported_parameter", param=name)
    return request


def _invalid(text: str) -> ClientError:
    match = _PATH.search(text)
    if match is not None:
        return ClientError(400, text, code="invalid_type", param=match.group(1) or None)
    missing = re.search(r"missing required field `([^`]*)`", text)
    param = missing.group(1) if missing else None
    return ClientError(
        400, text, code="missing_parameter" if missing else "invalid_type", param=param
    )
