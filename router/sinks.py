"""Listeners of a whole request: one for streams, one for answers in a piece.

A sink joins the choices of a request, keeps the sums for `usage`, and cancels the rest when one
choice fails. It writes through a `ChunkWriter` and never waits.
"""

import asyncio
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from protocol.errors import ClientError
from protocol.out import Delta
from router.answers import DONE, Answer, ChunkTemplate, to_json, usage, whole_choice
from router.choices import Choice, ChoiceSpec


class ChunkWriter(Protocol):
    """Where a stream's chunks go: a socket (SSE) or a reply inbox."""

    def write(self, chunk: bytes) -> None:
        """Send one JSON chunk; never waits."""

    def fail(self, error: ClientError) -> None:
        """The request failed; before the first chunk the writer can still answer with a status."""

    def finish(self) -> None:
        """All was written."""


class Usage:
    """Sums over the choices of a request; a prompt shared by `n` choices counts once."""

    def __init__(self, specs: Sequence[ChoiceSpec], n: int) -> None:
        self._n = n
        self._prompt = sum(spec.num_prompt_tokens for spec in specs[::n])
        self._completion = 0
        self._cached: dict[int, int] = {}

    def add(self, choice: Choice) -> None:
        self._completion += len(choice.output)
        group = choice.spec.index // self._n
        cached = min(choice.cached_tokens, choice.spec.num_prompt_tokens)
        self._cached[group] = max(self._cached.get(group, 0), cached)

    def as_dict(self) -> dict[str, Any]:
        return usage(self._prompt, self._completion, sum(self._cached.values()))


class _Joined:
    """The part both sinks share: count the open choices, end once, cancel the rest on failure."""

    def __init__(
        self, answer: Answer, specs: Sequence[ChoiceSpec], n: int, cancel: Callable[[str], None]
    ) -> None:
        self.answer = answer
        self.specs = specs
        self._usage = Usage(specs, n)
        self._open = {spec.choice for spec in specs}
        self._cancel = cancel
        self._over = False

    def cancel_all(self) -> None:
        """The client went, or one choice failed: nobody listens to the others."""
        self._over = True
        for choice in list(self._open):
            self._cancel(choice)

    def _closed(self, choice: Choice) -> bool:
        """Count one ended choice; True when it was the last of a request that is not over."""
        self._open.discard(choice.id)
        self._usage.add(choice)
        return not self._open and not self._over


class StreamSink(_Joined):
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
        self._writer = writer
        self._include_usage = include_usage

    def delta(self, choice: Choice, delta: Delta) -> None:
        if delta.text or delta.finish:
            chunk = self._templates[choice.spec.index].chunk(delta.text, delta.finish)
            if not self._over:
                self._writer.write(chunk)

    def ended(self, choice: Choice, error: ClientError | None) -> None:
        last = self._closed(choice)
        if error is not None:
            if not self._over:
                self.cancel_all()
                self._writer.fail(error)
        elif last:
            if self._include_usage:
                self._writer.write(self.answer.usage_chunk(self._usage.as_dict()))
            self._over = True
            self._writer.finish()


class CollectSink(_Joined):
    """Gathers whole texts; `done` holds the body's bytes or the error."""

    def __init__(
        self, answer: Answer, specs: Sequence[ChoiceSpec], n: int, cancel: Callable[[str], None]
    ) -> None:
        super().__init__(answer, specs, n, cancel)
        self._texts: list[list[str]] = [[] for _ in specs]
        self._finish = [""] * len(specs)
        self.done: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()

    def delta(self, choice: Choice, delta: Delta) -> None:
        index = choice.spec.index
        if delta.text:
            self._texts[index].append(delta.text)
        if delta.finish:
            self._finish[index] = delta.finish

    def ended(self, choice: Choice, error: ClientError | None) -> None:
        last = self._closed(choice)
        if error is not None:
            if not self._over:
                self.cancel_all()
                if not self.done.done():
                    self.done.set_exception(error)
        elif last and not self.done.done():
            self.done.set_result(self._body())

    def _body(self) -> bytes:
        choices = [
            whole_choice(self.answer.kind, i, "".join(texts), finish)
            for i, (texts, finish) in enumerate(zip(self._texts, self._finish, strict=True))
        ]
        return self.answer.body(choices, self._usage.as_dict())


def error_json(error: ClientError, request_id: str) -> bytes:
    return to_json(error.body(request_id))


__all__ = ["DONE", "ChunkWriter", "CollectSink", "StreamSink", "Usage", "error_json"]
