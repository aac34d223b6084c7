"""Grammars over real vocabularies: what they allow, where they end, what they refuse."""

import json
import sys
from contextlib import suppress
from pathlib import Path

import pytest

import baton
from text.assets import byte_assets, load_assets
from text.tokenizer import Tokenizer
from worker.engine.grammar import GrammarCompiler, GrammarError, GrammarState

OBJECT = '{"type":"object"}'
PERSON = json.dumps(
    {
        "type": "object",
        "properties": {"name": {"type": "string"}, "age": {"type": "integer"}},
        "required": ["name", "age"],
        "additionalProperties": False,
    }
)
BYTES = Tokenizer.from_assets(byte_assets())
DEMO = Tokenizer.from_assets(load_assets(Path(baton.__file__).parent / "demo_model"))


@pytest.fixture(params=[BYTES, DEMO], ids=["bytes", "bpe"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    found: Tokenizer = request.param
    return found


def able(state: GrammarState) -> set[int]:
    mask = state.allowed
    return {i for i in range(8 * len(mask)) if mask[i >> 3] >> (i & 7) & 1}


def ids_of(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False)


def walk(tokenizer: Tokenizer, schema: str, text: str) -> GrammarState:
    """Token by token, each of them allowed by the mask before it."""
    state = GrammarCompiler(tokenizer).state(schema)
    for token in ids_of(tokenizer, text):
        assert token in able(state), text
        assert not state.is_over
        state.advance(token)
    return state


def test_whole_answers_are_allowed_and_over(tokenizer: Tokenizer) -> None:
    spaced = '{\n  "name": "x",\n  "age": 0\n}'
    for text in ('{"name": "Zoë", "age": 7}', '{"name":"","age":-12}', spaced):
        assert walk(tokenizer, PERSON, text).is_over
    assert walk(tokenizer, OBJECT, "{}").is_over
    assert walk(tokenizer, OBJECT, '{"a": [1, {"b": null}], "c": "d"}').is_over


def test_end_is_allowed_exactly_where_the_grammar_may_end(tokenizer: Tokenizer) -> None:
    assert tokenizer.eos_ids
    for text, may_end in (("", False), ("-", False), ("1", True), ("12.", False), ("12.5", True)):
        state = walk(tokenizer, '{"type":"number"}', text)
        assert (able(state) & tokenizer.eos_ids == tokenizer.eos_ids) is may_end, text
        assert not state.is_over
    ignored = GrammarCompiler(tokenizer).state(
        '{"type":"number"}', ids_of(tokenizer, "1"), ignore_eos=True
    )
    assert not able(ignored) & tokenizer.eos_ids
    assert able(ignored)


def test_wrong_tokens_are_neither_allowed_nor_taken(tokenizer: Tokenizer) -> None:
    state = walk(tokenizer, PERSON, '{"name": "x", "age": ')
    (letter,) = ids_of(tokenizer, "x")
    assert letter not in able(state)
    with pytest.raises(GrammarError) as raised:
        state.advance(letter)
    assert "\n" not in str(raised.value)


def test_no_special_token_stands_for_its_name(tokenizer: Tokenizer) -> None:
    """Also where the grammar demands the name: it is written with plain tokens."""
    name = tokenizer.token(next(iter(tokenizer.eos_ids)))
    text = json.dumps(f"a{name}b")
    state = GrammarCompiler(tokenizer).state(json.dumps({"const": f"a{name}b"}))
    written: list[int] = []
    while not state.is_over:
        token = min(able(state))
        assert not tokenizer.is_special(token)
        written.append(token)
        state.advance(token)
    assert tokenizer.decode(written) == text


def test_whitespace_is_flexible_and_bounded(tokenizer: Tokenizer) -> None:
    """No path of whitespace alone goes on for ever, whatever the tokens."""
    assert walk(tokenizer, OBJECT, '{\n    "a" :\t1 ,\r\n "b": 2 }').is_over
    state = GrammarCompiler(tokenizer).state(OBJECT, ids_of(tokenizer, "{"))
    blank = [i for i in range(tokenizer.vocab_size) if tokenizer.token_bytes(i).isspace()]
    count = 0
    while taken := [i for i in blank if i in able(state)]:
        state.advance(taken[0])
        count += 1
        assert count <= 32
    assert count
    assert able(state)


def test_state_is_a_function_of_the_output(tokenizer: Tokenizer) -> None:
    compiler = GrammarCompiler(tokenizer)
    output = ids_of(tokenizer, '{"name": "ab", "age": 31}')
    stepped = compiler.state(PERSON)
    for count in range(len(output)):
        resumed = compiler.state(PERSON, output[:count])
        assert resumed.allowed == stepped.allowed
        stepped.advance(output[count])
    assert compiler.state(PERSON, output).is_over
    assert compiler.num_compiled == 1
    with pytest.raises(GrammarError, match="output so far"):
        compiler.state(PERSON, output[1:])


@pytest.mark.parametrize(
    ("schema", "part"),
    [
        ("nonsense", "not JSON"),
        ("[]", "not an object"),
        ("false", "not an object"),
        ('{"type":"foo"}', "foo"),
        ('{"type":"string","pattern":"("}', "regex"),
        ('{"$ref":"#/nowhere"}', "nowhere"),
        ('{"$ref":"http://example.com/s.json"}', "example.com"),
        ('{"type":"array","uniqueItems":true}', "uniqueItems"),
        ('{"x-guidance":{"lenient":true},"type":"array","uniqueItems":true}', "uniqueItems"),
        ('{"oneOf":[{"type":"integer"},{"type":"number"}]}', "oneOf"),
        (
            '{"x-guidance":{"coerce_one_of":true},"oneOf":[{"type":"integer"},{"type":"number"}]}',
            "oneOf",
        ),
        ('{"not":{"type":"string"}}', "not"),
        ('{"if":{"type":"string"},"then":{"maxLength":1}}', "if"),
        ('{"type":"string","format":"nonsense"}', "nonsense"),
        ('{"allOf":[{"type":"string"},{"type":"number"}]}', "nsatisfiable"),
        ('{"type":"array","items":' * 5000 + "{}" + "}" * 5000, ""),
        ('{"description":"' + "x" * 300_000 + '"}', "at most"),
    ],
)
def test_bad_schemas_are_refused_in_one_line(schema: str, part: str) -> None:
    with pytest.raises(GrammarError) as raised:
        GrammarCompiler(BYTES).state(schema)
    message = str(raised.value)
    assert part in message
    assert message
    assert "\n" not in message
    assert len(message) < 400


def test_annotations_and_unknown_keywords_change_nothing() -> None:
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "t",
              "description": "d", "default": 3, "examples": [4], "deprecated": True,
              "x-own": {"a": 1}, "type": "integer"}  # fmt: skip
    assert ord("7") in able(GrammarCompiler(BYTES).state(json.dumps(schema)))


def test_true_is_any_json() -> None:
    assert walk(BYTES, "true", '[1, "a"]').is_over


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "array", "items": {"type": "integer"}, "minItems": 10**6, "maxItems": 10**9},
        {"type": "string", "pattern": "^((a{1,100}){1,100}){1,100}$"},
        {"type": "string", "pattern": "^(a|b)*a(a|b){30}$"},
        {"type": "integer", "multipleOf": 999_999_937},
        {"allOf": [{"type": "string", "pattern": f".*(a|b)*a(a|b){{{i}}}"} for i in range(5, 13)]},
        {"allOf": [{"anyOf": [{"properties": {f"a{i}_{j}": {"type": "string"}}} for j in range(10)]}
                   for i in range(8)]},
        {"$defs": {f"d{i}": {"allOf": [{"$ref": f"#/$defs/d{i + 1}"}] * 2} for i in range(24)}
         | {"d24": {"type": "string"}}, "$ref": "#/$defs/d0"},
        {"$ref": "#"},
        {"allOf": [{"$ref": "#"}]},
    ],
)  # fmt: skip
def test_hostile_schemas_are_made_or_refused_and_do_not_hang(schema: object) -> None:
    with suppress(GrammarError):
        assert GrammarCompiler(BYTES).state(json.dumps(schema)).allowed


