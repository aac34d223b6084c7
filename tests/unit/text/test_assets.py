"""Assets: read from a folder, carried as bytes, refused when damaged."""

import json
from pathlib import Path

import msgspec
import pytest

from text import assets as wire
from text.assets import AssetsError, byte_assets, load_assets, make_assets
from text.template import ChatTemplate
from text.tokenizer import Tokenizer


def test_assets_survive_the_wire(byte_level_folder: Path) -> None:
    loaded = load_assets(byte_level_folder)

    assert wire.decode(wire.encode(loaded)) == loaded
    assert set(loaded.files) == {
        "tokenizer.json",
        "tokenizer_config.json",
        "config.json",
        "generation_config.json",
    }


def test_digest_depends_on_names_and_contents_but_not_on_their_order() -> None:
    one = make_assets({"a.json": b"{}", "b.json": b"[]"})

    assert make_assets({"b.json": b"[]", "a.json": b"{}"}).digest == one.digest
    assert make_assets({"a.json": b"{}[]", "b.json": b""}).digest != one.digest
    assert make_assets({"a.json": b"[]", "b.json": b"{}"}).digest != one.digest
    assert make_assets({"a": b"bc"}).digest != make_assets({"ab": b"c"}).digest
    assert len(one.digest) == 64


def test_altered_assets_are_refused() -> None:
    good = make_assets({"config.json": b"{}"})
    altered = msgspec.structs.replace(good, files={"config.json": b"{ }"})

    with pytest.raises(AssetsError, match="do not match their digest"):
        wire.decode(wire.encode(altered))


def test_rubbish_and_large_assets_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(AssetsError, match="cannot be decoded"):
        wire.decode(b"\xc1 not msgpack")
    with pytest.raises(AssetsError, match="files, the limit is"):
        make_assets({f"{i}.jinja": b"" for i in range(65)})
    data = wire.encode(make_assets({"config.json": b"{" + b" " * 1000 + b"}"}))
    monkeypatch.setattr(wire, "MAX_BYTES", 100)
    with pytest.raises(AssetsError, match="the limit is 100"):
        wire.decode(data)


def test_damaged_folders_are_refused_in_one_line(byte_level_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(AssetsError, match="does not exist"):
        load_assets(tmp_path / "absent")
    with pytest.raises(AssetsError, match=r"has no tokenizer\.json"):
        load_assets(tmp_path)
    whole = (byte_level_folder / "tokenizer.json").read_bytes()
    (tmp_path / "tokenizer.json").write_bytes(whole[:-100])
    with pytest.raises(AssetsError, match="damaged or cut short") as error:
        load_assets(tmp_path)
    assert "\n" not in str(error.value)
    (tmp_path / "tokenizer.json").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(AssetsError, match="Git LFS pointer"):
        load_assets(tmp_path)


def test_a_tokenizer_that_is_not_understood_is_refused() -> None:
    with pytest.raises(AssetsError, match="is not understood"):
        Tokenizer.from_assets(make_assets({"tokenizer.json": b"{}"}))
    with pytest.raises(AssetsError, match=r"no tokenizer\.json"):
        Tokenizer.from_assets(make_assets({"config.json": b"{}"}))


def test_extra_templates_are_loaded(byte_level_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes((byte_level_folder / "tokenizer.json").read_bytes())
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text("tools!")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": "config"}))

    loaded = load_assets(tmp_path)

    assert "additional_chat_templates/tool_use.jinja" in loaded.files
    assert ChatTemplate.from_assets(loaded).problem is None


def test_byte_assets_need_no_folder_and_travel_like_others() -> None:
    tokenizer = Tokenizer.from_assets(wire.decode(wire.encode(byte_assets())))

    assert tokenizer.vocab_size == 262
    assert tokenizer.bos_id == 256
    assert tokenizer.eos_ids == frozenset({257})
    assert tokenizer.max_context == 1 << 20
    assert tokenizer.encode("é<|user|>", add_special_tokens=True) == [256, 0xC3, 0xA9, 259]
    assert tokenizer.decode([256, 0xC3, 0xA9, 259]) == "é"
    assert tokenizer.decode([256, 97], skip_special_tokens=False) == "<|bos|>a"
    assert tokenizer.token_bytes(0xC3) == b"\xc3"
    assert tokenizer.token_text(259) == "<|user|>"
