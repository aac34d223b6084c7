"""KV events over real ZeroMQ sockets: what was missed is replayed, or the index begins anew."""

import asyncio
from typing import Any

import msgspec
import pytest
import zmq

from protocol.blocks import block_hashes, pack_ids, seed_of
from protocol.errors import ConfigError
from protocol.events import KvCleared, KvStored
from tests.contract.nats_server import free_port
from tests.unit.worker.vllm.vllm_world import World, started

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


async def test_a_replay_with_a_hole_begins_anew(world: World) -> None:
    async with started(world, **urls(world)) as engine:
        seq = await until_subscribed(world, 0)
        await world.publish(seq, stored(700), sent=False)
        await world.publish(seq + 2, stored(702))  # the number between was never kept
        await world.heard.until(lambda: KvCleared() in world.heard.events)
        await world.heard.until(lambda: len(engine.kv_snapshot().hashes) == 2)


async def test_where_nobody_publishes_all_else_works(world: World) -> None:
    nowhere = [f"tcp://127.0.0.1:{free_port()}" for _ in range(2)]
    async with started(world, kv_events_url=nowhere[0], kv_replay_url=nowhere[1]) as engine:
        key = await world.run(engine, world.decode([5] * 40))
        assert world.heard.last(key).finish == "length"
        assert (engine.kv_snapshot().hashes, engine.load().cached_blocks) == ([], 0)
        assert world.heard.unwell == []


async def test_listening_where_vllm_connects_is_possible(world: World) -> None:
    """As vLLM has it: who names a star binds, the other side connects."""
    port = free_port()
    async with started(world, kv_events_url=f"tcp://*:{port}"):
        with zmq.Context() as context, context.socket(zmq.PUB) as publisher:
            publisher.linger = 0
            publisher.connect(f"tcp://127.0.0.1:{port}")
            payload = msgspec.msgpack.encode([1.0, [stored(5)], 0])
            async with asyncio.timeout(10.0):
                for seq in range(200):
                    publisher.send_multipart([b"", seq.to_bytes(8, "big"), payload])
                    if num_stored(world):
                        break
                    await asyncio.sleep(0.02)
        assert num_stored(world) == 1


async def test_without_a_replay_address_a_gap_begins_anew(world: World) -> None:
    async with started(world, kv_events_url=world.kv_events_url):
        seq = await until_subscribed(world, 3)  # the first number is no gap
        assert KvCleared() not in world.heard.events
        await world.publish(seq + 1, stored(600))
        await world.heard.until(lambda: KvCleared() in world.heard.events)


@pytest.mark.parametrize(
    "rubbish", [{"type": "Unheard"}, {**stored(1), "token_ids": [1 << 40] * SIZE}]
)
async def test_rubbish_clears_and_goes_on(world: World, rubbish: dict[str, Any]) -> None:
    async with started(world, **urls(world)):
        seq = await until_subscribed(world, 0)
        await world.publish(seq, rubbish)
        await world.heard.until(lambda: KvCleared() in world.heard.events)
        before = num_stored(world)
        await world.publish(seq + 1, stored(9))
        await world.heard.until(lambda: num_stored(world) == before + 1)
        assert world.heard.unwell == []


@pytest.mark.parametrize("which", ["kv_events_url", "kv_replay_url"])
async def test_a_bad_address_is_one_clear_line(world: World, which: str) -> None:
    engine = world.engine(**{**urls(world), which: "tcp:/nowhere"})
    with pytest.raises(ConfigError, match="KV events: tcp:/nowhere"):
        await engine.start(world.heard)
    await engine.stop()
