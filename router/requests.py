"""From a client's body to choices ready to be scheduled: check, render, tokenize, resolve.

Whatever is wrong is a ClientError before anything is reserved. Long texts are tokenized in a
thread (the tokenizer lets go of the GIL); short ones on the loop, where a thread would cost more.
"""

import asyncio
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final

from protocol.blocks import pack_ids
from protocol.errors import ClientError
from protocol.ids import choice_id
from protocol.jobs import Tokens
from protocol.openai import (
    ChatRequest,
    CompletionRequest,
    SamplingFields,
    decode_chat,
    decode_completion,
)
from protocol.sampling import Sampling
from router.answers import Answer
from router.catalog import Catalog, ServedModel
from router.choices import ChoiceSpec
from text.chat import MessagesError, template_messages
from text.template import TemplateError
from text.tokenizer import LONG_TEXT_CHARS

COMPLETION_MAX_TOKENS: Final = 16
MAX_N: Final = 128
MAX_STOPS: Final = 16
MAX_STOP_CHARS: Final = 1024
MAX_STOP_IDS: Final = 128
MAX_SALT_CHARS: Final = 256
_SEED_SPACE: Final = 1 << 63


@dataclass(frozen=True, slots=True)
class Prepared:
    """One request, checked and tokenized."""

    answer: Answer
    specs: Sequence[ChoiceSpec]
    n: int
    stream: bool
    include_usage: bool


class Front:
    """What HTTP and NATS share."""

    def __init__(
        self,
        catalog: Catalog,
        *,
        max_choices: int,
        rng: random.Random,
        wall_clock: Callable[[], float],
    ) -> None:
        self._catalog = catalog
        self._max_choices = max_choices
        self._rng = rng
        self._wall_clock = wall_clock

    async def chat(self, body: bytes, request_id: str) -> Prepared:
        """`/v1/chat/completions`. Raises ClientError."""
        request = decode_chat(body)
        self._check(request, num_prompts=1)
        model = await self._catalog.served(_model_name(request))
        if len(body) < LONG_TEXT_CHARS and not request.chat_template_kwargs:
            text = self._render(request, model)
        else:  # a template may compute for half a second
            text = await asyncio.to_thread(self._render, request, model)
        [ids] = await _encode(model, [text], "messages", add_special_tokens=False)
        limit = request.max_completion_tokens
        return self._prepared(request, request_id, model, [ids], limit, "chat")

    async def completion(self, body: bytes, request_id: str) -> Prepared:
        """`/v1/completions`. Raises ClientError."""
        request = decode_completion(body)
        prompt = request.prompt
        is_batch = isinstance(prompt, list) and not isinstance(next(iter(prompt), 0), int)
        self._check(request, num_prompts=len(prompt) if is_batch else 1)
        model = await self._catalog.served(_model_name(request))
        prompts = await _prompts(request, model)
        return self._prepared(request, request_id, model, prompts, None, "text")

    def _check(self, request: SamplingFields, *, num_prompts: int) -> None:
        """What can be said before anything costs time. Raises ClientError."""
        n = 1 if request.n is None else request.n
        _in_range("n", n, 1, MAX_N)
        if n * num_prompts > self._max_choices:
            message = f"{n * num_prompts} choices in one request; at most {self._max_choices}"
            raise ClientError(400, message, code="too_many_choices", param="n")
        if request.stream_options is not None and not request.stream:
            message = "`stream_options` is only allowed when `stream` is true"
            raise ClientError(400, message, code="invalid_value", param="stream_options")
        if len(request.cache_salt or "") > MAX_SALT_CHARS:
            message = f"`cache_salt` has at most {MAX_SALT_CHARS} characters"
            raise ClientError(400, message, code="invalid_value", param="cache_salt")

    def _render(self, request: ChatRequest, model: ServedModel) -> str:
        try:
            messages = template_messages(request.messages)
            return model.template.render(
                messages,
                now=datetime.fromtimestamp(self._wall_clock(), UTC),
                add_generation_prompt=request.add_generation_prompt is not False,
                template_kwargs=request.chat_template_kwargs,
            )
        except MessagesError as error:
            raise ClientError(
                400, error.message, code="invalid_messages", param=error.param
            ) from None
        except TemplateError as error:
            message = f"the chat template failed: {error}"
            raise ClientError(400, message, code="template_error", param="messages") from None

    def _prepared(
        self,
        request: ChatRequest | CompletionRequest,
        request_id: str,
        model: ServedModel,
        prompts: list[list[int]],
        limit: int | None,
        kind: str,
    ) -> Prepared:
        n = 1 if request.n is None else request.n
        seed = request.seed if request.seed is not None else self._rng.randrange(_SEED_SPACE)
        specs = []
        for p, ids in enumerate(prompts):
            max_tokens = _max_tokens(request, limit, len(ids), model, kind)
            prompt = Tokens(pack_ids(ids))
            for i in range(n):
                index = p * n + i
                specs.append(
                    ChoiceSpec(
                        choice=choice_id(request_id, index),
                        index=index,
                        model=model.name,
                        prompt=prompt,
                        num_prompt_tokens=len(ids),
                        sampling=_sampling(request, model, max_tokens, seed + i),
                        model_digest=model.model_digest,
                        cache_salt=request.cache_salt or "",
                    )
                )
        options = request.stream_options
        answer = Answer(
            "chat" if kind == "chat" else "text", request_id, model.name, int(self._wall_clock())
        )
        include_usage = bool(options is not None and options.include_usage)
        return Prepared(answer, specs, n, bool(request.stream), include_usage)


def _model_name(request: SamplingFields) -> str:
    if not request.model:
        raise ClientError(400, "`model` is required", code="missing_parameter", param="model")
    return request.model


