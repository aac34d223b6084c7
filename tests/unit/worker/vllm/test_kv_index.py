"""From vLLM's events to our hashes: the same prompt has the same hashes as in our own engines."""

from typing import Any

import msgspec
import pytest

from protocol.blocks import block_hashes, pack_ids, seed_of
from protocol.events import KvCleared, KvEvent, KvRemoved, KvStored
from worker.engine.vllm.kv_index import KvIndex, decode_batch, replay_closes_gap

SIZE = 4
SEED = seed_of("digest")
IDS = list(range(100, 116))
OURS = block_hashes(pack_ids(IDS), SIZE, SEED)


def stored(start: int, end: int, **changes: Any) -> dict[str, Any]:
    """Blocks `start .. end` of IDS, which vLLM calls 1000, 1001, ..."""
    return {
        "type": "BlockStored",
        "block_hashes": [1000 + number for number in range(start, end)],
        "parent_block_hash": 1000 + start - 1 if start else None,
        "token_ids": IDS[start * SIZE : end * SIZE],
        "block_size": SIZE,
        "lora_id": None,
        "medium": "GPU",
        "lora_name": None,
        "extra_keys": [None] * (end - start),
        "group_idx": 0,
        "kv_cache_spec_kind": "full_attention",
        "session_id": "what a later version may add",
        **changes,
    }


def removed(*numbers: int, medium: str = "GPU") -> dict[str, Any]:
    hashes = [1000 + number for number in numbers]
    return {"type": "BlockRemoved", "block_hashes": hashes, "medium": medium, "group_idx": 0}


def apply(index: KvIndex, *events: dict[str, Any], rank: int | None = 0) -> list[KvEvent]:
    return index.apply(decode_batch(msgspec.msgpack.encode([1.5, list(events), rank])))


@pytest.fixture
def index() -> KvIndex:
    return KvIndex(block_size=SIZE, seed=SEED, max_blocks=100)


def test_the_chain_is_ours(index: KvIndex) -> None:
    assert apply(index, stored(0, 2)) == [KvStored(OURS[0] + OURS[1])]
    assert apply(index, stored(2, 4)) == [KvStored(OURS[2] + OURS[3])]
    assert index.hashes == OURS


def test_a_block_without_a_known_parent_is_left_out(index: KvIndex) -> None:
    assert apply(index, stored(1, 3)) == []
    assert len(index) == 0


@pytest.mark.parametrize(
    "changes",
    [
        {"lora_id": 1},
        {"lora_name": "a"},
        {"extra_keys": [["salt"], None]},
        {"medium": "CPU"},
        {"group_idx": 1},
        {"block_size": 8},
        {"token_ids": IDS[:3]},
    ],
)
def test_what_is_not_the_plain_prompt_is_left_out(index: KvIndex, changes: dict[str, Any]) -> None:
    assert apply(index, stored(0, 2, **changes)) == []
    assert apply(index, stored(2, 4)) == []


def test_a_block_that_vllm_has_twice_goes_with_the_second(index: KvIndex) -> None:
    apply(index, stored(0, 1))
    assert apply(index, stored(0, 1)) == []
    assert apply(index, removed(0)) == []
    assert apply(index, removed(0, medium="CPU")) == []
    assert apply(index, removed(0)) == [KvRemoved(OURS[0])]
    assert apply(index, removed(0)) == []
    assert len(index) == 0


def test_cleared(index: KvIndex) -> None:
    apply(index, stored(0, 4))
    assert apply(index, {"type": "AllBlocksCleared"}) == [KvCleared()]
    assert index.hashes == []
    assert apply(index, stored(1, 2)) == []


def test_another_rank_is_another_cache(index: KvIndex) -> None:
    assert apply(index, stored(0, 1), rank=1) == []
    assert apply(index, stored(0, 1), rank=None) == [KvStored(OURS[0])]


def test_it_never_grows_past_its_bound() -> None:
    index = KvIndex(block_size=SIZE, seed=SEED, max_blocks=3)
    assert apply(index, stored(0, 4))[-1] == KvCleared()
    assert len(index) == 0


@pytest.mark.parametrize("payload", [b"", b"\xc1", b"\x91\x01", msgspec.msgpack.encode([1, [{}]])])
def test_rubbish_is_a_value_error(payload: bytes) -> None:
    with pytest.raises(ValueError, match="KV events"):
        decode_batch(payload)


@pytest.mark.parametrize(
    ("numbers", "closes"),
    [
        ([4, 5, 6], True),
        ([2, 3, 4, 5, 6, 7, 8], True),
        ([4, 5], False),
        ([5, 6], False),
        ([4, 6], False),
        ([], False),
    ],
)
def test_a_gap_is_closed_by_every_number_in_it(numbers: list[int], closes: bool) -> None:
    """4 was expected, 7 has come."""
    assert replay_closes_gap([(number, b"") for number in numbers], 4, 7) is closes
