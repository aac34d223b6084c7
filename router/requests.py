"""From a client's body to choices ready to be scheduled: check, render, tokenize, resolve.

Whatever is wrong is a ClientError before anything is reserved. Long texts are tokenized in a
thread (the tokenizer lets go of the GIL); short ones on the loop, where a thread would cost more.
"""

import asyncio
import random
from collections import Counter
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Final

from msgspec import Struct
from msgspec.structs import replace

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
from router.answers import Answer, Kind
from router.catalog import Catalog, ServedModel
from router.choices import ChoiceSpec
from router.details import Wanted
from router.echo import Echo, echo_of
from router.grammar_options import grammar_of
from router.sampling_options import SEED_SPACE, check_min_tokens, in_range, invalid, resolve
from text.chat import MessagesError, template_messages
from text.template import TemplateError
from text.tokenizer import LONG_TEXT_CHARS

COMPLETION_MAX_TOKENS: Final = 16
MAX_N: Final = 128
MAX_SALT_CHARS: Final = 256
LONG_PROMPT_TOKENS: Final = 4096
"""From here on decoding a prompt takes milliseconds."""
MAX_ENTRIES: Final = 1 << 18
"""Log-probabilities of echoed prompts in one answer: each a string and a number of JSON."""
MAX_STREAMED_ENTRIES: Final = 1 << 16
"""The same of a stream, which is written on the loop: a tenth of a second for the others."""


class Prepared(Struct, frozen=True):
    """One request, checked and tokenized."""

    answer: Answer
    specs: Sequence[ChoiceSpec]
    n: int
    stream: bool
    include_usage: bool
    wanted: Wanted | None = None
    """What it wants beside text; None for most."""


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
        return self._prepared(request, request_id, model, [ids])

    async def completion(self, body: bytes, request_id: str) -> Prepared:
        """`/v1/completions`. Raises ClientError."""
        request = decode_completion(body)
        prompt = request.prompt
        is_batch = isinstance(prompt, list) and not isinstance(next(iter(prompt), 0), int)
        self._check(request, num_prompts=len(prompt) if is_batch else 1)
        model = await self._catalog.served(_model_name(request))
        prompts = await _prompts(request, model)
        echoes = await _echoes(request, model, prompts) if request.echo else ()
        return self._prepared(request, request_id, model, prompts, echoes)

    def _check(self, request: SamplingFields, *, num_prompts: int) -> None:
        """What can be said before anything costs time. Raises ClientError."""
        n = 1 if request.n is None else request.n
        in_range("n", n, 1, MAX_N)
        if isinstance(request, CompletionRequest) and request.best_of not in (None, 1, n):
            raise invalid("best_of", "`best_of` must be 1 or `n`: no choice is thrown away")
        if n * num_prompts > self._max_choices:
            message = f"{n * num_prompts} choices in one request; at most {self._max_choices}"
            raise ClientError(400, message, code="too_many_choices", param="n")
        if request.stream_options is not None and not request.stream:
            message = "`stream_options` is only allowed when `stream` is true"
            raise invalid("stream_options", message)
        if len(request.cache_salt or "") > MAX_SALT_CHARS:
            raise invalid("cache_salt", f"`cache_salt` has at most {MAX_SALT_CHARS} characters")

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
        echoes: Sequence[Echo] = (),
    ) -> Prepared:
        n = 1 if request.n is None else request.n
        seed = request.seed if request.seed is not None else self._rng.randrange(SEED_SPACE)
        grammar, grammar_param = grammar_of(request)
        common = resolve(request, model.defaults, model.tokenizer.vocab_size, grammar)
        scores_only = bool(echoes) and request.max_tokens == 0
        if echoes:
            limit = MAX_STREAMED_ENTRIES if request.stream else MAX_ENTRIES
            _check_entries(n * sum(map(len, prompts)) * (common.logprobs + 1), limit)
        siblings = _siblings(prompts, n, request_id)
        specs = []
        for p, ids in enumerate(prompts):
            max_tokens = _max_tokens(request, len(ids), model, scores_only=scores_only)
            check_min_tokens(common.min_tokens, 0 if scores_only else max_tokens)
            prompt = Tokens(pack_ids(ids))
            for i in range(n):
                sampling = replace(
                    common,
                    max_tokens=max_tokens,
                    seed=(seed + i) % SEED_SPACE,
                    prompt_logprobs=common.logprobs if echoes and i == 0 else -1,
                )
                specs.append(
                    ChoiceSpec(
                        choice=choice_id(request_id, p * n + i),
                        index=p * n + i,
                        model=model.name,
                        prompt=prompt,
                        num_prompt_tokens=len(ids),
                        sampling=sampling,
                        model_digest=model.model_digest,
                        cache_salt=request.cache_salt or "",
                        siblings=siblings[p],
                        scores_only=scores_only,
                        grammar_param=grammar_param,
                    )
                )
        options = request.stream_options
        kind: Kind = "chat" if isinstance(request, ChatRequest) else "text"
        answer = Answer(kind, request_id, model.name, int(self._wall_clock()))
        include_usage = bool(options is not None and options.include_usage)
        wanted = _wanted(common, model, echoes)
        return Prepared(answer, specs, n, bool(request.stream), include_usage, wanted)


