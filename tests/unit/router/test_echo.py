from collections.abc import Sequence

import pytest

from router.echo import echo_of
from tests.unit.text.conftest import byte_fallback_tokenizer, byte_level_tokenizer, write_folder
from text.assets import byte_assets, load_assets
from text.tokenizer import Tokenizer

BOS = 256


@pytest.fixture(scope="module")
def byte() -> Tokenizer:
    return Tokenizer.from_assets(byte_assets())


def offsets(prompt: str | None, ids: Sequence[int], tokenizer: Tokenizer) -> list[int]:
    echo = echo_of(prompt, ids, tokenizer, skip_special_tokens=True, with_offsets=True)
    assert len(echo.offsets) == len(ids)
    return list(echo.offsets)


def test_text_comes_back_as_it_came(byte: Tokenizer) -> None:
    prompt = "a<|user|>漢"
    ids = byte.encode(prompt, add_special_tokens=True)
    for with_offsets in (True, False):
        echo = echo_of(prompt, ids, byte, skip_special_tokens=True, with_offsets=with_offsets)
        assert echo.text == prompt
    assert offsets(prompt, ids, byte) == [0, 0, 1, 9, 9, 9]


def test_ids_are_decoded_by_the_rule_of_the_output(byte: Tokenizer) -> None:
    ids = [BOS, 97, BOS + 1, 98, 0xE6]
    hidden = echo_of(None, ids, byte, skip_special_tokens=True, with_offsets=True)
    assert (hidden.text, hidden.offsets) == ("ab\ufffd", [0, 0, 1, 1, 2])
    shown = echo_of(None, ids, byte, skip_special_tokens=False, with_offsets=True)
    assert shown.text == "<|bos|>a<|eos|>b\ufffd"
    assert shown.offsets == [0, 7, 8, 15, 16]


def test_a_begin_that_the_client_wrote_is_text(byte: Tokenizer) -> None:
    prompt = "<|bos|>ab"
    assert offsets(prompt, [BOS, 97, 98], byte) == [0, 7, 8]
    assert offsets(prompt, [BOS, BOS, 97, 98], byte) == [0, 0, 7, 8]


@pytest.mark.parametrize("make", [byte_level_tokenizer, byte_fallback_tokenizer])
@pytest.mark.parametrize("prompt", ["the quick fox", " größer 漢字 😀 x", "a"])
def test_tokens_begin_where_their_text_is(
    make: object, prompt: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    assert callable(make)
    folder = write_folder(tmp_path_factory.mktemp("echo"), make())
    tokenizer = Tokenizer.from_assets(load_assets(folder))
    ids = tokenizer.encode(prompt, add_special_tokens=True)
    found = offsets(prompt, ids, tokenizer)
    assert found == sorted(found)
    assert found[0] == 0
    ends = [*found[1:], len(prompt)]
    for token_id, begin, end in zip(ids, found, ends, strict=True):
        text = tokenizer.token_text(token_id)
        if "\ufffd" not in text and not tokenizer.is_special(token_id) and begin:
            assert prompt[begin:].startswith(text)
            assert end == begin + len(text)
