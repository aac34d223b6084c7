"""Text to token ids and back, for one model, from its assets.

Two kinds of assets are read: a Hugging Face `tokenizer.json`, and the marker of the byte tokenizer,
which needs no file. Callers cannot tell which one they have. It knows nothing of chats or streams.
"""

import os
from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import Any, Protocol

import tokenizers

from text.assets import (
    BYTE_TOKENIZER_FILE,
    CONFIG_FILE,
    GENERATION_CONFIG_FILE,
    SPECIAL_TOKENS_FILE,
    TOKENIZER_CONFIG_FILE,
    TOKENIZER_FILE,
    AssetsError,
    ModelAssets,
)
from text.decoding import ByteDecoding, Decoding, read_decoding
from text.segment_cache import MAX_BYTES, SegmentCache, is_safe, splitting_pattern
from text.word_cache import WordCache, byte_level, word_pattern

# Read at each call. One text at a time has nothing to share out; the threads would only be woken.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

LONG_TEXT_CHARS = 16_384
"""From here on encoding takes milliseconds and belongs in a thread (it lets go of the GIL)."""
MIN_REMEMBERED_CHARS = 256
"""Of a segment that is encoded by words: to look up shorter ones would cost as much."""

_SINGLE_TOKENS = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)
_CONTEXT_KEYS = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")


def is_long(text: str) -> bool:
    """Whether encoding this text should not happen on an event loop."""
    return len(text) >= LONG_TEXT_CHARS


def is_panic(error: BaseException) -> bool:
    """Whether the tokenizers library met a bug of its own. It is no `Exception`, and would end
    whatever runs here; its class cannot be imported."""
    return type(error).__name__ == "PanicException"


class _Backend(Protocol):
    """What the two kinds of tokenizers have in common."""

    vocab_size: int
    special_ids: frozenset[int]
    decoding: Decoding

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]: ...
    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool) -> str: ...
    def token(self, token_id: int) -> str | None: ...
    def id_of(self, token: str) -> int | None: ...


class Tokenizer:
    """Encodes and decodes for one model. Safe to use from several threads.

    `encode` of a long text (see `is_long`) belongs in a thread.
    """

    def __init__(self, backend: _Backend, assets: ModelAssets) -> None:
        self._backend = backend
        self._bytes: dict[int, bytes] = {}
        self.whole_texts: dict[int, str] = {}
        """Of those ids whose `token_bytes` were asked for and are whole characters: their text."""
        names = special_tokens(assets)
        self.vocab_size = backend.vocab_size
        """Ids are below it; added tokens are counted."""
        self.special_ids = backend.special_ids
        """Left out of an answer's text."""
        self.decoding = backend.decoding
        """How tokens become text; for the detokenizer."""
        self.bos_id = _bos_id(backend, assets, names)
        self.eos_ids = _eos_ids(backend, assets, names)
        """Ids that end an answer; may be empty."""
        self.max_context = _max_context(assets)
        """Tokens the model was made for, prompt and output together; None if it does not say."""

    @classmethod
    def from_assets(cls, assets: ModelAssets, *, cache_bytes: int = MAX_BYTES) -> "Tokenizer":
        """The tokenizer of these assets. `cache_bytes` 0 remembers no ids. Errors: AssetsError."""
        if BYTE_TOKENIZER_FILE in assets.files:
            return cls(_ByteBackend(assets), assets)
        return cls(_HuggingFaceBackend(assets, cache_bytes=cache_bytes), assets)

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Ids of `text`; special tokens written in it are recognised. Errors: ValueError.

        `add_special_tokens` adds the model's begin (and end): for plain prompts, not for rendered
        chat templates, which write them themselves.
        """
        try:
            return self._backend.encode(text, add_special_tokens=add_special_tokens)
        except (UnicodeEncodeError, TypeError) as error:  # the library says TypeError
            raise ValueError("text has half a surrogate pair: not valid Unicode") from error
        except BaseException as error:
            if is_panic(error):
                raise ValueError("the tokenizer broke on this text") from None
            raise

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of a whole sequence. Unknown ids are left out, broken UTF-8 becomes U+FFFD."""
        return self._backend.decode(ids, skip_special_tokens=skip_special_tokens)

    def token(self, token_id: int) -> str | None:
        """The token as the vocabulary writes it; None for an unknown id."""
        return self._backend.token(token_id)

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes one token stands for, on its own; empty for an unknown id."""
        known = self._bytes.get(token_id)
        if known is None:
            token = self._backend.token(token_id)
            if token is None:
                return b""
            known = self._bytes[token_id] = self._single(token_id, token)
            with suppress(UnicodeDecodeError):
                self.whole_texts[token_id] = known.decode()
        return known

    def token_text(self, token_id: int) -> str:
        """One token as text, for logprobs: part of a character shows as U+FFFD."""
        return self.token_bytes(token_id).decode(errors="replace")

    def is_special(self, token_id: int) -> bool:
        """Whether the token is left out of an answer's text."""
        return token_id in self.special_ids

    def _single(self, token_id: int, token: str) -> bytes:
        if token_id in self._backend.special_ids and not isinstance(self.decoding, ByteDecoding):
            return token.encode()
        if isinstance(self._backend, _ByteBackend) and token_id < 256:
            return bytes([token_id])
        return self.decoding.token_bytes(token)


