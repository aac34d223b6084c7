import json
from typing import Any

import pytest

from protocol.errors import ClientError
from protocol.openai import decode_chat, decode_completion
from router.grammar_options import ANY_OBJECT, MAX_SCHEMA_BYTES, MAX_SCHEMA_DEPTH, grammar_of

SCHEMA = {"type": "object", "properties": {"é": {"type": "integer"}}, "required": ["é"]}
WIRE = '{"type":"object","properties":{"é":{"type":"integer"}},"required":["é"]}'


def found(**fields: Any) -> tuple[str, str]:
    """The same of a chat and of a completion."""
    answers = {
        grammar_of(decode_chat(json.dumps({"messages": [], **fields}).encode())),
        grammar_of(decode_completion(json.dumps({"prompt": "p", **fields}).encode())),
    }
    assert len(answers) == 1
    return answers.pop()


def formatted(schema: Any, **more: Any) -> dict[str, Any]:
    inner = {"name": "n", "schema": schema, **more}
    return {"type": "json_schema", "json_schema": inner}


def nested(levels: int) -> dict[str, Any]:
    schema: dict[str, Any] = {}
    for _ in range(levels - 1):
        schema = {"not": schema}
    return schema


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"response_format": None},
        {"response_format": {"type": "text"}},
        {"guided_json": None},
        {"structured_outputs": None},
        {"structured_outputs": {}},
        {"structured_outputs": {"json": None, "regex": None, "json_object": False}},
    ],
    ids=str,
)
def test_free_text(fields: dict[str, Any]) -> None:
    assert found(**fields) == ("", "")


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"response_format": {"type": "json_object"}}, (ANY_OBJECT, "response_format")),
        ({"response_format": formatted(SCHEMA, strict=True)}, (WIRE, "response_format")),
        ({"response_format": formatted(True)}, ("true", "response_format")),
        ({"response_format": formatted({})}, ("{}", "response_format")),
        ({"guided_json": SCHEMA}, (WIRE, "guided_json")),
        ({"guided_json": f"  {WIRE}\n"}, (WIRE, "guided_json")),
        ({"structured_outputs": {"json": SCHEMA}}, (WIRE, "structured_outputs")),
        ({"structured_outputs": {"json": {}}}, ("{}", "structured_outputs")),
        ({"structured_outputs": {"json": WIRE}}, (WIRE, "structured_outputs")),
        ({"structured_outputs": {"json_object": True}}, (ANY_OBJECT, "structured_outputs")),
        ({"response_format": formatted(nested(MAX_SCHEMA_DEPTH))}, None),
        ({"guided_json": {"const": 10**40}}, ('{"const":' + str(10**40) + "}", "guided_json")),
    ],
    ids=lambda value: str(value)[:40],
)
def test_three_names_for_a_schema(fields: dict[str, Any], expected: tuple[str, str] | None) -> None:
    grammar, param = found(**fields)
    assert expected is None or (grammar, param) == expected
    json.loads(grammar)


BAD: list[tuple[dict[str, Any], str, str]] = [
    ({"response_format": {}}, "response_format.type", "missing_parameter"),
    ({"response_format": {"type": "xml"}}, "response_format.type", "invalid_value"),
    ({"response_format": {"type": ["text"]}}, "response_format.type", "invalid_value"),
    (
        {"response_format": {"type": "json_schema"}},
        "response_format.json_schema",
        "missing_parameter",
    ),
    (
        {"response_format": {"type": "json_schema", "json_schema": 5}},
        "response_format.json_schema",
        "invalid_type",
    ),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}},
        "response_format.json_schema.schema",
        "missing_parameter",
    ),
    ({"response_format": formatted(5)}, "response_format.json_schema.schema", "invalid_type"),
    ({"response_format": formatted([])}, "response_format.json_schema.schema", "invalid_type"),
    ({"response_format": formatted("{}")}, "response_format.json_schema.schema", "invalid_type"),
    (
        {"response_format": formatted({"enum": ["x" * MAX_SCHEMA_BYTES]})},
        "response_format.json_schema.schema",
        "invalid_value",
    ),
    (
        {"response_format": formatted(nested(MAX_SCHEMA_DEPTH + 1))},
        "response_format.json_schema.schema",
        "invalid_value",
    ),
    ({"guided_json": "no json"}, "guided_json", "invalid_json"),
    ({"guided_json": "[" * 100_000}, "guided_json", "invalid_json"),
    ({"guided_json": "[]"}, "guided_json", "invalid_type"),
    ({"structured_outputs": {"json": 5}}, "structured_outputs.json", "invalid_type"),
    ({"structured_outputs": {"regex": "a"}}, "structured_outputs.regex", "unsupported_parameter"),
    (
        {"structured_outputs": {"json": {}, "choice": ["a"]}},
        "structured_outputs.choice",
        "unsupported_parameter",
    ),
    (
        {"response_format": {"type": "json_object"}, "guided_json": {}},
        "guided_json",
        "invalid_value",
    ),
]


@pytest.mark.parametrize(("fields", "param", "code"), BAD, ids=lambda value: str(value)[:50])
def test_what_is_no_schema_is_named(fields: dict[str, Any], param: str, code: str) -> None:
    with pytest.raises(ClientError) as error:
        found(**fields)
    assert (error.value.status, error.value.param, error.value.code) == (400, param, code)
    assert "\n" not in error.value.message
    assert len(error.value.message) < 300
