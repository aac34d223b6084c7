import json
from typing import Any

import pytest

from router.answers import Answer, ChunkTemplate, Kind, usage, whole_choice

NASTY = ['"', "\\", "\n\r\t\x00", "é漢😀", "</script>", "\u2028", "data: x\n\n", ""]


def answer(kind: Kind) -> Answer:
    return Answer(kind, "r1", 'org/"m"', 123)


def parsed(chunk: bytes) -> dict[str, Any]:
    value: dict[str, Any] = json.loads(chunk)
    return value


@pytest.mark.parametrize("text", NASTY)
@pytest.mark.parametrize("kind", ["chat", "text"])
def test_any_text_passes_through_a_chunk_and_takes_one_line(kind: Kind, text: str) -> None:
    template = ChunkTemplate(answer(kind), 3)
    for _ in range(2):
        chunk = template.chunk(text)
        [choice] = parsed(chunk)["choices"]
        assert (choice["delta"]["content"] if kind == "chat" else choice["text"]) == text
        assert (choice["index"], choice["finish_reason"]) == (3, None)
        assert b"\n" not in chunk
        assert b"\r" not in chunk


def test_chunks_of_a_chat() -> None:
    template = ChunkTemplate(answer("chat"), 0)
    head = {
        "id": "chatcmpl-r1",
        "object": "chat.completion.chunk",
        "created": 123,
        "model": 'org/"m"',
    }

    def expected(delta: dict[str, str], finish: str | None) -> dict[str, Any]:
        return {**head, "choices": [{"index": 0, "delta": delta, "finish_reason": finish}]}

    first = {"role": "assistant", "content": "a"}
    assert parsed(template.chunk("a")) == expected(first, None)
    assert parsed(template.chunk("b")) == expected({"content": "b"}, None)
    assert parsed(template.chunk("c", "length")) == expected({"content": "c"}, "length")
    assert parsed(template.chunk("", "stop")) == expected({}, "stop")


def test_a_chat_that_ends_with_its_first_chunk_still_has_a_role() -> None:
    [choice] = parsed(ChunkTemplate(answer("chat"), 0).chunk("", "stop"))["choices"]
    assert choice["delta"] == {"role": "assistant", "content": ""}
    assert choice["finish_reason"] == "stop"


def test_chunks_of_a_completion() -> None:
    template = ChunkTemplate(answer("text"), 1)
    chunk = parsed(template.chunk("a", "stop"))
    assert (chunk["id"], chunk["object"]) == ("cmpl-r1", "text_completion")
    assert chunk["choices"] == [{"index": 1, "text": "a", "finish_reason": "stop"}]


@pytest.mark.parametrize("kind", ["chat", "text"])
def test_the_usage_chunk_has_no_choices(kind: Kind) -> None:
    chunk = parsed(answer(kind).usage_chunk(usage(3, 4, 2)))
    assert chunk["choices"] == []
    assert chunk["usage"] == {
        "prompt_tokens": 3,
        "completion_tokens": 4,
        "total_tokens": 7,
        "prompt_tokens_details": {"cached_tokens": 2},
    }
    assert chunk["object"] == parsed(ChunkTemplate(answer(kind), 0).chunk("x"))["object"]


@pytest.mark.parametrize("text", NASTY)
def test_whole_answers(text: str) -> None:
    chat = answer("chat")
    body = parsed(chat.body([whole_choice("chat", 0, text, "stop")], usage(1, 1, 0)))
    message = {"role": "assistant", "content": text}
    assert body["object"] == "chat.completion"
    assert body["choices"] == [{"index": 0, "message": message, "finish_reason": "stop"}]
    body = parsed(answer("text").body([whole_choice("text", 2, text, "length")], usage(1, 1, 0)))
    assert body["object"] == "text_completion"
    assert body["choices"] == [{"index": 2, "text": text, "finish_reason": "length"}]


@pytest.mark.parametrize("finish", ["", "stop"])
@pytest.mark.parametrize("kind", ["chat", "text"])
def test_logprobs_stand_beside_the_text(kind: Kind, finish: str) -> None:
    plain, both = ChunkTemplate(answer(kind), 3), ChunkTemplate(answer(kind), 3)
    for text in ('a,"finish_reason":null', ""):
        expected = parsed(plain.chunk(text, finish))
        expected["choices"][0]["logprobs"] = {"x": [1]}
        assert parsed(both.chunk_with(text, finish, b'{"x":[1]}')) == expected
    assert parsed(both.chunk_with("a", finish, b""))["choices"][0]["logprobs"] is None


@pytest.mark.parametrize("kind", ["chat", "text"])
def test_logprobs_of_whole_answers(kind: Kind) -> None:
    choice = whole_choice(kind, 0, "a", "stop", b'{"x":[1]}')
    body = parsed(answer(kind).body([choice], usage(1, 1, 0)))
    assert body["choices"][0]["logprobs"] == {"x": [1]}
    assert "logprobs" not in whole_choice(kind, 0, "a", "stop")