def test_compiled_grammars_are_kept_up_to_a_number() -> None:
    compiler = GrammarCompiler(BYTES, max_compiled=2)
    schemas = [json.dumps({"const": word}) for word in ("a", "b", "c")]
    for schema in (schemas[0], schemas[1], schemas[0], schemas[2], schemas[0]):
        compiler.state(schema)
    assert compiler.num_compiled == 3
    compiler.state(schemas[1])
    assert compiler.num_compiled == 4


def test_without_the_library_schemas_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    assert "no llguidance" in GrammarCompiler(BYTES).prepare()
    with pytest.raises(GrammarError, match="no llguidance"):
        GrammarCompiler(BYTES).state(OBJECT)


@pytest.mark.parametrize(
    "schema",
    [
        {"const": -(2**63)}, {"enum": ["x", -(2**63) + 512]}, {"const": {"a": [[-(2**63)]]}},
        {"type": "object", "properties": {"a": {"enum": [2**63]}}}, {"const": 2**64 - 1},
    ],
)  # fmt: skip
def test_numbers_that_would_end_the_process_are_refused(schema: dict[str, object]) -> None:
    """llguidance recurses without end, and without a Python exception, on whole numbers that are
    -2^63 as floats."""
    with pytest.raises(GrammarError, match="63 bits"):
        GrammarCompiler(BYTES).state(json.dumps(schema))
    near = json.dumps({"enum": [-(2**63) + 2048, 2**63 - 2048, True, -1.5e300]})
    GrammarCompiler(BYTES).state(near)


def test_a_panic_of_the_library_ends_one_output_and_not_the_engine() -> None:
    class Panic(BaseException):
        """As Rust's are, seen from Python."""

    class Matcher:
        def compute_bitmask(self) -> bytes:
            return b"\xff"

        def get_error(self) -> str:
            return ""

        def consume_token(self, _token: int) -> bool:
            raise Panic("poisoned")

    state = GrammarState(Matcher(), 7, frozenset())
    with pytest.raises(GrammarError, match="the grammar broke: Panic"):
        state.advance(1)
