"""Bytes that almost are what a decoder wants: deterministic, given a `random.Random`.

Two ways. Blind: bits, cuts, splices, lengths that promise more than there is, nests. With the
structure: the message is read as plain values, one of them is exchanged for another kind of value,
and the whole is written again. Inputs are bounded, so that no decoder is asked for much.
"""

import json
import math
import random
from collections.abc import Callable, Iterator
from typing import Any, Final, Literal

import msgspec

Form = Literal["msgpack", "json", "text", "bytes"]
MAX_INPUT: Final = 32_768

LENGTH_BOMBS: Final = (
    b"\xdd\xff\xff\xff\xff", b"\xdf\xff\xff\xff\xff", b"\xc6\xff\xff\xff\xff",
    b"\xdb\xff\xff\xff\xff", b"\xc9\xff\xff\xff\xff\x01", b"\xdc\xff\xff", b"\xde\xff\xff",
    b"\xff\xff\xff\xff", b"\xff\xff\xff\xff\xff\xff\xff\xff", b"\x00\x00\x00\x80",
)  # fmt: skip
"""MessagePack's headers of four billion elements or bytes, and plain lengths."""
NESTS: Final = (
    b"\x91" * 5000, b"\x81\xa1a" * 3000, b"[" * 5000, b'{"a":' * 3000, b"(" * 3000, b"{{" * 3000,
    b"\x92\xc0" * 3000,
)  # fmt: skip
BAD_TEXT: Final = (b"\xff", b"\xed\xa0\x80", b"\xc0\x80", b"\xf4\x90\x80\x80", b"\x00", b"\\ud800")
ODD_VALUES: Final[tuple[Any, ...]] = (
    None, True, False, 0, -1, 1, 2**31, 2**32, 2**63, 2**64 - 1, -(2**63), 0.0, -0.0, 1e308, 5e-324,
    math.nan, math.inf, -math.inf, "", "x" * 300, "a/b", "a.b", "*", ">", "\x00", "\u202e", "NaN",
    "[" * 4000, '{"a":' * 2000, b"", b"\x00" * 17, b"\xff" * 64, [], [[]], [None] * 3, {},
    {"": None}, {"a": {"a": {}}},
)  # fmt: skip


def blind(data: bytes, rng: random.Random, corpus: list[bytes]) -> bytes:
    """One to four of the blind changes."""
    for _ in range(rng.choice((1, 1, 1, 2, 3, 4))):
        data = rng.choice(_BLIND)(data, rng, corpus)
    return data[:MAX_INPUT]


def _flip(data: bytes, rng: random.Random, _corpus: list[bytes]) -> bytes:
    if not data:
        return b"\x00"
    at = rng.randrange(len(data))
    return data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :]


def _set(data: bytes, rng: random.Random, _corpus: list[bytes]) -> bytes:
    at = rng.randrange(len(data) + 1)
    return data[:at] + rng.choice((b"\x00", b"\xff", b"\x7f", b"\x80", b"\xc1")) + data[at + 1 :]


def _cut(data: bytes, rng: random.Random, _corpus: list[bytes]) -> bytes:
    return data[: rng.randrange(len(data) + 1)]


def _drop(data: bytes, rng: random.Random, _corpus: list[bytes]) -> bytes:
    start = rng.randrange(len(data) + 1)
    return data[:start] + data[start + rng.randrange(1, 16) :]


def _repeat(data: bytes, rng: random.Random, _corpus: list[bytes]) -> bytes:
    start = rng.randrange(len(data) + 1)
    piece = data[start : start + rng.randrange(1, 32)]
    return data[:start] + piece * rng.randrange(2, 40) + data[start:]


def _splice(data: bytes, rng: random.Random, corpus: list[bytes]) -> bytes:
    other = rng.choice(corpus)
    return data[: rng.randrange(len(data) + 1)] + other[rng.randrange(len(other) + 1) :]