async def _encode(
    model: ServedModel, texts: list[str], param: str, *, add_special_tokens: bool
) -> list[list[int]]:
    """Long texts, and many short ones, in a thread."""

    def encode() -> list[list[int]]:
        one = model.tokenizer.encode
        return [one(text, add_special_tokens=add_special_tokens) for text in texts]

    try:
        if sum(map(len, texts)) < LONG_TEXT_CHARS:
            return encode()
        return await asyncio.to_thread(encode)
    except ValueError as error:  # half a surrogate pair
        raise ClientError(400, str(error), code="invalid_value", param=param) from None


async def _prompts(request: CompletionRequest, model: ServedModel) -> list[list[int]]:
    """A string, token ids, or a list of either."""
    prompt = request.prompt
    if isinstance(prompt, str):
        return await _encode(model, [prompt], "prompt", add_special_tokens=True)
    if not prompt:
        raise ClientError(400, "`prompt` is empty", code="invalid_value", param="prompt")
    texts = [part for part in prompt if isinstance(part, str)]
    if len(texts) == len(prompt):
        return await _encode(model, texts, "prompt", add_special_tokens=True)
    ids = [part for part in prompt if isinstance(part, int)]
    if len(ids) == len(prompt):
        return [_checked_ids(ids, model)]
    batch = [part for part in prompt if isinstance(part, list)]
    if len(batch) == len(prompt):
        return [_checked_ids(part, model) for part in batch]
    message = "`prompt` must be a string, token ids, or a list of either, not mixed"
    raise ClientError(400, message, code="invalid_type", param="prompt")


def _checked_ids(ids: list[int], model: ServedModel) -> list[int]:
    vocab = model.tokenizer.vocab_size
    if not ids:
        raise ClientError(400, "`prompt` has no tokens", code="invalid_value", param="prompt")
    low, high = min(ids), max(ids)
    if low < 0 or high >= vocab:
        wrong = low if low < 0 else high
        message = f"token id {wrong} is outside the vocabulary of {vocab}"
        raise ClientError(400, message, code="invalid_value", param="prompt")
    return ids


def _max_tokens(
    request: SamplingFields, limit: int | None, num_prompt: int, model: ServedModel, kind: str
) -> int:
    name = "max_completion_tokens" if limit is not None else "max_tokens"
    wanted = limit if limit is not None else request.max_tokens
    room = model.max_context - num_prompt
    if num_prompt == 0:
        raise ClientError(400, "the prompt has no tokens", code="invalid_value", param="prompt")
    if room < 1:
        message = (
            f"the prompt has {num_prompt} tokens; this model's context is {model.max_context}"
            " tokens, prompt and completion together"
        )
        param = "messages" if kind == "chat" else "prompt"
        raise ClientError(400, message, code="context_length_exceeded", param=param)
    if wanted is None:
        default = model.defaults.max_tokens or (room if kind == "chat" else COMPLETION_MAX_TOKENS)
        return min(default, room)
    if wanted < 1:
        raise ClientError(400, f"`{name}` must be at least 1", code="invalid_value", param=name)
    if wanted > room:
        message = (
            f"{num_prompt} prompt tokens and `{name}` {wanted} exceed this model's context of "
            f"{model.max_context} tokens"
        )
        raise ClientError(400, message, code="context_length_exceeded", param=name)
    return wanted


def _sampling(request: SamplingFields, model: ServedModel, max_tokens: int, seed: int) -> Sampling:
    defaults = model.defaults
    temperature = defaults.temperature if request.temperature is None else request.temperature
    top_p = defaults.top_p if request.top_p is None else request.top_p
    top_k = defaults.top_k if request.top_k is None else request.top_k
    min_tokens = request.min_tokens or 0
    _in_range("temperature", temperature, 0.0, 2.0)
    _in_range("top_p", top_p, 0.0, 1.0)
    _in_range("top_k", top_k, -1, 1 << 31)
    _in_range("min_tokens", min_tokens, 0, max_tokens)
    if top_p == 0.0:
        raise ClientError(400, "`top_p` must be above 0", code="invalid_value", param="top_p")
    return Sampling(
        max_tokens=max_tokens,
        temperature=float(temperature),
        top_p=float(top_p),
        top_k=max(top_k, 0),
        seed=seed % _SEED_SPACE,
        stop=_stops(request),
        stop_token_ids=_stop_ids(request, model),
        min_tokens=min_tokens,
        ignore_eos=bool(request.ignore_eos),
        include_stop=bool(request.include_stop_str_in_output),
        skip_special_tokens=request.skip_special_tokens is not False,
    )


def _in_range(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        message = f"`{name}` must be from {low:g} to {high:g}"
        raise ClientError(400, message, code="invalid_value", param=name)


def _stop_ids(request: SamplingFields, model: ServedModel) -> list[int]:
    ids = request.stop_token_ids or []
    vocab = model.tokenizer.vocab_size
    if len(ids) > MAX_STOP_IDS or not all(0 <= token_id < vocab for token_id in ids):
        message = f"`stop_token_ids` takes at most {MAX_STOP_IDS} ids from 0 to {vocab - 1}"
        raise ClientError(400, message, code="invalid_value", param="stop_token_ids")
    return ids


def _stops(request: SamplingFields) -> list[str]:
    stop = [request.stop] if isinstance(request.stop, str) else request.stop or []
    if len(stop) > MAX_STOPS or any(len(text) > MAX_STOP_CHARS for text in stop):
        message = f"`stop` takes at most {MAX_STOPS} strings of {MAX_STOP_CHARS} characters"
        raise ClientError(400, message, code="invalid_value", param="stop")
    if not all(stop):
        raise ClientError(400, "`stop` has an empty string", code="invalid_value", param="stop")
    return stop
