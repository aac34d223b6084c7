"""Token ids of text between special tokens, remembered: earlier turns of a chat cost nothing.

A tokenizer splits at special tokens first, and what lies between two of them is encoded on its own.
That holds only for tokenizers without state that reaches over a split: `is_safe` says which. It
knows a tokenizer by its JSON and by a function that encodes a list of texts.
"""

import re
import sys
import threading
from array import array
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeAlias

MAX_BYTES = 8 * 1024 * 1024
MAX_SEGMENT_CHARS = 262_144
_ENTRY_BYTES = 300
_SAFE_PRE_TOKENIZERS = {"Split", "Digits", "Punctuation", "Whitespace", "WhitespaceSplit"}
_SAFE_NORMALIZERS = {"NFC", "NFD", "NFKC", "NFKD"}

EncodeBatch: TypeAlias = Callable[[list[str]], list[list[int]]]


def is_safe(description: Mapping[str, Any]) -> bool:
    """Whether text between two special tokens is always encoded alike, whatever is around it.

    `description` is the content of tokenizer.json. What is not known to be safe is not safe.
    """
    model = description.get("model") or {}
    if model.get("type") != "BPE" or model.get("dropout"):
        return False
    if not _all_safe(description.get("normalizer"), _SAFE_NORMALIZERS, "normalizers"):
        return False
    return _all_safe(description.get("pre_tokenizer"), _SAFE_PRE_TOKENIZERS, "pretokenizers")


def _all_safe(part: Mapping[str, Any] | None, names: set[str], children: str) -> bool:
    if part is None:
        return True
    if part.get("type") == "Sequence":
        return all(_all_safe(child, names, children) for child in part.get(children, ()))
    if part.get("type") == "ByteLevel" and children == "pretokenizers":
        return not part.get("add_prefix_space", True)
    return part.get("type") in names


def splitting_pattern(words: Iterable[str]) -> re.Pattern[str]:
    """A pattern with one group that finds the longest of these words at the leftmost place.

    A plain alternation of a thousand words is tried word by word at each place; a trie is not.
    """
    trie: dict[str, Any] = {}
    for word in words:
        node = trie
        for char in word:
            node = node.setdefault(char, {})
        node[""] = {}
    return re.compile(f"({_trie_source(trie)})")


def _trie_source(trie: Mapping[str, Any]) -> str:
    tail = ""
    node: Mapping[str, Any] = trie
    while len(node) == 1 and "" not in node:
        ((char, node),) = node.items()
        tail += re.escape(char)
    if not node or set(node) == {""}:
        return tail
    branches = [re.escape(c) + _trie_source(child) for c, child in node.items() if c]
    return f"{tail}(?:{'|'.join(branches)}){'?' if '' in node else ''}"


class SegmentCache:
    """An LRU from segment to ids, bounded by bytes. Safe to use from several threads."""

    def __init__(self, specials: Mapping[str, int], *, max_bytes: int = MAX_BYTES) -> None:
        self._specials = dict(specials)
        self._pattern = splitting_pattern(self._specials) if self._specials else None
        self._entries: OrderedDict[str, array[int]] = OrderedDict()
        self._max_bytes = max_bytes
        self._num_bytes = 0
        self._lock = threading.Lock()

    @property
    def num_bytes(self) -> int:
        """Bytes held, estimated."""
        return self._num_bytes

    def encode(self, text: str, encode_batch: EncodeBatch, *, min_ascii: int = 0) -> list[int]:
        """The ids of `text` without added begin or end; what is not known is encoded.

        ASCII segments of fewer than `min_ascii` characters are not remembered."""
        pieces = self._pattern.split(text) if self._pattern else [text]
        known: dict[str, array[int] | list[int]] = {}
        missing: list[str] = []
        with self._lock:
            for segment in pieces[::2]:
                if segment and segment not in known:
                    entry = self._entries.get(segment)
                    if entry is None:
                        missing.append(segment)
                        known[segment] = []
                    else:
                        self._entries.move_to_end(segment)
                        known[segment] = entry
        if missing:
            for segment, segment_ids in zip(missing, encode_batch(missing), strict=True):
                known[segment] = segment_ids
                if len(segment) >= min_ascii or not segment.isascii():
                    self._remember(segment, segment_ids)
        ids: list[int] = []
        for index, piece in enumerate(pieces):
            if index & 1:
                ids.append(self._specials[piece])
            elif piece:
                ids.extend(known[piece])
        return ids

    def _remember(self, segment: str, ids: list[int]) -> None:
        if len(segment) > MAX_SEGMENT_CHARS:
            return
        packed = array("I", ids)
        with self._lock:
            if segment in self._entries:
                return
            self._entries[segment] = packed
            self._num_bytes += _cost(segment, packed)
            while self._num_bytes > self._max_bytes:
                old, old_ids = self._entries.popitem(last=False)
                self._num_bytes -= _cost(old, old_ids)


def _cost(segment: str, ids: "array[int]") -> int:
    return _ENTRY_BYTES + sys.getsizeof(segment) + 4 * len(ids)
