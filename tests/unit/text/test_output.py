"""The text of a choice, and its continuation by another worker at any token."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from text.output import OutputText, Piece, ResumeError
from text.tokenizer import Tokenizer

TEXTS = st.lists(
    st.sampled_from(["你", "😀", "a", "b", " worker", "\n", "STOP", "ST", "é", "."])
).map("".join)
STOPS = st.lists(st.sampled_from(["STOP", "你😀", "a\n", "b", "😀", "OPS"]), max_size=3)


@pytest.mark.parametrize("name", ["byte_level", "byte_fallback", "bytes"])
@settings(max_examples=200, deadline=None)
@given(data=st.data(), stops=STOPS, text=TEXTS, include_stop=st.booleans())
def test_a_resumed_output_goes_on_where_the_first_one_was(
    all_tokenizers: dict[str, Tokenizer],
    name: str,
    data: st.DataObject,
    stops: list[str],
    text: str,
    include_stop: bool,
) -> None:
    tokenizer = all_tokenizers[name]
    ids = tokenizer.encode(text, add_special_tokens=False)
    ids += data.draw(st.lists(st.integers(0, 255), max_size=4))
    cut = data.draw(st.integers(0, len(ids)))
    min_tokens = data.draw(st.integers(0, 5))

    def fresh() -> OutputText:
        return OutputText(tokenizer, stops, include_stop=include_stop, min_tokens=min_tokens)

    whole = fresh()
    undisturbed = [whole.push(token_id) for token_id in ids] + [whole.finish()]
    first, second = fresh(), fresh()
    before = "".join(first.push(token_id).text for token_id in ids[:cut])
    chars_sent = data.draw(st.integers(0, len(before)))
    after = second.resume(ids[:cut], chars_sent).text
    assert second.chars_released == first.chars_released
    after += "".join(second.push(token_id).text for token_id in ids[cut:])
    after += second.finish().text

    assert before[:chars_sent] + after == "".join(piece.text for piece in undisturbed)
    assert second.stop == whole.stop
    assert second.chars_released == whole.chars_released == len(before[:chars_sent] + after)


def test_more_characters_than_the_ids_give_are_refused(byte_level: Tokenizer) -> None:
    ids = byte_level.encode("hello S", add_special_tokens=False)

    with pytest.raises(ResumeError, match="characters were sent"):
        OutputText(byte_level, ["STOP"]).resume(ids, 7)
    used = OutputText(byte_level)
    used.push(ids[0])
    with pytest.raises(ResumeError, match="fresh"):
        used.resume(ids, 0)


def test_a_stop_found_in_the_replayed_part_is_told(byte_level: Tokenizer) -> None:
    ids = byte_level.encode("one STOP two", add_special_tokens=False)

    assert OutputText(byte_level, ["STOP"]).resume(ids, 1) == Piece("ne ", "STOP")


def test_stops_do_not_count_before_min_tokens(byte_level: Tokenizer) -> None:
    ids = byte_level.encode("bbb", add_special_tokens=False)
    output = OutputText(byte_level, ["b"], min_tokens=len(ids) - 1)

    pieces = [output.push(token_id) for token_id in ids]

    assert pieces[-1].stop == "b"
    assert all(piece.stop is None for piece in pieces[:-1])


def test_special_tokens_are_left_out_unless_wanted(byte_level: Tokenizer) -> None:
    ids = byte_level.encode("a<|end|>", add_special_tokens=False)
    plain, full = OutputText(byte_level), OutputText(byte_level, skip_special_tokens=False)

    assert "".join(plain.push(i).text for i in ids) == "a"
    assert "".join(full.push(i).text for i in ids) == "a<|end|>"
