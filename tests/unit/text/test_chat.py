"""Messages: what templates take, and whose fault it is when they do not."""

from typing import Any

import pytest

from text.chat import MessagesError, template_messages


def test_messages_are_brought_into_the_form_of_templates() -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
    empty = {"id": "2", "function": {"name": "g", "arguments": ""}}
    messages = [
        {"role": "developer", "content": "be brief", "name": "me"},
        {"role": "user", "content": [{"type": "text", "text": "hi"}, "there"]},
        {"role": "assistant", "content": None, "tool_calls": [call, empty]},
        {"role": "tool", "content": "3", "tool_call_id": "1"},
        {"role": "assistant", "content": "", "tool_calls": None},
    ]

    assert template_messages(messages) == [
        {"role": "developer", "content": "be brief", "name": "me"},
        {
            "role": "user",
            "content": [{"type": "text", "text": "hi"}, {"type": "text", "text": "there"}],
        },
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [
                {"id": "1", "type": "function", "function": {"name": "f", "arguments": {"x": 1}}},
                {"id": "2", "function": {"name": "g", "arguments": {}}},
            ],
        },
        {"role": "tool", "content": "3", "tool_call_id": "1"},
        {"role": "assistant", "content": ""},
    ]
    assert call["function"] == {"name": "f", "arguments": '{"x": 1}'}


@pytest.mark.parametrize(
    ("messages", "param", "words"),
    [
        (None, "messages", "must be an array"),
        ("hi", "messages", "must be an array"),
        ([], "messages", "must not be empty"),
        (["hi"], "messages[0]", "must be an object"),
        ([{"content": "x"}], "messages[0].role", "has no role"),
        ([{"role": 3, "content": "x"}], "messages[0].role", "non-empty string"),
        ([{"role": "user"}], "messages[0].content", "is required"),
        ([{"role": "assistant", "tool_calls": []}], "messages[0].content", "is required"),
        ([{"role": "user", "content": 3}], "messages[0].content", "string or an array"),
        ([{"role": "user", "content": []}], "messages[0].content", "empty array"),
        ([{"role": "user", "content": [3]}], "messages[0].content[0]", "object"),
        ([{"role": "user", "content": [{}]}], "messages[0].content[0].type", "required"),
        (
            [{"role": "user", "content": [{"type": "text"}]}],
            "messages[0].content[0].text",
            "must be a string",
        ),
        (
            [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}],
            "messages[0].content[0].type",
            "'image_url' are not supported",
        ),
        (
            [{"role": "assistant", "tool_calls": "x"}],
            "messages[0].tool_calls",
            "must be an array",
        ),
        (
            [{"role": "assistant", "tool_calls": [{}]}],
            "messages[0].tool_calls[0].function",
            "must be an object",
        ),
        (
            [{"role": "assistant", "tool_calls": [{"function": {"arguments": "{"}}]}],
            "messages[0].tool_calls[0].function.arguments",
            "valid JSON",
        ),
    ],
)
def test_wrong_messages_say_what_and_where(messages: Any, param: str, words: str) -> None:
    with pytest.raises(MessagesError) as error:
        template_messages(messages)

    assert error.value.param == param
    assert words in error.value.message
