"""Token ids to text as they come, never half a character.

What is emitted is a pure function of the ids so far, and all of it, with `finish`, is what decoding
the whole sequence at once gives. It knows nothing of stop strings.

One rule needs a choice: where bytes come as tokens of their own (`<0xE4>`), one broken byte turns
the whole run of them into U+FFFD, also characters that were complete before. So a run is held until
it ends, but no longer than `HELD_RUN_BYTES`: after that it is taken for text in a script that the
vocabulary does not have, and each character goes out when it is complete.
"""

import codecs
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

from text.decoding import ByteDecoding, Decoding, PieceDecoding
from text.tokenizer import Tokenizer

HELD_RUN_BYTES = 24
REPLACEMENT = "�"
_UTF8 = codecs.getincrementaldecoder("utf-8")


class _Part(Protocol):
    def push(self, token_id: int) -> str: ...
    def finish(self) -> str: ...


class Detokenizer:
    """The text of one output, token by token."""

    def __init__(self, tokenizer: Tokenizer, *, skip_special_tokens: bool = True) -> None:
        self._part = _part_for(tokenizer, skip_special_tokens, tokenizer.decoding)
        self.push_one: Callable[[int], str] = self._part.push
        """The text that one further id completes; may be empty."""

    def push(self, ids: Iterable[int]) -> str:
        """The text that these further ids complete; may be empty."""
        push = self._part.push
        return "".join([push(token_id) for token_id in ids])

    def finish(self) -> str:
        """The rest, once. What cannot be completed any more becomes U+FFFD."""
        return self._part.finish()


def _part_for(tokenizer: Tokenizer, skip_special_tokens: bool, decoding: Decoding) -> _Part:
    if isinstance(decoding, ByteDecoding):
        return _ByteStream(tokenizer, skip_special_tokens)
    if isinstance(decoding, PieceDecoding):
        return _PieceStream(tokenizer, skip_special_tokens, decoding)
    return _WindowStream(tokenizer, skip_special_tokens)


class _ByteStream:
    """Byte-level BPE and the byte tokenizer: constant work per token."""

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool) -> None:
        self._token_bytes = tokenizer.token_bytes
        self._whole_texts = tokenizer.whole_texts
        self._skipped = tokenizer.special_ids if skip_special_tokens else frozenset()
        self._held = b""
        """The beginning of a character."""

    def push(self, token_id: int) -> str:
        if token_id in self._skipped:
            return ""
        if not self._held:
            text = self._whole_texts.get(token_id)
            if text is not None:
                return text
        data = self._held + self._token_bytes(token_id)
        text, length = codecs.utf_8_decode(data, "replace", False)
        self._held = data[length:]
        return text

    def finish(self) -> str:
        held, self._held = self._held, b""
        return held.decode(errors="replace")


class _PieceStream:
    """Tokens that are text, some of them single bytes."""

    def __init__(
        self, tokenizer: Tokenizer, skip_special_tokens: bool, decoding: PieceDecoding
    ) -> None:
        self._token = tokenizer.token
        self._is_special = tokenizer.is_special if skip_special_tokens else _never
        self._decoding = decoding
        self._first = True
        self._strip_left = decoding.strip_max
        self._run: _ByteRun | None = None

    def push(self, token_id: int) -> str:
        token = None if self._is_special(token_id) else self._token(token_id)
        if token is None:
            return ""
        piece = self._decoding.piece(token)
        if isinstance(piece, int):
            if self._run is None:
                self._run = _ByteRun()
            return self._place_run(self._run.push(piece))
        text = self._end_run() + self._strip(self._decoding.place(piece, first=self._first))
        self._first = False
        return text

    def finish(self) -> str:
        return self._end_run()

    def _end_run(self) -> str:
        if self._run is None:
            return ""
        text = self._place_run(self._run.finish())
        self._run = None
        self._first = False
        return text

    def _place_run(self, text: str) -> str:
        return self._strip(self._decoding.place(text, first=self._first)) if text else ""

    def _strip(self, text: str) -> str:
        """Cut leading characters off the beginning of the whole text."""
        if not self._strip_left or not text:
            return text
        kept = text.lstrip(self._decoding.strip_char)
        cut = min(len(text) - len(kept), self._strip_left)
        self._strip_left = 0 if kept else self._strip_left - cut
        return text[cut:]


class _ByteRun:
    """Consecutive single-byte tokens: text if they are UTF-8, else U+FFFD for each of them."""

    def __init__(self) -> None:
        self._utf8 = _UTF8(errors="strict")
        self._num_bytes = 0
        self._num_unsent_bytes = 0
        self._held = ""
        self._broken = False

    def push(self, byte: int) -> str:
        self._num_bytes += 1
        self._num_unsent_bytes += 1
        if self._broken:
            return self._replaced()
        try:
            self._held += self._utf8.decode(bytes([byte]))
        except UnicodeDecodeError:
            self._broken = True
            return self._replaced()
        return self._take() if self._num_bytes > HELD_RUN_BYTES else ""

    def finish(self) -> str:
        try:
            if not self._broken:
                self._utf8.decode(b"", final=True)
        except UnicodeDecodeError:
            self._broken = True
        return self._replaced() if self._broken else self._take()

    def _take(self) -> str:
        text, self._held = self._held, ""
        self._num_unsent_bytes -= len(text.encode())
        return text

    def _replaced(self) -> str:
        count, self._num_unsent_bytes = self._num_unsent_bytes, 0
        return REPLACEMENT * count


class _WindowStream:
    """Any other decoder: text is emitted when a few tokens more leave it as it was.

    The window begins at tokens that were emitted already, so that the decoder sees a neighbour.
    """

    MAX_WINDOW = 64
    """Tokens held for a character that never completes, then they go out as they are."""

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool) -> None:
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._window: list[int] = []
        self._num_read = 0
        """Tokens of the window whose text was emitted."""

    def push(self, token_id: int) -> str:
        if self._skip and self._tokenizer.is_special(token_id):
            return ""
        if self._tokenizer.token(token_id) is None:
            return ""
        self._window.append(token_id)
        text = self._unread()
        waits = text.endswith(REPLACEMENT) and len(self._window) < self.MAX_WINDOW
        if waits or (not text and len(self._window) < self.MAX_WINDOW):
            return ""
        del self._window[: self._num_read]
        self._num_read = len(self._window)
        return text

    def finish(self) -> str:
        text = self._unread()
        self._num_read = len(self._window)
        return text

    def _unread(self) -> str:
        read = self._decode(self._window[: self._num_read])
        whole = self._decode(self._window)
        return whole[len(read) :] if whole.startswith(read) else ""

    def _decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=self._skip)


def _never(_token_id: int) -> bool:
    return False
