"""Log-probabilities as OpenAI writes them: ids become strings and bytes, numbers become JSON.

Chats and plain completions have two forms. Both gather tokens as they come and are formatted when
they are taken, each token once: text may lag behind its tokens, so a taker decides when. A token
that is only a part of a character is written as its bytes, as OpenAI does: a backslash, an x and
two digits for each. It knows no stream and no request.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from math import inf
from typing import Final

import msgspec

from protocol.out import TokenLogprob
from text.detokenize import Detokenizer
from text.tokenizer import Tokenizer

LOWEST: Final = -9999.0
"""OpenAI's number for what is next to impossible; JSON has no infinity."""

Entry = TokenLogprob | None
_encode: Final = msgspec.json.Encoder().encode


class TokenNames:
    """The strings of one model's tokens, as JSON; remembered, so at most one vocabulary of them."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._chat: dict[int, str] = {}
        self._text: dict[int, str] = {}

    def chat(self, token_id: int) -> str:
        """The fields `token` and `bytes`."""
        known = self._chat.get(token_id)
        if known is None:
            raw = self._tokenizer.token_bytes(token_id)
            name, numbers = _json(_readable(raw, "")), ",".join(map(str, raw))
            known = self._chat[token_id] = f'"token":{name},"bytes":[{numbers}]'
        return known

    def text(self, token_id: int) -> str:
        """One string: `bytes:` stands before what is no text."""
        known = self._text.get(token_id)
        if known is None:
            raw = self._tokenizer.token_bytes(token_id)
            known = self._text[token_id] = _json(_readable(raw, "bytes:"))
        return known


class TokenPlaces:
    """Where each token begins in a text that comes token by token, `begin` characters into it.

    All tokens of one character have the same place, and so have those of a run of single bytes.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special_tokens: bool, begin: int = 0) -> None:
        self._detokenizer = Detokenizer(tokenizer, skip_special_tokens=skip_special_tokens)
        self._token_bytes = tokenizer.token_bytes
        self._chars = begin

    def push(self, token_id: int) -> tuple[int, str]:
        """The token's place, and the text that it completes, which may be others' as well."""
        text = self._detokenizer.push_one(token_id)
        place = self._chars
        if len(text) > 1:
            try:
                own = len(self._token_bytes(token_id).decode())
            except UnicodeDecodeError:  # it ends a character that is the first of these
                own = len(text)
            place += max(0, len(text) - own)
        self._chars += len(text)
        return place, text

    def finish(self) -> str:
        """The rest of the text, once."""
        return self._detokenizer.finish()


class TokenList(ABC):
    """The tokens of one choice, gathered until they are taken."""

    def __init__(self, names: TokenNames) -> None:
        self._names = names
        self._waiting: list[tuple[Sequence[int], Sequence[Entry], Sequence[int] | None]] = []

    def add_prompt(
        self, ids: Sequence[int], entries: Sequence[Entry], offsets: Sequence[int]
    ) -> None:
        """The echoed prompt: `offsets` say where each token begins in its text."""
        self._waiting.append((ids, entries, offsets))

    def add(self, ids: Sequence[int], entries: Sequence[Entry]) -> None:
        """Further tokens of the output, one entry each."""
        self._waiting.append((ids, entries, None))

    def take(self) -> bytes:
        """The `logprobs` object of all tokens since the last time; empty if there are none."""
        if not self._waiting:
            return b""
        waiting, self._waiting = self._waiting, []
        return self._format(waiting).encode()

    @abstractmethod
    def _format(
        self, waiting: Sequence[tuple[Sequence[int], Sequence[Entry], Sequence[int] | None]]
    ) -> str:
        """The JSON of these tokens."""


class ChatTokens(TokenList):
    """`{"content": [{token, bytes, logprob, top_logprobs}, ...], "refusal": null}`."""

    def _format(
        self, waiting: Sequence[tuple[Sequence[int], Sequence[Entry], Sequence[int] | None]]
    ) -> str:
        name = self._names.chat
        parts = []
        for ids, entries, _ in waiting:
            for token_id, entry in zip(ids, entries, strict=True):
                if entry is None:
                    continue
                top = ",".join(
                    [f'{{{name(other)},"logprob":{_number(value)}}}' for other, value in entry.top]
                )
                parts.append(
                    f'{{{name(token_id)},"logprob":{_number(entry.logprob)},"top_logprobs":[{top}]}}'
                )
        return f'{{"content":[{",".join(parts)}],"refusal":null}}'


class TextTokens(TokenList):
    """`{tokens, token_logprobs, top_logprobs, text_offset}`, four lists of one length.

    An offset is where the token begins in the whole `text` of the choice, echoed prompt included.
    """

    def __init__(self, names: TokenNames, places: TokenPlaces) -> None:
        super().__init__(names)
        self._places = places
        """Of the output."""

    def _format(
        self, waiting: Sequence[tuple[Sequence[int], Sequence[Entry], Sequence[int] | None]]
    ) -> str:
        name = self._names.text
        tokens: list[str] = []
        logprobs: list[str] = []
        tops: list[str] = []
        places: list[str] = []
        for ids, entries, offsets in waiting:
            for token_id, entry in zip(ids, entries, strict=True):
                tokens.append(name(token_id))
                logprobs.append("null" if entry is None else _number(entry.logprob))
                tops.append("null" if entry is None else self._top(token_id, entry))
            if offsets is None:
                offsets = [self._places.push(token_id)[0] for token_id in ids]
            places += map(str, offsets)
        return (
            f'{{"tokens":[{",".join(tokens)}],"token_logprobs":[{",".join(logprobs)}],'
            f'"top_logprobs":[{",".join(tops)}],"text_offset":[{",".join(places)}]}}'
        )

    def _top(self, token_id: int, entry: TokenLogprob) -> str:
        """The likeliest, and the token itself. Tokens that read the same share the likelier's."""
        name = self._names.text
        found: dict[str, float] = {}
        for other, value in entry.top:
            found.setdefault(name(other), value)
        found.setdefault(name(token_id), entry.logprob)
        pairs = ",".join([f"{key}:{_number(value)}" for key, value in found.items()])
        return f"{{{pairs}}}"


def _readable(raw: bytes, mark: str) -> str:
    """The text of a token, or its bytes in hexadecimal behind `mark` if it has none by itself."""
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return mark + "".join([f"\\x{byte:02x}" for byte in raw])


def _json(text: str) -> str:
    return _encode(text).decode()


def _number(value: float) -> str:
    return repr(value) if LOWEST < value < inf else repr(LOWEST)