def _wanted(common: Sampling, model: ServedModel, echoes: Sequence[Echo]) -> Wanted | None:
    if common.logprobs < 0 and not echoes:
        return None
    skip = common.skip_special_tokens
    return Wanted(model.tokenizer, model.names, common.logprobs >= 0, skip, echoes)


def _siblings(prompts: list[list[int]], n: int, request_id: str) -> list[str]:
    """For each prompt the name that it shares with its equals; empty where it has one choice."""
    if len(prompts) == 1:
        return [request_id if n > 1 else ""]
    firsts: dict[tuple[int, ...], int] = {}
    found = [firsts.setdefault(tuple(ids), p) for p, ids in enumerate(prompts)]
    counts = Counter(found)
    return [f"{request_id}/{first}" if n * counts[first] > 1 else "" for first in found]


def _check_entries(entries: int, limit: int) -> None:
    """Raises ClientError."""
    if entries > limit:
        message = f"`logprobs` of echoed prompts: {entries} numbers; at most {limit} in one answer"
        raise invalid("logprobs", message)


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
        raise invalid("prompt", "`prompt` is empty")
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


async def _echoes(
    request: CompletionRequest, model: ServedModel, prompts: list[list[int]]
) -> list[Echo]:
    """Long prompts, and many short ones, in a thread."""
    given = [request.prompt] if isinstance(request.prompt, str) else request.prompt
    texts = [part for part in given if isinstance(part, str)]

    def echoes() -> list[Echo]:
        return [
            echo_of(
                texts[p] if texts else None,
                ids,
                model.tokenizer,
                skip_special_tokens=request.skip_special_tokens is not False,
                with_offsets=request.logprobs is not None,
            )
            for p, ids in enumerate(prompts)
        ]

    if sum(map(len, prompts)) < LONG_PROMPT_TOKENS:
        return echoes()
    return await asyncio.to_thread(echoes)


def _checked_ids(ids: list[int], model: ServedModel) -> list[int]:
    vocab = model.tokenizer.vocab_size
    if not ids:
        raise invalid("prompt", "`prompt` has no tokens")
    low, high = min(ids), max(ids)
    if low < 0 or high >= vocab:
        wrong = low if low < 0 else high
        raise invalid("prompt", f"token id {wrong} is outside the vocabulary of {vocab}")
    return ids


def _max_tokens(
    request: ChatRequest | CompletionRequest,
    num_prompt: int,
    model: ServedModel,
    *,
    scores_only: bool,
) -> int:
    """As the wire says it: a worker makes at least one token."""
    is_chat = isinstance(request, ChatRequest)
    limit = request.max_completion_tokens if isinstance(request, ChatRequest) else None
    name = "max_completion_tokens" if limit is not None else "max_tokens"
    wanted = limit if limit is not None else request.max_tokens
    room = model.max_context - num_prompt
    if num_prompt == 0:
        raise invalid("prompt", "the prompt has no tokens")
    if room < 1:
        message = (
            f"the prompt has {num_prompt} tokens; this model's context is {model.max_context}"
            " tokens, prompt and completion together"
        )
        param = "messages" if is_chat else "prompt"
        raise ClientError(400, message, code="context_length_exceeded", param=param)
    if scores_only:
        return 1
    if wanted is None:
        default = model.defaults.max_tokens or (room if is_chat else COMPLETION_MAX_TOKENS)
        return min(default, room)
    if wanted < 1:
        raise invalid(name, f"`{name}` must be at least 1 (0 goes with `echo` only)")
    if wanted > room:
        message = (
            f"{num_prompt} prompt tokens and `{name}` {wanted} exceed this model's context of "
            f"{model.max_context} tokens"
        )
        raise ClientError(400, message, code="context_length_exceeded", param=name)
    return wanted
