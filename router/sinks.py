"""Listeners of a whole request: one for streams, one for answers in a piece.

A sink joins the choices of a request, keeps the sums for `usage`, and cancels the rest when one
choice fails. It writes through a `ChunkWriter` and never waits.
"""

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from protocol.errors import ClientError
from protocol.out import Delta
from router.answers import Answer, ChunkTemplate, to_json, usage, whole_choice
from router.choices import Choice, ChoiceSpec
from router.details import Details, Piece, Wanted
from router.requests import Prepared


class ChunkWriter(Protocol):
    """Where a stream's chunks go: a socket (SSE) or a reply inbox."""

    def write(self, chunk: bytes) -> None:
        """Send one JSON chunk; never waits."""

    def splice(self, before: bytes, after: bytes) -> Callable[[bytes], None]:
        """The same for chunks that differ only in their middle, which the result takes."""

    def fail(self, error: ClientError) -> None:
        """The request failed; before the first chunk the writer can still answer with a status."""

    def finish(self) -> None:
        """All was written."""


class Usage:
    """Sums over the choices of a request; a prompt shared by `n` choices counts once.

    Cached is what all of them found: what one has computed for the others was not there before.
    """

    def __init__(self, specs: Sequence[ChoiceSpec], n: int) -> None:
        self._n = n
        self._prompt = sum(spec.num_prompt_tokens for spec in specs[::n])
        self._completion = 0
        self._cached: dict[int, int] = {}

    def add(self, choice: Choice) -> None:
        self._completion += choice.num_shown
        group = choice.spec.index // self._n
        cached = min(choice.cached_tokens, choice.spec.num_prompt_tokens)
        self._cached[group] = min(self._cached.get(group, cached), cached)

    def as_dict(self) -> dict[str, Any]:
        return usage(self._prompt, self._completion, sum(self._cached.values()))


class JoinedSink(ABC):
    """What both sinks share: count the open choices, end once, cancel the rest on failure."""

    def __init__(
        self, answer: Answer, specs: Sequence[ChoiceSpec], n: int, cancel: Callable[[str], None]
    ) -> None:
        self.answer = answer
        self.over = False
        """Completed, failed or cancelled: whatever comes now is not heard."""
        self._usage = Usage(specs, n)
        self._open = {spec.choice for spec in specs}
        self._cancel = cancel

    @abstractmethod
    def delta(self, choice: Choice, delta: Delta) -> None:
        """New output of one choice."""

    def ended(self, choice: Choice, error: ClientError | None) -> None:
        self._open.discard(choice.id)
        self._usage.add(choice)
        if self.over:
            return
        if error is not None:
            self.abort(error)
        elif not self._open:
            self.over = True
            self._complete()

    def cancel_all(self) -> None:
        """Nobody listens any more: the client went, or one choice failed."""
        self.over = True
        for choice in list(self._open):
            self._cancel(choice)

    def abort(self, error: ClientError) -> None:
        """End the request with `error`, unless it is over."""
        if self.over:
            return
        self.cancel_all()
        self._fail(error)

    @abstractmethod
    def _complete(self) -> None:
        """All choices have ended well."""

    @abstractmethod
    def _fail(self, error: ClientError) -> None:
        """The request ends with `error`."""


class StreamSink(JoinedSink):
    """Turns deltas into chunks."""

    def __init__(
        self,
        answer: Answer,
        specs: Sequence[ChoiceSpec],
        n: int,
        cancel: Callable[[str], None],
        writer: ChunkWriter,
        *,
        include_usage: bool,
    ) -> None:
        super().__init__(answer, specs, n, cancel)
        self._templates = [ChunkTemplate(answer, spec.index) for spec in specs]
        self._splices: list[Callable[[bytes], None] | None] = [None for _ in specs]
        """Of choices that have had their first chunk."""
        self._writer = writer
        self._include_usage = include_usage

    def delta(self, choice: Choice, delta: Delta) -> None:
        index = choice.spec.index
        splice = self._splices[index]
        if splice is not None and not delta.finish:
            if delta.text and not self.over:
                splice(to_json(delta.text))
        elif (delta.text or delta.finish) and not self.over:
            template = self._templates[index]
            self._writer.write(template.chunk(delta.text, delta.finish))
            if not delta.finish:
                self._splices[index] = self._writer.splice(*template.around())

    def _complete(self) -> None:
        if self._include_usage:
            self._writer.write(self.answer.usage_chunk(self._usage.as_dict()))
        self._writer.finish()

    def _fail(self, error: ClientError) -> None:
        self._writer.fail(error)


