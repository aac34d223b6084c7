"""OpenAI's answer objects as bytes: chunk templates for streams, whole bodies for the rest.

A chunk is a constant head, the JSON of one string, and a constant tail; the constants are made once
per choice. Optional objects are omitted, never null; `finish_reason` is null until the last chunk,
because clients look at it.
"""

from typing import Any, Final, Literal

import msgspec

Kind = Literal["chat", "text"]

_encode: Final = msgspec.json.Encoder().encode
_CHUNK_OBJECT: Final = {"chat": "chat.completion.chunk", "text": "text_completion"}
_OBJECT: Final = {"chat": "chat.completion", "text": "text_completion"}
DONE: Final = b"[DONE]"
_FINISH: Final = b',"finish_reason":'
"""The last field of every choice."""


class Answer:
    """What every chunk and the whole body of one request have in common."""

    def __init__(self, kind: Kind, request_id: str, model: str, created: int) -> None:
        prefix = "chatcmpl-" if kind == "chat" else "cmpl-"
        self.kind: Kind = kind
        self.id = f"{prefix}{request_id}"
        self.model = model
        self.created = created

    def head(self, object_name: str) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": object_name,
            "created": self.created,
            "model": self.model,
        }

    def usage_chunk(self, usage: dict[str, Any]) -> bytes:
        """The last chunk of a stream with `include_usage`: no choices, only usage."""
        return _encode({**self.head(_CHUNK_OBJECT[self.kind]), "choices": [], "usage": usage})

    def body(self, choices: list[dict[str, Any]], usage: dict[str, Any]) -> bytes:
        return _encode({**self.head(_OBJECT[self.kind]), "choices": choices, "usage": usage})


class ChunkTemplate:
    """Chunks of one choice."""

    __slots__ = ("_first", "_head", "_kind", "_mid", "_tail")

    def __init__(self, answer: Answer, index: int) -> None:
        head = _encode(answer.head(_CHUNK_OBJECT[answer.kind]))[:-1]
        opening = head + b',"choices":[{"index":' + str(index).encode()
        self._kind = answer.kind
        self._first = answer.kind == "chat"
        if answer.kind == "chat":
            self._head = opening + b',"delta":{'
            self._mid = b"}" + _FINISH
        else:
            self._head = opening + b',"text":'
            self._mid = _FINISH
        self._tail = b"null}]}"

    def chunk(self, text: str, finish: str = "") -> bytes:
        """One chunk; the first one of a chat choice also says the role."""
        if self._kind == "text":
            inner = _encode(text)
        elif self._first:
            self._first = False
            inner = b'"role":"assistant","content":' + _encode(text)
        elif text or not finish:
            inner = b'"content":' + _encode(text)
        else:
            inner = b""
        if finish:
            return self._head + inner + self._mid + _encode(finish) + b"}]}"
        return self._head + inner + self._mid + self._tail

    def around(self) -> tuple[bytes, bytes]:
        """What stands before and after the JSON of the text in every chunk but the first and the
        last."""
        before = self._head if self._kind == "text" else self._head + b'"content":'
        return before, self._mid + self._tail

    def chunk_with(self, text: str, finish: str, logprobs: bytes) -> bytes:
        """The same with the JSON of its tokens' log-probabilities."""
        plain = self.chunk(text, finish)
        at = plain.rindex(_FINISH)
        return plain[:at] + b',"logprobs":' + (logprobs or b"null") + plain[at:]


def whole_choice(
    kind: Kind, index: int, text: str, finish: str, logprobs: bytes = b""
) -> dict[str, Any]:
    """One entry of `choices` in an answer that is not streamed."""
    choice: dict[str, Any] = {"index": index}
    if kind == "chat":
        choice["message"] = {"role": "assistant", "content": text}
    else:
        choice["text"] = text
    if logprobs:
        choice["logprobs"] = msgspec.Raw(logprobs)
    choice["finish_reason"] = finish
    return choice


def usage(prompt_tokens: int, completion_tokens: int, cached_tokens: int) -> dict[str, Any]:
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": cached_tokens},
    }


def to_json(value: Any) -> bytes:
    return _encode(value)
