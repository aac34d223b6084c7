"""KV events over real ZeroMQ sockets: what was missed is replayed, or the index begins anew."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest

from protocol.blocks import block_hashes, pack_ids, seed_of
from protocol.errors import ConfigError
from protocol.events import KvCleared, KvStored
from tests.unit.worker.vllm.vllm_world import Standin, World, standin, started, world_of

SIZE = 32


def stored(number: int) -> dict[str, Any]:
    """A block of its own, which needs no parent."""
    return {
        "type": "BlockStored",
        "block_hashes": [number],
        "parent_block_hash": None,
        "token_ids": [number] * SIZE,
        "block_size": SIZE,
        "lora_id": None,
        "medium": "GPU",
    }


@pytest.fixture(scope="module")
def shared() -> Iterator[Standin]:
    with standin() as process:
        yield process


@pytest.fixture
async def world(shared: Standin) -> AsyncIterator[World]:
    async with world_of(shared) as world:
        yield world


def urls(world: World) -> dict[str, str]:
    return {"kv_events_url": world.kv_events_url, "kv_replay_url": world.kv_replay_url}


def num_stored(world: World) -> int:
    return sum(isinstance(event, KvStored) for event in world.heard.events)


async def until_subscribed(world: World, first: int) -> int:
    """Publish until it is heard: a subscription takes a moment. The next number."""
    seq = first
    async with asyncio.timeout(10.0):
        before = num_stored(world)
        while num_stored(world) == before:
            await world.publish(seq, stored(seq))
            seq += 1
            await asyncio.sleep(0.05)
    return seq


async def test_what_was_said_before_is_replayed(world: World) -> None:
    await world.publish(0, stored(10), sent=False)
    await world.publish(1, stored(11), sent=False)
    async with started(world, **urls(world)) as engine:
        await world.heard.until(lambda: num_stored(world) == 2)
        snapshot = engine.kv_snapshot()
        seed = seed_of(engine._limits.model_digest)
        expected = [block_hashes(pack_ids([n] * SIZE), SIZE, seed)[0] for n in (10, 11)]
        assert (snapshot.last_id, snapshot.hashes) == (2, expected)
        assert world.heard.event_ids == [1, 2]
        assert engine.load().cached_blocks == 2


async def test_a_gap_is_filled_by_a_replay(world: World) -> None:
    async with started(world, **urls(world)):
        seq = await until_subscribed(world, 0)
        await world.publish(seq, stored(500), sent=False)
        before = num_stored(world)
        await world.publish(seq + 1, stored(501))
        await world.heard.until(lambda: num_stored(world) == before + 2)
        await world.publish(seq + 1, stored(777))  # a repeat of a number says nothing
        await world.publish(seq + 2, stored(502))
        await world.heard.until(lambda: num_stored(world) == before + 3)
        assert KvCleared() not in world.heard.events
        assert world.heard.event_ids == list(range(1, len(world.heard.events) + 1))


async def test_a_gap_that_nobody_remembers_begins_anew(world: World) -> None:
    async with started(world, **urls(world)) as engine:
        seq = await until_subscribed(world, 0)
        await world.publish(seq + 5, stored(600))
        await world.heard.until(lambda: KvCleared() in world.heard.events)
        # the replay still had what came before the hole; it is not believed twice
        await world.heard.until(lambda: isinstance(world.heard.events[-1], KvStored))
        assert len(engine.kv_snapshot().hashes) == 1


async def test_without_a_replay_address_a_gap_begins_anew(world: World) -> None:
    async with started(world, kv_events_url=world.kv_events_url):
        seq = await until_subscribed(world, 3)  # the first number is no gap
        assert KvCleared() not in world.heard.events
        await world.publish(seq + 1, stored(600))
        await world.heard.until(lambda: KvCleared() in world.heard.events)


async def test_rubbish_clears_and_goes_on(world: World) -> None:
    async with started(world, **urls(world)):
        seq = await until_subscribed(world, 0)
        await world.publish(seq, {"type": "Unheard"})
        await world.heard.until(lambda: KvCleared() in world.heard.events)
        before = num_stored(world)
        await world.publish(seq + 1, stored(9))
        await world.heard.until(lambda: num_stored(world) == before + 1)
        assert world.heard.unwell == []


async def test_a_bad_address_is_one_clear_line(world: World) -> None:
    engine = world.engine(kv_events_url="tcp:/nowhere")
    with pytest.raises(ConfigError, match="KV events: tcp:/nowhere"):
        await engine.start(world.heard)
    await engine.stop()
