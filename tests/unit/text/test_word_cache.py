"""Words of ASCII text: split as the library splits, and remembered."""

import json
import string
from collections.abc import Mapping
from itertools import product
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import models, pre_tokenizers, trainers

from tests.unit.text.conftest import CORPUS, byte_level_tokenizer
from text import word_cache
from text.assets import make_assets
from text.tokenizer import LONG_TEXT_CHARS, Tokenizer
from text.word_cache import WordCache, word_pattern

ASCII = [chr(number) for number in range(128)]
TEXTS = st.lists(
    st.one_of(
        st.text(ASCII, max_size=8),
        st.sampled_from(
            [
                "'s",
                "'LL",
                "'",
                "  ",
                " \n",
                "\r\n ",
                "\t",
                "12345",
                " 7",
                "Router",
                " worker",
                "a1b",
            ]
        ),
        st.sampled_from(string.punctuation),
    ),
    max_size=16,
).map("".join)
CHATS = st.lists(
    st.one_of(TEXTS, st.sampled_from(["<|end|>", "é", "router " * 40])), min_size=1, max_size=5
).map("".join)
LLAMA_3 = list(word_cache._KNOWN)[1]
SPLIT = {"type": "Split", "pattern": {"Regex": LLAMA_3}, "behavior": "Isolated", "invert": False}
BYTES = {"type": "ByteLevel", "use_regex": False}


def split_by(source: str) -> tokenizers.Tokenizer:
    """A byte-level BPE whose words are those of a regular expression."""
    inner = tokenizers.Tokenizer(models.BPE(ignore_merges=True))
    inner.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(source), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=400, show_progress=False, initial_alphabet=alphabet, special_tokens=["<|end|>"]
    )
    inner.train_from_iterator(CORPUS, trainer)
    return inner


def described(inner: tokenizers.Tokenizer) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(inner.to_str())
    return found


def words_of(inner: tokenizers.Tokenizer, text: str) -> list[str]:
    """As the library splits, by the places of its words."""
    return [text[begin:end] for _, (begin, end) in inner.pre_tokenizer.pre_tokenize_str(text)]


