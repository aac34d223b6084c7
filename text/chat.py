"""The `messages` of a chat request, checked and brought into the form chat templates take.

It knows the shape of OpenAI's messages and what templates expect of them, and no template.
"""

from typing import Any

import msgspec

_TEXT_PARTS = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}


class MessagesError(ValueError):
    """The messages of a request are wrong, by the client's fault."""

    def __init__(self, message: str, param: str) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        """Where, as OpenAI writes it: `messages[0].content`."""


def template_messages(messages: object) -> list[dict[str, Any]]:
    """The messages for a chat template. Errors: MessagesError.

    Text parts become `{"type": "text", "text": ...}`, content that is null or absent beside tool
    calls becomes the empty string, and tool calls' arguments become objects. Unknown roles and
    further keys are left to the template.
    """
    if not isinstance(messages, list | tuple):
        raise MessagesError("messages must be an array", "messages")
    if not messages:
        raise MessagesError("messages must not be empty", "messages")
    return [_message(message, f"messages[{index}]") for index, message in enumerate(messages)]


def _message(message: object, where: str) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise MessagesError(f"{where} must be an object", where)
    role = message.get("role")
    if role is None:
        raise MessagesError(f"{where} has no role", f"{where}.role")
    if not isinstance(role, str) or not role:
        raise MessagesError(f"{where}.role must be a non-empty string", f"{where}.role")
    result = dict(message)
    tool_calls = message.get("tool_calls")
    if tool_calls is None:
        result.pop("tool_calls", None)
    else:
        result["tool_calls"] = _tool_calls(tool_calls, f"{where}.tool_calls")
    may_be_empty = bool(tool_calls) or message.get("refusal") is not None
    result["content"] = _content(message.get("content"), f"{where}.content", may_be_empty)
    return result


def _content(content: object, where: str, may_be_empty: bool) -> str | list[dict[str, Any]]:
    if isinstance(content, str):
        return content
    if content is None and may_be_empty:
        return ""
    if content is None:
        raise MessagesError(f"{where} is required", where)
    if not isinstance(content, list | tuple):
        raise MessagesError(f"{where} must be a string or an array of parts", where)
    if not content and not may_be_empty:
        raise MessagesError(f"{where} must not be an empty array", where)
    return [_part(part, f"{where}[{index}]") for index, part in enumerate(content)]


def _part(part: object, where: str) -> dict[str, Any]:
    if isinstance(part, str):
        return {"type": "text", "text": part}
    if not isinstance(part, dict):
        raise MessagesError(f"{where} must be an object", where)
    kind = part.get("type")
    if not isinstance(kind, str):
        raise MessagesError(f"{where}.type is required", f"{where}.type")
    key = _TEXT_PARTS.get(kind)
    if key is None:
        message = f"{where}: content parts of type '{kind[:40]}' are not supported, only text"
        raise MessagesError(message, f"{where}.type")
    text = part.get(key)
    if not isinstance(text, str):
        raise MessagesError(f"{where}.{key} must be a string", f"{where}.{key}")
    return {"type": "text", "text": text}


def _tool_calls(calls: object, where: str) -> list[dict[str, Any]]:
    if not isinstance(calls, list | tuple):
        raise MessagesError(f"{where} must be an array", where)
    return [_tool_call(call, f"{where}[{index}]") for index, call in enumerate(calls)]


def _tool_call(call: object, where: str) -> dict[str, Any]:
    if not isinstance(call, dict) or not isinstance(call.get("function"), dict):
        raise MessagesError(f"{where}.function must be an object", f"{where}.function")
    function = dict(call["function"])
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        function["arguments"] = _arguments(arguments, f"{where}.function.arguments")
    return {**call, "function": function}


def _arguments(text: str, where: str) -> Any:
    """Clients send arguments as a JSON string, templates were written for the object itself."""
    try:
        return msgspec.json.decode(text) if text.strip() else {}
    except (msgspec.DecodeError, UnicodeEncodeError, RecursionError) as error:
        raise MessagesError(f"{where} must be valid JSON", where) from error