def _insert(pieces: tuple[bytes, ...]) -> "_Change":
    def change(data: bytes, rng: random.Random, _corpus: list[bytes]) -> bytes:
        at = rng.randrange(len(data) + 1)
        keep = rng.choice((0, 0, 1, 4))
        return data[:at] + rng.choice(pieces) + data[at + keep :]

    return change


def _noise(data: bytes, rng: random.Random, _corpus: list[bytes]) -> bytes:
    at = rng.randrange(len(data) + 1)
    return data[:at] + rng.randbytes(rng.randrange(1, 40)) + data[at:]


_Change = Callable[[bytes, random.Random, list[bytes]], bytes]
_BLIND: Final[tuple[_Change, ...]] = (
    _flip, _flip, _set, _cut, _drop, _repeat, _splice, _noise,
    _insert(LENGTH_BOMBS), _insert(NESTS), _insert(BAD_TEXT),
)  # fmt: skip


def structured(data: bytes, form: Form, rng: random.Random) -> bytes | None:
    """One or two values of the message exchanged; None if it cannot be read as plain values."""
    value = _plain(data, form)
    if value is _UNREADABLE:
        return None
    for _ in range(rng.choice((1, 1, 2))):
        value = _exchanged(value, rng)
    try:
        return _written(value, form)
    except (TypeError, ValueError, OverflowError, RecursionError, msgspec.MsgspecError):
        return None


_UNREADABLE: Final = object()


def _plain(data: bytes, form: Form) -> Any:
    try:
        if form == "msgpack":
            return msgspec.msgpack.decode(data)
        if form == "json":
            return json.loads(data)
    except (msgspec.MsgspecError, ValueError, RecursionError):
        pass
    return _UNREADABLE


def _written(value: Any, form: Form) -> bytes:
    if form == "msgpack":
        return msgspec.msgpack.encode(value)
    # Python's own writes NaN and lone surrogates, as a hostile peer does
    return json.dumps(value, default=lambda odd: repr(odd)).encode(errors="surrogatepass")


def _exchanged(value: Any, rng: random.Random) -> Any:
    """A copy with one place changed; deeper places are as likely as shallow ones."""
    places = list(_places(value, ()))
    if not places:
        return rng.choice(ODD_VALUES)
    path = rng.choice(places)
    return _with(value, path, lambda old: _odd(old, rng))


def _odd(old: Any, rng: random.Random) -> Any:
    if isinstance(old, list) and old and rng.random() < 0.5:
        return rng.choice((old * 3, old[:-1], [*old, old[0]], old[::-1], [old] * 2))
    if isinstance(old, int) and not isinstance(old, bool) and rng.random() < 0.5:
        return rng.choice((old + 1, -old, old - 1, old << 32, 2**64 - 1, -(2**63)))
    if isinstance(old, str | bytes) and old and rng.random() < 0.4:
        return old * rng.randrange(2, 50) if rng.random() < 0.5 else old[:-1]
    return rng.choice(ODD_VALUES)


def _places(value: Any, path: tuple[Any, ...]) -> Iterator[tuple[Any, ...]]:
    if path:
        yield path
    if isinstance(value, list):
        for index, inner in enumerate(value[:50]):
            yield from _places(inner, (*path, index))
    elif isinstance(value, dict):
        for key in list(value)[:50]:
            yield from _places(value[key], (*path, key))


def _with(value: Any, path: tuple[Any, ...], change: Callable[[Any], Any]) -> Any:
    if not path:
        return change(value)
    copy = value.copy()
    copy[path[0]] = _with(value[path[0]], path[1:], change)
    return copy


def bombs(data: bytes) -> Iterator[bytes]:
    """Every length bomb and nest at the beginning, in the middle and at the end, in place of what
    was there and beside it."""
    for piece in (*LENGTH_BOMBS, *NESTS):
        for at in sorted({0, 1, len(data) // 2, len(data)}):
            yield data[:at] + piece + data[at:]
            yield data[:at] + piece
