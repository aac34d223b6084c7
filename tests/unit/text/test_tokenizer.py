"""Tokenizers: like the library alone, with a cache that cannot be seen."""

import json
import re
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from text.assets import AssetsError, ModelAssets, load_assets, make_assets
from text.segment_cache import SegmentCache, is_safe, splitting_pattern
from text.tokenizer import Tokenizer, is_long

SPECIAL = ["<|end|>", "<|user|>", "<|im_start|>", "<|im_end|>", "<|r0|>", "<think>", "<|", "|>"]
CHATS = st.lists(
    st.one_of(
        st.sampled_from(SPECIAL),
        st.text(max_size=12),
        st.sampled_from(
            [" hello", "worker ", "é", "e\u0301", "\u0301", "你好", "\n\n", "😀", "  "]
        ),
    ),
    max_size=14,
).map("".join)


def library(assets: ModelAssets) -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_buffer(assets.files["tokenizer.json"])


def with_change(assets: ModelAssets, **parts: object) -> ModelAssets:
    description = assets.json("tokenizer.json") | parts
    return make_assets({**assets.files, "tokenizer.json": json.dumps(description).encode()})


@settings(max_examples=150, deadline=None)
@given(CHATS, CHATS)
def test_cached_ids_are_the_librarys(byte_level_folder: Path, first: str, second: str) -> None:
    for normalizer in (None, {"type": "NFC"}):
        assets = with_change(load_assets(byte_level_folder), normalizer=normalizer)
        theirs = library(assets)
        ours = Tokenizer.from_assets(assets)
        for text in (first, second, first + second, first):
            expected = theirs.encode(text, add_special_tokens=False).ids
            assert ours.encode(text, add_special_tokens=False) == expected


def test_known_text_is_not_encoded_again() -> None:
    cache = SegmentCache({"<a>": 1})
    asked: list[str] = []

    def encode(texts: list[str]) -> list[list[int]]:
        asked.extend(texts)
        return [[len(text) + 10] for text in texts]

    assert cache.encode("<a>one<a>three<a>one", encode) == [1, 13, 1, 15, 1, 13]
    assert cache.encode("three<a>four", encode) == [15, 1, 14]
    assert asked == ["one", "three", "four"]


def test_short_ascii_segments_may_be_left_out() -> None:
    cache = SegmentCache({"<a>": 1})
    asked: list[str] = []

    def encode(texts: list[str]) -> list[list[int]]:
        asked.extend(texts)
        return [[len(text) + 10] for text in texts]

    for _ in range(2):
        assert cache.encode("one<a>four<a>zw\u00f6", encode, min_ascii=4) == [13, 1, 14, 1, 13]
    assert asked == ["one", "four", "zw\u00f6", "one"]


def test_the_cache_is_bounded_by_bytes_and_forgets_the_oldest() -> None:
    cache = SegmentCache({}, max_bytes=2_000)
    asked: list[str] = []

    def encode(texts: list[str]) -> list[list[int]]:
        asked.extend(texts)
        return [[1] for _ in texts]

    for text in ("a", "b", "c", "a", "d", "e", "f", "g", "a", "b"):
        cache.encode(text, encode)
        assert cache.num_bytes <= 2_000
    assert asked == ["a", "b", "c", "d", "e", "f", "g", "b"]


@pytest.mark.parametrize(
    ("part", "value"),
    [
        ("pre_tokenizer", {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first"}),
        ("pre_tokenizer", {"type": "ByteLevel", "add_prefix_space": True}),
        ("pre_tokenizer", {"type": "Sequence", "pretokenizers": [{"type": "BertPreTokenizer"}]}),
        ("normalizer", {"type": "Prepend", "prepend": "▁"}),
        ("model", {"type": "Unigram"}),
        ("model", {"type": "BPE", "dropout": 0.1}),
    ],
)
def test_tokenizers_with_state_across_segments_are_not_cached(part: str, value: object) -> None:
    plain = {"model": {"type": "BPE"}, "pre_tokenizer": {"type": "Split"}, "normalizer": None}
    assert is_safe(plain)
    assert not is_safe({**plain, part: value})


def test_special_tokens_that_take_spaces_are_honoured(byte_level_folder: Path) -> None:
    assets = load_assets(byte_level_folder)
    added = assets.json("tokenizer.json")["added_tokens"]
    for token in added:
        token["rstrip"] = token["content"] == "<|end|>"
    changed = with_change(assets, added_tokens=added)
    text = "a<|end|>   b"

    ids = Tokenizer.from_assets(changed).encode(text, add_special_tokens=False)

    assert ids == library(changed).encode(text, add_special_tokens=False).ids
    assert ids != Tokenizer.from_assets(assets).encode(text, add_special_tokens=False)


def test_tokens_sought_in_normalised_text_come_second(byte_level_folder: Path) -> None:
    assets = load_assets(byte_level_folder)
    added = assets.json("tokenizer.json")["added_tokens"]
    token = {**added[-1], "id": 402, "content": "x<|end|>"}
    changed = with_change(assets, added_tokens=[*added, token])
    text = "x<|end|> x<|end|"

    ids = Tokenizer.from_assets(changed).encode(text, add_special_tokens=False)

    assert ids == library(changed).encode(text, add_special_tokens=False).ids
    assert 2 in ids


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from(["a", "ab", "abc", "b<", "<|a|>", "<|b|>", "<|"]), min_size=1))
def test_the_pattern_finds_the_longest_word(words: list[str]) -> None:
    text = "xabcab<|a|><|b<|ba"
    plain = sorted(set(words), key=len, reverse=True)
    expected = re.split("(" + "|".join(map(re.escape, plain)) + ")", text)
    assert splitting_pattern(words).split(text) == expected