TOKENIZERS = {
    "gpt-2": byte_level_tokenizer(),
    **{str(number): split_by(source) for number, source in enumerate(word_cache._KNOWN)},
}


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=150, deadline=None)
@given(TEXTS)
def test_words_are_the_librarys(name: str, text: str) -> None:
    inner = TOKENIZERS[name]
    pattern = word_pattern(described(inner))
    assert pattern is not None
    assert pattern.findall(text) == words_of(inner, text)


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=40, deadline=None)
@given(st.lists(CHATS, min_size=1, max_size=4), st.booleans())
def test_ids_are_the_librarys(name: str, texts: list[str], is_long: bool) -> None:
    inner = TOKENIZERS[name]
    ours = Tokenizer.from_assets(make_assets({"tokenizer.json": inner.to_str().encode()}))
    long = ["x ".join(texts) + " way" * (LONG_TEXT_CHARS // 4)] if is_long else []
    for text in [*texts, *long, *texts]:
        expected = inner.encode(text, add_special_tokens=False).ids
        assert ours.encode(text, add_special_tokens=False) == expected


class Library:
    """Encodes a text as the lengths of its words, and remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def encode(self, text: str) -> list[int]:
        self.asked.append(text)
        return [len(word) for word in text.split()]


def cache_of(library: Library, max_words: int = 100) -> WordCache:
    pattern = word_pattern({"pre_tokenizer": {"type": "ByteLevel"}})
    assert pattern is not None
    return WordCache(pattern, library.encode, library.encode, max_words=max_words)


def test_only_new_words_are_asked_for() -> None:
    library = Library()
    cache = cache_of(library)
    assert cache.encode("a worker and a worker") == [1, 6, 3, 1, 6]
    assert cache.encode("a worker, a router") == [1, 6, 1, 1, 6]
    assert library.asked == ["a", " worker", " and", " a", ",", " router"]


def test_words_without_ids_and_no_words() -> None:
    library = Library()
    cache = cache_of(library)
    assert cache.encode("") == []
    for _ in range(2):
        assert cache.encode(" \n ") == []  # this library knows no whitespace
    assert library.asked == [" \n "]


def test_a_text_of_many_new_words_is_asked_for_as_a_whole() -> None:
    library = Library()
    cache = cache_of(library, max_words=1000)
    words = ["".join(letters) for letters in product("ab", repeat=7)][: word_cache.MAX_NEW + 10]
    text = " ".join(words)
    assert cache.encode(text) == [7] * len(words)
    assert library.asked == [words[0], *(f" {word}" for word in words[1:-10]), text]
    assert cache.num_words == word_cache.MAX_NEW
    library.asked.clear()
    assert cache.encode(text) == [7] * len(words)
    assert library.asked == [f" {word}" for word in words[-10:]]


def test_long_words_are_not_kept_and_not_encoded_twice() -> None:
    library = Library()
    cache = cache_of(library)
    long = ["x" * (word_cache.MAX_WORD_CHARS + number) for number in range(1, word_cache.MAX_NEW)]
    text = " ".join(long)
    for _ in range(2):
        assert cache.encode(text) == [len(word) for word in long]
    assert len(library.asked) == 2 * len(long)
    library.asked.clear()
    text += " way and one"
    assert cache.encode(text) == [*(len(word) for word in long), 3, 3, 3]
    assert library.asked == [" way", " and", " one", text]
    assert cache.num_words == 3


def test_what_was_not_met_for_long_is_forgotten() -> None:
    library = Library()
    cache = cache_of(library, max_words=3)
    for text in ("a b c", "a", "x y", "a", "v w", "a"):
        cache.encode(text)
        assert cache.num_words <= 6
    assert library.asked.count("a") == 1  # met in each generation
    cache.encode("a b")
    assert library.asked.count(" b") == 2


@pytest.mark.parametrize(
    "pre_tokenizer",
    [
        None,
        {"type": "Whitespace"},
        {"type": "ByteLevel", "use_regex": False},
        {"type": "Sequence", "pretokenizers": [{"type": "Digits"}, {"type": "ByteLevel"}]},
        *(
            {"type": "Sequence", "pretokenizers": [{**SPLIT, **change}, {**BYTES, **other}]}
            for change, other in [
                ({"pattern": {"Regex": r"\d+"}}, {}),
                ({"pattern": {"String": LLAMA_3}}, {}),
                ({"behavior": "Removed"}, {}),
                ({"invert": True}, {}),
                ({}, {"use_regex": True}),
            ]
        ),
    ],
)
def test_what_we_do_not_know_is_left_to_the_library(
    pre_tokenizer: Mapping[str, Any] | None,
) -> None:
    assert word_pattern({"pre_tokenizer": pre_tokenizer}) is None


def test_the_same_unchanged_is_known() -> None:
    assert word_pattern({"pre_tokenizer": {"type": "Sequence", "pretokenizers": [SPLIT, BYTES]}})


def test_an_added_token_inside_of_words_is_still_found() -> None:
    """One that is sought in normalised text is no split of ours, and would fall apart."""
    inner = byte_level_tokenizer()
    inner.add_tokens([tokenizers.AddedToken("count its", normalized=True)])
    ours = Tokenizer.from_assets(make_assets({"tokenizer.json": inner.to_str().encode()}))
    text = "the router count its tokens"
    expected = inner.encode(text, add_special_tokens=False).ids
    for _ in range(2):
        assert ours.encode(text, add_special_tokens=False) == expected


def test_chats_that_do_not_go_by_words_are_remembered() -> None:
    """Segments of other text, and those of a long chat."""
    turns = [f"你好 {number}" for number in range(20)]
    for chat in ("<|end|>".join(turns), "<|end|>".join(["a turn"] * 8000)):
        inner = byte_level_tokenizer()
        ours = Tokenizer.from_assets(make_assets({"tokenizer.json": inner.to_str().encode()}))
        ids = ours.encode(chat, add_special_tokens=False)
        assert ids == inner.encode(chat, add_special_tokens=False).ids
        asked: list[str] = []
        ours._backend._encode_batch = asked.extend  # type: ignore[attr-defined]
        assert ours.encode(chat, add_special_tokens=False) == ids
        assert asked == []
