"""Detokenizing as tokens come gives what decoding the whole gives, and never half a character."""

import json
from typing import Any

import pytest
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models

from text.assets import make_assets
from text.decoding import ByteDecoding, PieceDecoding, WindowDecoding, byte_level_alphabet
from text.detokenize import HELD_RUN_BYTES, Detokenizer
from text.tokenizer import Tokenizer

IDS = st.lists(st.integers(0, 460), max_size=40)
TEXTS = st.lists(
    st.one_of(
        st.text(max_size=6), st.sampled_from(["你好", "😀", " worker", "é", "👩\u200d🚀", "  "])
    )
).map("".join)


def streamed(tokenizer: Tokenizer, ids: list[int], *, skip: bool = True) -> list[str]:
    detokenizer = Detokenizer(tokenizer, skip_special_tokens=skip)
    return [*(detokenizer.push([token_id]) for token_id in ids), detokenizer.finish()]


@pytest.mark.parametrize("name", ["byte_level", "byte_fallback", "bytes"])
@settings(max_examples=250, deadline=None)
@given(ids=IDS, skip=st.booleans())
@example(ids=[], skip=True)
def test_any_ids_add_up_to_the_whole(
    all_tokenizers: dict[str, Tokenizer], name: str, ids: list[int], skip: bool
) -> None:
    tokenizer = all_tokenizers[name]

    expected = tokenizer.decode(ids, skip_special_tokens=skip)
    assert "".join(streamed(tokenizer, ids, skip=skip)) == expected


@pytest.mark.parametrize("name", ["byte_level", "byte_fallback", "bytes"])
@settings(max_examples=150, deadline=None)
@given(text=TEXTS)
def test_text_comes_without_half_characters(
    all_tokenizers: dict[str, Tokenizer], name: str, text: str
) -> None:
    tokenizer = all_tokenizers[name]
    ids = tokenizer.encode(text, add_special_tokens=False)

    pieces = streamed(tokenizer, ids, skip=False)

    assert "".join(pieces) == tokenizer.decode(ids, skip_special_tokens=False)
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)


def test_each_byte_level_character_goes_out_with_its_last_token(byte_level: Tokenizer) -> None:
    ids = byte_level.encode("ab😀\u0e01", add_special_tokens=False)

    pieces = streamed(byte_level, ids)

    assert "".join(pieces) == "ab😀\u0e01"
    assert pieces[-1] == ""
    assert pieces[-2].endswith("\u0e01")


def test_half_a_character_at_the_end_becomes_a_replacement(
    all_tokenizers: dict[str, Tokenizer],
) -> None:
    for tokenizer in all_tokenizers.values():
        ids = tokenizer.encode("a \u0e01", add_special_tokens=False)[:-1]
        pieces = streamed(tokenizer, ids)
        assert "".join(pieces[:-1]).strip() == "a"
        assert pieces[-1].startswith("\ufffd")


def test_a_long_run_of_byte_tokens_is_not_held_to_its_end(byte_fallback: Tokenizer) -> None:
    text = "\u0e01" * 40
    ids = byte_fallback.encode(text, add_special_tokens=False)

    pieces = streamed(byte_fallback, ids)

    assert "".join(pieces) == text
    assert sum(1 for piece in pieces if piece) >= 40 - HELD_RUN_BYTES // 3
    assert not any("\ufffd" in piece for piece in pieces)


def test_a_long_run_that_breaks_keeps_what_was_sent(byte_fallback: Tokenizer) -> None:
    ids = byte_fallback.encode("\u0e01" * 20, add_special_tokens=False)
    broken = [*ids, byte_fallback.encode("\u0e01", add_special_tokens=False)[-1]]

    assert "".join(streamed(byte_fallback, broken)) == "\u0e01" * 20 + "\ufffd"


def small(decoder: Any) -> Tokenizer:
    names = ["▁", "▁a", "b", "##c", "<0xE4>", "<0xBD>", "<0xA0>", "▁▁d", " e", "<0xZZ>", ".", "<s>"]
    inner = tokenizers.Tokenizer(models.BPE(vocab={n: i for i, n in enumerate(names)}, merges=[]))
    inner.add_special_tokens(["<s>"])
    if decoder is not None:
        inner.decoder = decoder
    return Tokenizer.from_assets(make_assets({"tokenizer.json": inner.to_str().encode()}))


DECODERS: dict[str, tuple[Any, type]] = {
    "none": (None, PieceDecoding),
    "fuse": (decoders.Fuse(), PieceDecoding),
    "metaspace": (decoders.Metaspace(), PieceDecoding),
    "metaspace_never": (decoders.Metaspace(prepend_scheme="never"), PieceDecoding),
    "bytes_metaspace": (
        decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()]),
        PieceDecoding,
    ),
    "llama": (
        decoders.Sequence(
            [
                decoders.Replace("▁", " "),
                decoders.ByteFallback(),
                decoders.Fuse(),
                decoders.Strip(" ", 2, 0),
            ]
        ),
        PieceDecoding,
    ),
    "wordpiece": (decoders.WordPiece(cleanup=False), WindowDecoding),
    "odd_order": (
        decoders.Sequence([decoders.Fuse(), decoders.Replace("▁", " ")]),
        WindowDecoding,
    ),
}
SMALL = {name: small(decoder) for name, (decoder, _) in DECODERS.items()}


@pytest.mark.parametrize("name", sorted(DECODERS))
@settings(max_examples=150, deadline=None)
@given(ids=st.lists(st.integers(0, 12), max_size=20), skip=st.booleans())
def test_every_decoder_adds_up(name: str, ids: list[int], skip: bool) -> None:
    tokenizer = SMALL[name]

    assert isinstance(tokenizer.decoding, DECODERS[name][1])
    expected = tokenizer.decode(ids, skip_special_tokens=skip)
    assert "".join(streamed(tokenizer, ids, skip=skip)) == expected


def test_the_alphabet_is_the_librarys() -> None:
    from tokenizers.pre_tokenizers import ByteLevel

    alphabet = byte_level_alphabet()

    assert set(alphabet) == set(ByteLevel.alphabet())
    assert ByteDecoding(alphabet).token_bytes("Ġa") == b" a"
    assert ByteDecoding(alphabet).token_bytes("a b") == b"a b"
    assert json.dumps(sorted(alphabet.values())) == json.dumps(list(range(256)))