class _HuggingFaceBackend:
    """A tokenizer.json, run by the tokenizers library."""

    def __init__(self, assets: ModelAssets, *, cache_bytes: int) -> None:
        if TOKENIZER_FILE not in assets.files:
            raise AssetsError(f"model assets have no {TOKENIZER_FILE}")
        description = assets.json(TOKENIZER_FILE)
        try:
            self._inner = tokenizers.Tokenizer.from_buffer(assets.files[TOKENIZER_FILE])
        except BaseException as error:  # the library raises plain Exception
            if not isinstance(error, Exception) and not is_panic(error):
                raise
            raise AssetsError(f"{TOKENIZER_FILE} is not understood: {error}") from None
        # a folder may carry the settings of its training run
        self._inner.no_truncation()
        self._inner.no_padding()
        self._model = self._inner.model
        named = _add_named_tokens(self._inner, assets)
        added = self._inner.get_added_tokens_decoder()
        self.vocab_size = int(self._inner.get_vocab_size())
        self.special_ids = named | {token_id for token_id, token in added.items() if token.special}
        self.decoding = read_decoding(description.get("decoder"))
        self._cache: SegmentCache | None = None
        self._words: WordCache | None = None
        if cache_bytes and is_safe(description) and _are_plain(added.values()):
            # tokens that are sought in normalised text are left to the library, in their segment
            tokens = {t.content: i for i, t in added.items() if t.content}
            splits = {t.content: i for i, t in added.items() if not t.normalized and t.content}
            pattern = word_pattern(description) if splits == tokens else None
            if pattern is not None:
                self._words = WordCache(pattern, self._encode_word, self._encode_text)
            self._cache = SegmentCache(splits, max_bytes=cache_bytes)

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        if add_special_tokens or self._cache is None:
            encoded = self._inner.encode_batch_fast([text], add_special_tokens=add_special_tokens)
            return list(encoded[0].ids)
        if self._words is None or is_long(text):
            # a long text is encoded in a thread, and only the library lets go of the GIL
            return self._cache.encode(text, self._encode_batch)
        return self._cache.encode(text, self._encode_short, min_ascii=MIN_REMEMBERED_CHARS)

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        return str(self._inner.decode(ids, skip_special_tokens=skip_special_tokens))

    def token(self, token_id: int) -> str | None:
        token: str | None = self._inner.id_to_token(token_id)
        return token

    def id_of(self, token: str) -> int | None:
        token_id: int | None = self._inner.token_to_id(token)
        return token_id

    def _encode_short(self, texts: list[str]) -> list[list[int]]:
        assert self._words is not None
        by_words = self._words.encode
        others = [text for text in texts if not text.isascii()]
        found = iter(self._encode_batch(others) if others else ())
        return [by_words(text) if text.isascii() else next(found) for text in texts]

    def _encode_word(self, word: str) -> list[int]:
        return [token.id for token in self._model.tokenize(byte_level(word))]

    def _encode_text(self, text: str) -> list[int]:
        return self._encode_batch([text])[0]

    def _encode_batch(self, texts: list[str]) -> list[list[int]]:
        # only the batch calls of the library let go of the GIL
        encoded = self._inner.encode_batch_fast(texts, add_special_tokens=False)
        return [encoding.ids for encoding in encoded]


class _ByteBackend:
    """Ids 0..255 are bytes, 256 begins, 257 ends, then one marker for each role."""

    def __init__(self, assets: ModelAssets) -> None:
        roles = assets.json(BYTE_TOKENIZER_FILE).get("roles", [])
        names = ["<|bos|>", "<|eos|>", *(f"<|{role}|>" for role in roles)]
        self._ids = {name: 256 + index for index, name in enumerate(names)}
        self._names = dict(zip(self._ids.values(), self._ids, strict=True))
        self._pattern = splitting_pattern(self._ids)
        self.vocab_size = 256 + len(names)
        self.special_ids = frozenset(self._names)
        self.decoding: Decoding = ByteDecoding({})

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        ids = [256] if add_special_tokens else []
        for index, piece in enumerate(self._pattern.split(text)):
            if index & 1:
                ids.append(self._ids[piece])
            else:
                ids.extend(piece.encode())
        return ids

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        parts = []
        for token_id in ids:
            if 0 <= token_id < 256:
                parts.append(bytes([token_id]))
            elif not skip_special_tokens:
                parts.append(self._names.get(token_id, "").encode())
        return b"".join(parts).decode(errors="replace")

    def token(self, token_id: int) -> str | None:
        if 0 <= token_id < 256:
            return chr(token_id) if token_id < 128 else f"<0x{token_id:02X}>"
        return self._names.get(token_id)

    def id_of(self, token: str) -> int | None:
        return self._ids.get(token)


