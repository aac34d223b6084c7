"""`response_format` and its like as one JSON schema, and the name of the field that gave it.

OpenAI's field, and vLLM's two names for the same. Only the form of a schema is looked at here: what
it means, and whether it can be obeyed, the worker says (code `invalid_request`).
"""

from typing import Any, Final

import msgspec

from protocol.errors import ClientError
from protocol.openai import ChatRequest, CompletionRequest

MAX_SCHEMA_BYTES: Final = 64 * 1024
MAX_SCHEMA_DEPTH: Final = 64
ANY_OBJECT: Final = '{"type":"object"}'
"""What `json_object` asks for."""

_FORMAT: Final = "response_format"
_FORMATS: Final = ("text", "json_object", "json_schema")


def grammar_of(request: ChatRequest | CompletionRequest) -> tuple[str, str]:
    """(JSON schema as text, the parameter it came in); two empty strings for free text.

    Raises ClientError.
    """
    found = [
        (schema, param)
        for schema, param in (_of_format(request), _of_guided(request), _of_outputs(request))
        if schema
    ]
    if len(found) > 1:
        params = " and ".join(f"`{param}`" for _, param in found)
        message = f"{params} exclude each other"
        raise ClientError(400, message, code="invalid_value", param=found[1][1])
    return found[0] if found else ("", "")


def _of_format(request: ChatRequest | CompletionRequest) -> tuple[str, str]:
    wanted = request.response_format
    if wanted is None:
        return "", ""
    kind = wanted.get("type")
    if kind not in _FORMATS:
        message = f"`{_FORMAT}.type` must be one of {', '.join(_FORMATS)}"
        code = "invalid_value" if "type" in wanted else "missing_parameter"
        raise ClientError(400, message, code=code, param=f"{_FORMAT}.type")
    if kind == "text":
        return "", ""
    if kind == "json_object":
        return ANY_OBJECT, _FORMAT
    param = f"{_FORMAT}.json_schema"
    inner = wanted.get("json_schema")
    if not isinstance(inner, dict):
        code = "missing_parameter" if inner is None else "invalid_type"
        raise ClientError(400, f"`{param}` must be an object", code=code, param=param)
    param = f"{param}.schema"
    if inner.get("schema") is None:
        raise ClientError(400, f"`{param}` is missing", code="missing_parameter", param=param)
    return _schema(inner["schema"], param), _FORMAT


def _of_guided(request: ChatRequest | CompletionRequest) -> tuple[str, str]:
    wanted = request.guided_json
    if wanted is None:
        return "", ""
    return _schema(_parsed(wanted, "guided_json"), "guided_json"), "guided_json"


def _of_outputs(request: ChatRequest | CompletionRequest) -> tuple[str, str]:
    """vLLM's `structured_outputs`: of its kinds only `json` and `json_object`."""
    name = "structured_outputs"
    given = request.structured_outputs or {}
    asked = {key: value for key, value in given.items() if value not in (None, False)}
    for key in asked:
        if key not in ("json", "json_object"):
            param = f"{name}.{key}"
            message = f"`{param}` is not supported by this server"
            raise ClientError(400, message, code="unsupported_parameter", param=param)
    if "json" in asked:
        param = f"{name}.json"
        return _schema(_parsed(asked["json"], param), param), name
    return (ANY_OBJECT, name) if asked else ("", "")


def _parsed(schema: Any, param: str) -> Any:
    """vLLM takes a schema also as a string of JSON."""
    if not isinstance(schema, str):
        return schema
    try:
        return msgspec.json.decode(schema)
    except (msgspec.MsgspecError, UnicodeError, RecursionError) as error:
        message = f"`{param}` is not valid JSON: {error}"
        raise ClientError(400, message, code="invalid_json", param=param) from None


def _schema(schema: Any, param: str) -> str:
    """The schema as the wire carries it."""
    if not isinstance(schema, dict | bool):
        message = f"`{param}` must be a JSON schema: an object or a boolean"
        raise ClientError(400, message, code="invalid_type", param=param)
    if _is_deeper(schema, MAX_SCHEMA_DEPTH):
        message = f"`{param}` is nested deeper than {MAX_SCHEMA_DEPTH} levels"
        raise ClientError(400, message, code="invalid_value", param=param)
    encoded = msgspec.json.encode(schema)
    if len(encoded) > MAX_SCHEMA_BYTES:
        message = f"`{param}` is larger than {MAX_SCHEMA_BYTES} bytes"
        raise ClientError(400, message, code="invalid_value", param=param)
    return encoded.decode()


def _is_deeper(value: Any, levels: int) -> bool:
    level: list[Any] = [value]
    for _ in range(levels):
        level = [
            inner
            for one in level
            if isinstance(one, dict | list)
            for inner in (one.values() if isinstance(one, dict) else one)
            if isinstance(inner, dict | list)
        ]
        if not level:
            return False
    return True
