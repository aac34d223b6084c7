import json

import pytest

from protocol.blocks import pack_ids
from protocol.errors import ClientError
from protocol.jobs import Tokens
from protocol.out import Delta, Finish
from protocol.sampling import Sampling
from router.answers import Answer
from router.choices import Choice, ChoiceSpec
from router.sinks import CollectSink, JoinedSink, StreamSink
from tests.unit.router.said import Said

ERROR = ClientError(502, "broken", code="worker_failed")


class Request:
    """Choices of one request, and which of them were cancelled."""

    def __init__(self, *, prompts: int = 1, n: int = 1) -> None:
        self.n = n
        self.cancelled: list[str] = []
        self.specs = [
            ChoiceSpec(f"r/{i}", i, "m", Tokens(pack_ids([1])), 10 + i // n, Sampling(5))
            for i in range(prompts * n)
        ]
        self.said = Said()
        self.choices: list[Choice] = []

    def cancel(self, choice: str) -> None:
        """As the driver does it: the end comes at once."""
        self.cancelled.append(choice)
        index = int(choice.rpartition("/")[2])
        gone = ClientError(499, "cancelled", code="cancelled")
        self.choices[index].sink.ended(self.choices[index], gone)

    def _run(self, sink: JoinedSink) -> None:
        self.choices = [Choice(spec, sink, 0.0) for spec in self.specs]

    def stream(self, *, include_usage: bool = False) -> StreamSink:
        answer = Answer("text", "r", "m", 1)
        sink = StreamSink(
            answer, self.specs, self.n, self.cancel, self.said, include_usage=include_usage
        )
        self._run(sink)
        return sink

    def collect(self) -> CollectSink:
        sink = CollectSink(Answer("text", "r", "m", 1), self.specs, self.n, self.cancel)
        self._run(sink)
        return sink

    def token(self, index: int, text: str, finish: Finish = "") -> None:
        choice = self.choices[index]
        delta = Delta(1, len(choice.output), [7], text, finish)
        choice.output.append(7)
        choice.sink.delta(choice, delta)

    def end(self, index: int, error: ClientError | None = None) -> None:
        self.choices[index].sink.ended(self.choices[index], error)


def test_a_stream_finishes_with_its_last_choice() -> None:
    request = Request(n=2)
    sink = request.stream(include_usage=True)
    request.token(1, "b", "stop")
    request.end(1)
    assert request.said.ends == []
    request.token(0, "a", "length")
    request.end(0)
    assert request.said.ends == [None]
    assert sink.over
    assert [c["choices"][0]["index"] for c in request.said.chunks[:2]] == [1, 0]
    usage = request.said.chunks[2]
    assert usage["choices"] == []
    assert usage["usage"]["completion_tokens"] == 2
    assert request.cancelled == []


def test_tokens_without_text_make_no_chunk() -> None:
    request = Request()
    request.stream()
    request.token(0, "")
    request.token(0, "", "stop")
    [chunk] = request.said.chunks
    assert chunk["choices"][0]["finish_reason"] == "stop"


def test_one_failed_choice_ends_the_stream_and_cancels_the_others() -> None:
    request = Request(n=3)
    sink = request.stream()
    request.token(0, "a")
    request.end(1, ERROR)
    assert request.said.ends == [ERROR]
    assert sorted(request.cancelled) == ["r/0", "r/2"]
    request.token(0, "late")
    request.end(2, ERROR)
    assert len(request.said.chunks) == 1
    assert request.said.ends == [ERROR]
    assert sink.over


def test_a_cancelled_stream_says_nothing_more() -> None:
    request = Request(n=2)
    sink = request.stream()
    request.token(0, "a")
    sink.cancel_all()
    assert sorted(request.cancelled) == ["r/0", "r/1"]
    request.token(1, "late")
    sink.cancel_all()
    sink.abort(ERROR)
    assert request.said.ends == []
    assert len(request.said.chunks) == 1
    assert len(request.cancelled) == 2


async def test_a_whole_answer_is_there_when_all_choices_are() -> None:
    request = Request(prompts=2, n=2)
    sink = request.collect()
    for index in (3, 0, 2, 1):
        request.token(index, f"<{index}")
        request.token(index, ">", "stop")
        assert not sink.done.is_set()
        request.choices[index].cached_tokens = 4 + index
        request.end(index)
    assert sink.done.is_set()
    body = json.loads(sink.body())
    assert [choice["text"] for choice in body["choices"]] == ["<0>", "<1>", "<2>", "<3>"]
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2, 3]
    assert body["usage"]["prompt_tokens"] == 10 + 11  # each prompt once
    assert body["usage"]["completion_tokens"] == 8
    assert body["usage"]["prompt_tokens_details"]["cached_tokens"] == 4 + 6  # what all found


async def test_a_whole_answer_fails_with_its_first_error() -> None:
    request = Request(n=2)
    sink = request.collect()
    request.token(0, "a")
    sink.abort(ERROR)
    sink.abort(ClientError(500, "second", code="internal_error"))
    assert sink.done.is_set()
    with pytest.raises(ClientError) as error:
        sink.body()
    assert error.value is ERROR
    assert sorted(request.cancelled) == ["r/0", "r/1"]


async def test_a_cancelled_whole_answer_is_never_done() -> None:
    request = Request()
    sink = request.collect()
    sink.cancel_all()
    assert request.cancelled == ["r/0"]
    assert not sink.done.is_set()


async def test_cached_tokens_are_never_more_than_the_prompt() -> None:
    request = Request()
    sink = request.collect()
    request.choices[0].cached_tokens = 1000
    request.token(0, "a", "stop")
    request.end(0)
    assert json.loads(sink.body())["usage"]["prompt_tokens_details"]["cached_tokens"] == 10
