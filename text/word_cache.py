"""Token ids of ASCII words, remembered: what English and code are made of costs a look into a dict.

A byte-level BPE splits a text into words by a pattern, then encodes each word on its own. So the
ids of a text are those of its words, and the library, which spends a microsecond on each token
whether it has met the word or not, is only asked for words that are new. Some patterns can be
written in Python so that they split ASCII as the library does; for other text they might not, as
the tables of Unicode differ, so that is left to the library. It knows a tokenizer by its JSON and
by two functions, for a word and for a text.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any, Final, TypeAlias

MAX_WORDS: Final = 8192
"""In each of the two generations: four megabytes at most, two of usual text."""
MAX_WORD_CHARS: Final = 32
"""Of words that are kept."""
MAX_NEW: Final = 64
"""Words learnt from one text: 3 to 5 µs each."""

Encode: TypeAlias = Callable[[str], list[int]]

_BYTE_LEVEL: Final = {
    byte: chr(byte if 33 <= byte <= 126 else 256 + (byte if byte <= 32 else 33))
    for byte in range(128)
}
"""How `ByteLevel` writes ASCII: what cannot be seen has characters of its own, from U+0100 on."""

_GPT_2: Final = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
"""What `ByteLevel` splits by when it is told to."""
_KNOWN: Final = {
    # GPT-2 and its kin
    _GPT_2: r"'s|'t|'re|'ve|'m|'ll|'d| ?[a-zA-Z]+| ?\d+| ?[^\sa-zA-Z\d]+|\s+(?!\S)|\s+",
    # Llama 3
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+": (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\na-zA-Z\d]?[a-zA-Z]+|\d{1,3}"
        r"| ?[^\sa-zA-Z\d]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
    # Qwen 2 and 3
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+": (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\na-zA-Z\d]?[a-zA-Z]+|\d"
        r"| ?[^\sa-zA-Z\d]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
}
"""The library's patterns, and what they are for ASCII in Python."""


def word_pattern(description: Mapping[str, Any]) -> re.Pattern[str] | None:
    """Finds the words of ASCII text for a tokenizer whose text `segment_cache.is_safe` to split;
    None where we know no such pattern.

    `description` is the content of tokenizer.json.
    """
    part = description.get("pre_tokenizer") or {}
    if part.get("type") == "ByteLevel":
        source = _GPT_2 if part.get("use_regex", True) else ""
    else:
        source = _split_source(part)
    known = _KNOWN.get(source)
    return re.compile(known, re.ASCII) if known is not None else None


def _split_source(part: Mapping[str, Any]) -> str:
    """The pattern of one `Split` before a `ByteLevel` that splits no more; empty for all else."""
    match part:
        case {
            "type": "Sequence",
            "pretokenizers": [
                {
                    "type": "Split",
                    "pattern": {"Regex": str() as source},
                    "behavior": "Isolated",
                    "invert": False,
                },
                {"type": "ByteLevel", "use_regex": False},
            ],
        }:
            return source
        case _:
            return ""


def byte_level(word: str) -> str:
    """An ASCII word as the vocabulary writes it."""
    return word.translate(_BYTE_LEVEL)


class WordCache:
    """From word to ids, in two generations: what was not met for a whole one is forgotten. Safe to
    use from several threads."""

    def __init__(
        self,
        pattern: re.Pattern[str],
        encode_word: Encode,
        encode_text: Encode,
        *,
        max_words: int = MAX_WORDS,
    ) -> None:
        """`encode_word`: the ids of one word as `pattern` finds it; `encode_text`: of any text."""
        self._pattern = pattern
        self._encode_word = encode_word
        self._encode_text = encode_text
        self._max_words = max_words
        self._young: dict[str, list[int]] = {}
        self._old: dict[str, list[int]] = {}

    @property
    def num_words(self) -> int:
        return len(self._young) + len(self._old)

    def encode(self, text: str) -> list[int]:
        """The ids of ASCII text without special tokens."""
        words = self._pattern.findall(text)
        known = self._young
        ids: list[int] = []
        try:
            for word in words:
                ids += known[word]
        except KeyError:
            return self._with_new(text, words)
        return ids

    def _with_new(self, text: str, words: list[str]) -> list[int]:
        """The same when some words are new, or were not met lately."""
        young, old = self._young, self._old
        known = {word: young.get(word, old.get(word)) for word in words}
        new = [word for word, ids in known.items() if ids is None]
        is_foreign = len(new) > MAX_NEW
        if is_foreign:
            new = [word for word in new if len(word) <= MAX_WORD_CHARS][:MAX_NEW]
        for word in new:
            known[word] = self._encode_word(word)
        self._keep({word: ids for word, ids in known.items() if ids is not None})
        if is_foreign:
            return self._encode_text(text)
        return [token for word in words for token in known[word] or ()]

    def _keep(self, words: Mapping[str, list[int]]) -> None:
        if len(self._young) + len(words) > self._max_words:
            self._old, self._young = self._young, {}
        for word, ids in words.items():
            if len(word) <= MAX_WORD_CHARS:
                self._young[word] = ids