class CollectSink(JoinedSink):
    """Gathers whole texts; `done` is set when `body` can say how it went."""

    def __init__(
        self, answer: Answer, specs: Sequence[ChoiceSpec], n: int, cancel: Callable[[str], None]
    ) -> None:
        super().__init__(answer, specs, n, cancel)
        self._texts: list[list[str]] = [[] for _ in specs]
        self._finish = [""] * len(specs)
        self._body = b""
        self._error: ClientError | None = None
        self.done = asyncio.Event()

    def delta(self, choice: Choice, delta: Delta) -> None:
        index = choice.spec.index
        if delta.text:
            self._texts[index].append(delta.text)
        if delta.finish:
            self._finish[index] = delta.finish

    def body(self) -> bytes:
        """The answer, once `done`. Raises the ClientError that it ended with."""
        if self._error is not None:
            raise self._error
        return self._body

    async def rendered(self) -> bytes:
        """The same, made without holding up the other streams."""
        return self.body()

    def _choices(self) -> list[dict[str, Any]]:
        return [
            whole_choice(self.answer.kind, i, "".join(texts), finish)
            for i, (texts, finish) in enumerate(zip(self._texts, self._finish, strict=True))
        ]

    def _complete(self) -> None:
        self._body = self.answer.body(self._choices(), self._usage.as_dict())
        self.done.set()

    def _fail(self, error: ClientError) -> None:
        self._error = error
        self.done.set()


class DetailedStreamSink(StreamSink):
    """Also writes prompts and log-probabilities. Tokens without text ride in the next chunk."""

    def __init__(
        self,
        answer: Answer,
        specs: Sequence[ChoiceSpec],
        n: int,
        cancel: Callable[[str], None],
        writer: ChunkWriter,
        *,
        include_usage: bool,
        wanted: Wanted,
    ) -> None:
        super().__init__(answer, specs, n, cancel, writer, include_usage=include_usage)
        self._details = Details(answer.kind, specs, n, wanted)
        self._with_logprobs = wanted.with_logprobs

    def delta(self, choice: Choice, delta: Delta) -> None:
        if self.over:
            return
        try:
            for piece in self._details.pieces(choice, delta):
                if piece.text or piece.finish:
                    self._writer.write(self._chunk(piece))
        except ClientError as error:
            self.abort(error)

    def _chunk(self, piece: Piece) -> bytes:
        template = self._templates[piece.index]
        if not self._with_logprobs:
            return template.chunk(piece.text, piece.finish)
        logprobs = self._details.logprobs(piece.index)
        return template.chunk_with(piece.text, piece.finish, logprobs)


class DetailedCollectSink(CollectSink):
    """Also gathers prompts and log-probabilities."""

    def __init__(
        self,
        answer: Answer,
        specs: Sequence[ChoiceSpec],
        n: int,
        cancel: Callable[[str], None],
        *,
        wanted: Wanted,
    ) -> None:
        super().__init__(answer, specs, n, cancel)
        self._details = Details(answer.kind, specs, n, wanted)

    def delta(self, choice: Choice, delta: Delta) -> None:
        if self.over:
            return
        try:
            for piece in self._details.pieces(choice, delta):
                self._texts[piece.index].append(piece.text)
                self._finish[piece.index] = piece.finish
        except ClientError as error:
            self.abort(error)

    def body(self) -> bytes:
        if self._error is None and not self._body:
            self._body = self.answer.body(self._choices(), self._usage.as_dict())
        return super().body()

    async def rendered(self) -> bytes:
        """In a thread: thousands of tokens with twenty others each take a while to write."""
        return await asyncio.to_thread(self.body)

    def _choices(self) -> list[dict[str, Any]]:
        return [
            whole_choice(self.answer.kind, i, "".join(texts), finish, self._details.logprobs(i))
            for i, (texts, finish) in enumerate(zip(self._texts, self._finish, strict=True))
        ]

    def _complete(self) -> None:
        self.done.set()


def stream_sink(
    prepared: Prepared, cancel: Callable[[str], None], writer: ChunkWriter
) -> StreamSink:
    """The listener of a request that is streamed through `writer`."""
    common = (prepared.answer, prepared.specs, prepared.n, cancel, writer)
    usage = prepared.include_usage
    if prepared.wanted is None:
        return StreamSink(*common, include_usage=usage)
    return DetailedStreamSink(*common, include_usage=usage, wanted=prepared.wanted)


def collect_sink(prepared: Prepared, cancel: Callable[[str], None]) -> CollectSink:
    """The listener of a request that is answered in a piece."""
    common = (prepared.answer, prepared.specs, prepared.n, cancel)
    if prepared.wanted is None:
        return CollectSink(*common)
    return DetailedCollectSink(*common, wanted=prepared.wanted)


def error_json(error: ClientError, request_id: str) -> bytes:
    return to_json(error.body(request_id))
