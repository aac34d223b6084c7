"""Workers that register or send nonsense to the catalog: the models of others are still served."""

import asyncio
from typing import Any

import pytest
from msgspec.structs import replace

from protocol.errors import ClientError
from protocol.memory_bus import MemoryBus, MemoryHub
from router import catalog as catalog_module
from router.catalog import text_of
from tests.unit.router.test_requests import World, worker
from text.assets import AssetsError, byte_assets, encode, make_assets

ASSETS = byte_assets()


class _Over(Exception):
    pass


async def _with_world(body: Any) -> None:
    bus = MemoryBus(MemoryHub())
    await bus.start()
    try:
        async with asyncio.TaskGroup() as tasks:
            await body(World(bus, tasks))
            raise _Over
    except* _Over:
        pass
    finally:
        await bus.close()


async def test_models_that_are_served_are_not_pushed_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catalog_module, "MAX_MODELS", 8)

    async def body(world: World) -> None:
        await world.add(worker("good", ASSETS), encode(ASSETS))
        for number in range(100):
            world.catalog.listed(worker(f"liar{number}", ASSETS, model=f"x{number}"))
        assert (await world.catalog.served("m")).name == "m"
        assert len(world.catalog.names()) == 8
        for number in range(100):
            world.catalog.unlisted(f"liar{number}", f"liar{number}1")
        world.catalog.listed(worker("late", ASSETS, model="late"))
        assert "late" in dict(world.catalog.names())

    await _with_world(body)


async def test_a_name_that_cannot_be_asked_ends_nothing() -> None:
    """Discovery refuses such values; if one came through, only it would suffer."""

    async def body(world: World) -> None:
        bad = replace(worker("liar", ASSETS, model="bad"), incarnation="a b", assets_digest="x")
        world.catalog.listed(bad)
        await world.add(worker("good", ASSETS), encode(ASSETS))
        assert (await world.catalog.served("m")).name == "m"
        world.catalog.unlisted("liar", "a b")
        with pytest.raises(ClientError):
            await world.catalog.served("bad")

    await _with_world(body)


@pytest.mark.parametrize(
    "files",
    [
        {"tokenizer.json": b'{"version":"1.0"}'},
        {"tokenizer.json": b"[]"},
        {"baton_byte_tokenizer.json": b"[1]"},
        {"baton_byte_tokenizer.json": b'{"roles":"abc"}', "tokenizer_config.json": b"[1]"},
        {},
    ],
)
def test_assets_that_cannot_be_used_are_refused_in_one_way(files: dict[str, bytes]) -> None:
    bad = make_assets(files)
    with pytest.raises(AssetsError):
        text_of(encode(bad), bad.digest)
    with pytest.raises(AssetsError):
        text_of(encode(ASSETS), "another digest")


def test_a_tokenizer_whose_library_panics_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A Rust panic is no `Exception`: it would end the router."""
    panic = type("PanicException", (BaseException,), {})

    def broken(*_: object, **__: object) -> list[int]:
        raise panic("no entry found for key")

    monkeypatch.setattr("text.tokenizer._ByteBackend.encode", broken)
    with pytest.raises(AssetsError, match="broke on this text"):
        text_of(encode(ASSETS), ASSETS.digest)