def special_tokens(assets: ModelAssets) -> dict[str, Any]:
    """The named special tokens (`bos_token`, ...) as strings; extra ones as a list of strings."""
    found: dict[str, Any] = {}
    for name in (SPECIAL_TOKENS_FILE, TOKENIZER_CONFIG_FILE):
        config = assets.json(name)
        for key in _SINGLE_TOKENS:
            if text := _content(config.get(key)):
                found[key] = text
        extra = config.get("additional_special_tokens")
        if isinstance(extra, list):
            found["additional_special_tokens"] = [t for e in extra if (t := _content(e))]
    return found


def _content(token: Any) -> str:
    """A token in a config file is a string or an object with its content."""
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else ""


def _add_named_tokens(inner: Any, assets: ModelAssets) -> frozenset[int]:
    """Make special what only tokenizer_config.json and its like declare; the ids of those."""
    special = _add_listed_tokens(inner, assets)
    for value in special_tokens(assets).values():
        names = value if isinstance(value, list) else [value]
        special += [name for name in names if inner.token_to_id(name) is not None]
    added = {token.content: token for token in inner.get_added_tokens_decoder().values()}
    plain = [name for name in special if name not in added or not added[name].special]
    # the library minds it for tokens that are there already, but does not tell of it
    inner.add_special_tokens([_as_special(name, added.get(name)) for name in plain])
    return frozenset(inner.token_to_id(name) for name in special)


def _as_special(name: str, known: Any) -> Any:
    """The token with the flags it has, but special."""
    if known is None:
        return tokenizers.AddedToken(name, special=True, normalized=False)
    return tokenizers.AddedToken(
        name,
        special=True,
        lstrip=known.lstrip,
        rstrip=known.rstrip,
        single_word=known.single_word,
        normalized=known.normalized,
    )


def _add_listed_tokens(inner: Any, assets: ModelAssets) -> list[str]:
    """Add the tokens of `added_tokens_decoder` whose ids agree; which of them are special."""
    listed = assets.json(TOKENIZER_CONFIG_FILE).get("added_tokens_decoder") or {}
    present = inner.get_added_tokens_decoder()
    special = []
    for key, entry in sorted(listed.items(), key=lambda item: int(item[0])):
        token_id, content = int(key), _content(entry)
        if not content or token_id in present:
            continue
        if inner.token_to_id(content) == token_id or inner.get_vocab_size() == token_id:
            flags = {k: bool(entry[k]) for k in ("lstrip", "rstrip", "normalized") if k in entry}
            is_special = bool(entry.get("special"))
            inner.add_tokens([tokenizers.AddedToken(content, special=is_special, **flags)])
            if is_special:
                special.append(content)
    return special


def _are_plain(added: Iterable[Any]) -> bool:
    """Whether no special token takes characters around it or minds what they are."""
    return not any(token.lstrip or token.rstrip or token.single_word for token in added)


def _bos_id(backend: _Backend, assets: ModelAssets, names: dict[str, Any]) -> int | None:
    if "bos_token" in names:
        return backend.id_of(names["bos_token"])
    found = _ids(assets.json(CONFIG_FILE).get("bos_token_id"))
    return found[0] if found else None


def _eos_ids(backend: _Backend, assets: ModelAssets, names: dict[str, Any]) -> frozenset[int]:
    """What generation_config.json says, else config.json, and the tokenizer's own end."""
    config = assets.json(CONFIG_FILE)
    listed = _ids(assets.json(GENERATION_CONFIG_FILE).get("eos_token_id"))
    listed = (
        listed or _ids(config.get("eos_token_id")) or _ids(_text_config(config, "eos_token_id"))
    )
    named = backend.id_of(names["eos_token"]) if "eos_token" in names else None
    return frozenset(listed if named is None else [*listed, named])


def _max_context(assets: ModelAssets) -> int | None:
    if BYTE_TOKENIZER_FILE in assets.files:
        value = assets.json(BYTE_TOKENIZER_FILE).get("max_context")
        return value if isinstance(value, int) else None
    config = assets.json(CONFIG_FILE)
    for key in _CONTEXT_KEYS:
        for value in (config.get(key), _text_config(config, key)):
            if isinstance(value, int) and value > 0:
                return value
    return None


def _text_config(config: dict[str, Any], key: str) -> Any:
    inner = config.get("text_config")
    return inner.get(key) if isinstance(inner, dict) else None


def _ids(value: Any) -> list[int]:
    values = value if isinstance(value, list) else [value]
    return [v for v in values if isinstance(v, int) and not isinstance(v, bool)]
