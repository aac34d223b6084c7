"""What the tokens of an answer look like in JSON, parsed by the types of the `openai` client."""

import math

import pytest
from openai.types.chat.chat_completion import ChoiceLogprobs
from openai.types.completion_choice import Logprobs

from protocol.out import TokenLogprob
from router.logprobs import ChatTokens, TextTokens, TokenNames, TokenPlaces
from text.assets import byte_assets
from text.tokenizer import Tokenizer

BOS = 256


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_assets(byte_assets())


def chat(tokenizer: Tokenizer) -> ChatTokens:
    return ChatTokens(TokenNames(tokenizer))


def text(tokenizer: Tokenizer, begin: int = 0) -> TextTokens:
    places = TokenPlaces(tokenizer, skip_special_tokens=True, begin=begin)
    return TextTokens(TokenNames(tokenizer), places)


def likely(value: float, *top: tuple[int, float]) -> TokenLogprob:
    return TokenLogprob(value, [*top])


def parse_chat(data: bytes) -> ChoiceLogprobs:
    return ChoiceLogprobs.model_validate_json(data, strict=True)


def parse_text(data: bytes) -> Logprobs:
    return Logprobs.model_validate_json(data, strict=True)


def test_a_chats_tokens(tokenizer: Tokenizer) -> None:
    tokens = chat(tokenizer)
    tokens.add([97], [likely(-0.5, (97, -0.5), (98, -1.25))])
    tokens.add([34], [likely(-1e-9)])
    parsed = parse_chat(tokens.take())
    assert parsed.refusal is None
    assert parsed.content is not None
    first, second = parsed.content
    assert (first.token, first.bytes, first.logprob) == ("a", [97], -0.5)
    assert [(t.token, t.bytes, t.logprob) for t in first.top_logprobs] == [
        ("a", [97], -0.5),
        ("b", [98], -1.25),
    ]
    assert (second.token, second.logprob, second.top_logprobs) == ('"', -1e-9, [])


def test_each_token_is_taken_once(tokenizer: Tokenizer) -> None:
    for tokens in (chat(tokenizer), text(tokenizer)):
        assert tokens.take() == b""
        tokens.add([97], [likely(-1.0)])
        assert b'"a"' in tokens.take()
        assert tokens.take() == b""
        tokens.add([], [])
        assert b'"a"' not in tokens.take()


def test_a_part_of_a_character_is_its_bytes(tokenizer: Tokenizer) -> None:
    """Never U+FFFD, which three tokens of one character would share."""
    ids = list("é漢".encode())
    entries = [likely(-1.0, (first, -0.5)) for first in ids]
    chats, texts = chat(tokenizer), text(tokenizer)
    chats.add(ids, entries)
    texts.add(ids, entries)
    content = parse_chat(chats.take()).content
    assert content is not None
    assert bytes(byte for token in content for byte in token.bytes or []).decode() == "é漢"
    assert content[0].token == "\\xc3"
    parsed = parse_text(texts.take())
    assert parsed.tokens == [f"bytes:\\x{byte:02x}" for byte in ids]
    assert parsed.top_logprobs is not None
    assert parsed.top_logprobs[0] == {"bytes:\\xc3": -0.5}


def test_special_tokens_are_named(tokenizer: Tokenizer) -> None:
    tokens = chat(tokenizer)
    tokens.add([BOS + 1], [likely(0.0)])
    content = parse_chat(tokens.take()).content
    assert content is not None
    assert content[0].token == "<|eos|>"


def test_an_id_that_no_vocabulary_has_is_an_empty_token(tokenizer: Tokenizer) -> None:
    """Models are padded: their last ids mean nothing."""
    tokens = chat(tokenizer)
    tokens.add([100_000], [likely(-1.0)])
    content = parse_chat(tokens.take()).content
    assert content is not None
    assert (content[0].token, content[0].bytes) == ("", [])


def test_a_completions_tokens(tokenizer: Tokenizer) -> None:
    tokens = text(tokenizer)
    tokens.add([97, 98], [likely(-0.5, (99, -0.25)), likely(-2.0, (98, -2.0))])
    parsed = parse_text(tokens.take())
    assert parsed.tokens == ["a", "b"]
    assert parsed.token_logprobs == [-0.5, -2.0]
    assert parsed.top_logprobs == [{"c": -0.25, "a": -0.5}, {"b": -2.0}]  # the token itself, too
    assert parsed.text_offset == [0, 1]


def test_offsets_are_in_characters_and_all_tokens_of_one_begin_with_it(
    tokenizer: Tokenizer,
) -> None:
    tokens = text(tokenizer, begin=10)
    ids = [97, *"漢".encode(), 98, BOS + 1, 99]
    for token_id in ids[:3]:
        tokens.add([token_id], [likely(-1.0)])
    offsets = list(parse_text(tokens.take()).text_offset or [])
    tokens.add(ids[3:], [likely(-1.0)] * len(ids[3:]))
    offsets += parse_text(tokens.take()).text_offset or []
    assert offsets == [10, 11, 11, 11, 12, 13, 13]  # a special token has no characters


def test_a_prompt_begins_with_a_token_of_which_nothing_is_known(tokenizer: Tokenizer) -> None:
    tokens = text(tokenizer, begin=1)
    tokens.add_prompt([BOS, 97], [None, likely(-3.0, (98, -1.0))], [0, 0])
    tokens.add([99], [likely(-4.0)])
    data = tokens.take()
    assert b'"token_logprobs":[null,-3.0,-4.0]' in data
    assert b'"top_logprobs":[null,{"b":-1.0,"a":-3.0},{"c":-4.0}]' in data
    assert b'"text_offset":[0,0,1]' in data
    assert b'"tokens":["<|bos|>","a","c"]' in data


@pytest.mark.parametrize("value", [-math.inf, -1e30, math.nan, math.inf])
def test_what_json_cannot_say_is_very_unlikely(tokenizer: Tokenizer, value: float) -> None:
    for tokens in (chat(tokenizer), text(tokenizer)):
        tokens.add([97], [likely(value, (98, value))])
        data = tokens.take()
        assert data.count(b"-9999.0") >= 2
    assert parse_text(data).token_logprobs == [-9999.0]


def test_tokens_that_read_the_same_share_the_likelier_ones_number(tokenizer: Tokenizer) -> None:
    tokens = text(tokenizer)
    tokens.add([97], [likely(-5.0, (100_000, -1.0), (100_001, -2.0))])
    assert parse_text(tokens.take()).top_logprobs == [{"": -1.0, "a": -5.0}]
