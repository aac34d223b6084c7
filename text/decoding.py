"""How a tokenizer turns tokens into text, read from the decoder part of its tokenizer.json.

Three ways cover what is in use. `ByteDecoding`: a token is bytes (byte-level BPE). `PieceDecoding`:
a token is text, or one byte of a run (Llama 2, Gemma, Mistral). `WindowDecoding`: anything else,
where only decoding several tokens together says what they mean. The rules follow the decoders of
the tokenizers library exactly, so that the parts add up to its own decoding of the whole.
"""

from collections.abc import Mapping
from typing import Any, TypeAlias

import msgspec


class ByteDecoding(msgspec.Struct, frozen=True):
    """The bytes of all tokens, concatenated, are the text in UTF-8."""

    alphabet: dict[str, int]
    """Character of a token to the byte it stands for; a token with another one is plain text."""

    def token_bytes(self, token: str) -> bytes:
        """The bytes of one token."""
        try:
            return bytes([self.alphabet[char] for char in token])
        except KeyError:
            return token.encode()


class PieceDecoding(msgspec.Struct, frozen=True):
    """Each token is text after some replacements; the first one may lose leading characters."""

    replacements: tuple[tuple[str, str], ...] = ()
    byte_fallback: bool = False
    """`<0xE4>` is a byte. A run of them is text if it is UTF-8, else U+FFFD for each byte."""
    metaspace: str = ""
    """Character that is a space, except in the first piece if `metaspace_strips`."""
    metaspace_strips: bool = False
    strip_char: str = ""
    strip_max: int = 0
    """At most so many `strip_char` are cut off the beginning of the whole text."""
    separator: str = ""
    """Stands between any two pieces (a tokenizer without decoder joins with a space)."""

    def piece(self, token: str) -> str | int:
        """The text of a token before position rules, or the byte it is."""
        for old, new in self.replacements:
            token = token.replace(old, new)
        if self.byte_fallback and len(token) == 6 and token.startswith("<0x") and token[5] == ">":
            try:
                return int(token[3:5], 16)
            except ValueError:
                return token
        return token

    def place(self, text: str, *, first: bool) -> str:
        """The text of a piece at its place in the sequence."""
        if self.metaspace:
            text = text.replace(self.metaspace, "" if first and self.metaspace_strips else " ")
        return text if first or not self.separator else self.separator + text

    def token_bytes(self, token: str) -> bytes:
        """The bytes of one token on its own, as if not the first."""
        piece = self.piece(token)
        return bytes([piece]) if isinstance(piece, int) else self._inner(piece).encode()

    def _inner(self, text: str) -> str:
        return text.replace(self.metaspace, " ") if self.metaspace else text


class WindowDecoding(msgspec.Struct, frozen=True):
    """Nothing is known of single tokens: decode a window of them."""

    def token_bytes(self, token: str) -> bytes:
        """The token as it is written in the vocabulary."""
        return token.encode()


Decoding: TypeAlias = ByteDecoding | PieceDecoding | WindowDecoding


def read_decoding(decoder: Mapping[str, Any] | None) -> Decoding:
    """The decoding for the `decoder` part of a tokenizer.json."""
    if decoder is None:
        return PieceDecoding(separator=" ")
    steps = [dict(step) for step in _steps(decoder)]
    if [step.get("type") for step in steps] == ["ByteLevel"]:
        return ByteDecoding(byte_level_alphabet())
    return _read_pieces(steps) or WindowDecoding()


def byte_level_alphabet() -> dict[str, int]:
    """GPT-2's characters for bytes: printable Latin-1 is itself, the rest are shifted to 256 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    alphabet = {chr(byte): byte for byte in printable}
    hidden = [byte for byte in range(256) if chr(byte) not in alphabet]
    return alphabet | {chr(256 + index): byte for index, byte in enumerate(hidden)}


def _steps(decoder: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    if decoder.get("type") != "Sequence":
        return [decoder]
    return [step for child in decoder.get("decoders", ()) for step in _steps(child)]


def _read_pieces(steps: list[dict[str, Any]]) -> PieceDecoding | None:
    """`Replace* ByteFallback? (Metaspace | Fuse Strip?)?`, or None for any other order."""
    replacements: list[tuple[str, str]] = []
    while steps and steps[0].get("type") == "Replace":
        step = steps.pop(0)
        pattern = step["pattern"].get("String")
        if not pattern:
            return None
        replacements.append((pattern, step["content"]))
    byte_fallback = bool(steps) and steps[0].get("type") == "ByteFallback"
    if byte_fallback:
        steps.pop(0)
    found = PieceDecoding(replacements=tuple(replacements), byte_fallback=byte_fallback)
    match [step.get("type") for step in steps]:
        case [] | ["Fuse"]:
            return found
        case ["Metaspace"]:
            return msgspec.structs.replace(
                found,
                metaspace=steps[0].get("replacement", "▁"),
                metaspace_strips=_metaspace_strips(steps[0]),
            )
        case ["Fuse", "Strip"] if not steps[1].get("stop"):
            return msgspec.structs.replace(
                found, strip_char=steps[1]["content"], strip_max=steps[1]["start"]
            )
        case _:
            return None


def _metaspace_strips(step: Mapping[str, Any]) -> bool:
    scheme = step.get("prepend_scheme")
    if scheme is None:  # tokenizer files of before 2023
        return bool(step.get("add_prefix_space", True))
    return bool(scheme != "never")