def test_facts_of_the_model_are_read(byte_level: Tokenizer) -> None:
    assert byte_level.bos_id == 1
    assert byte_level.eos_ids == frozenset({2, 6})
    assert byte_level.max_context == 4096
    assert byte_level.vocab_size == 402
    assert byte_level.is_special(2)
    assert not byte_level.is_special(401)
    assert byte_level.encode("a", add_special_tokens=True)[0] == 1
    assert byte_level.encode("a", add_special_tokens=False)[0] != 1
    assert byte_level.token(10_000) is None
    assert byte_level.token_bytes(10_000) == b""
    assert is_long("x" * 20_000)
    assert not is_long("x" * 100)


def test_facts_may_lie_in_other_files(byte_level_folder: Path) -> None:
    tokenizer_json = load_assets(byte_level_folder).files["tokenizer.json"]
    config = {"text_config": {"max_position_embeddings": 77, "eos_token_id": 5}, "bos_token_id": 3}
    files = {"tokenizer.json": tokenizer_json, "config.json": json.dumps(config).encode()}
    tokenizer = Tokenizer.from_assets(make_assets(files))

    assert (tokenizer.bos_id, tokenizer.eos_ids, tokenizer.max_context) == (3, frozenset({5}), 77)
    bare = Tokenizer.from_assets(make_assets({"tokenizer.json": tokenizer_json}))
    assert (bare.bos_id, bare.eos_ids, bare.max_context) == (None, frozenset(), None)


def test_tokens_that_only_the_configuration_declares_are_special(byte_level_folder: Path) -> None:
    assets = load_assets(byte_level_folder)
    config = assets.json("tokenizer_config.json") | {
        "additional_special_tokens": [{"content": "<think>"}],
        "added_tokens_decoder": {"402": {"content": "<|new|>", "special": True}},
    }
    files = {**assets.files, "tokenizer_config.json": json.dumps(config).encode()}
    tokenizer = Tokenizer.from_assets(make_assets(files))

    assert tokenizer.encode("<think><|new|>", add_special_tokens=False) == [401, 402]
    assert tokenizer.is_special(401)
    assert tokenizer.is_special(402)
    assert tokenizer.vocab_size == 403
    assert tokenizer.decode([401, 402, 60]) == tokenizer.decode([60])


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=30))
def test_bytes_of_tokens_add_up_to_the_text(byte_level: Tokenizer, text: str) -> None:
    ids = byte_level.encode(text, add_special_tokens=False)

    assert b"".join(byte_level.token_bytes(i) for i in ids).decode() == text


def test_a_byte_token_shows_as_replacement_in_logprobs(byte_fallback: Tokenizer) -> None:
    token_id = byte_fallback.encode("\u0e01", add_special_tokens=False)[-3]

    assert byte_fallback.token(token_id) == "<0xE0>"
    assert byte_fallback.token_bytes(token_id) == b"\xe0"
    assert byte_fallback.token_text(token_id) == "\ufffd"
    assert byte_fallback.token_text(2) == "</s>"


def test_half_a_surrogate_pair_is_a_value_error(all_tokenizers: dict[str, Tokenizer]) -> None:
    for tokenizer in all_tokenizers.values():
        with pytest.raises(ValueError):
            tokenizer.encode("a\ud800b", add_special_tokens=False)


def test_assets_without_tokenizer_are_refused() -> None:
    with pytest.raises(AssetsError):
        Tokenizer.from_assets(make_assets({}))
