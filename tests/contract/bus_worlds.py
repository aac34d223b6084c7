"""The two worlds that the bus contract is checked in: a real server, and the hub in memory."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Protocol

from protocol.bus import Bus, BusEvent, Message
from protocol.memory_bus import MemoryBus, MemoryHub
from protocol.nats_bus import NatsBus, NatsConfig
from tests.contract.nats_server import NatsServer

PATIENCE_S = 15.0

Serve = Callable[[str], NatsServer]
"""Starts a server with this configuration."""


class World(Protocol):
    """A server that can be broken, and connections to it."""

    max_payload: int

    def make(self, *, pending_bytes: int = 64 << 20) -> Bus: ...
    def kill(self) -> None: ...
    def revive(self) -> None: ...
    def freeze(self) -> None: ...
    def thaw(self) -> None: ...
    async def close(self) -> None: ...


class MemoryWorld:
    def __init__(self) -> None:
        self._hub = MemoryHub(detect_s=0.3)
        self.max_payload = self._hub.max_payload
        self._buses: list[Bus] = []
        self.kill, self.revive = self._hub.down, self._hub.up
        self.freeze, self.thaw = self._hub.freeze, self._hub.up

    def make(self, *, pending_bytes: int = 64 << 20) -> Bus:
        self._buses.append(MemoryBus(self._hub, pending_bytes=pending_bytes, close_timeout_s=0.3))
        return self._buses[-1]

    async def close(self) -> None:
        for bus in self._buses:
            await bus.close()


class NatsWorld:
    max_payload = 1 << 20

    def __init__(self, folder: Path) -> None:
        self._server = NatsServer(folder)
        self._buses: list[Bus] = []
        self.kill, self.revive = self._server.kill, self._server.start
        self.freeze, self.thaw = self._server.freeze, self._server.thaw
        self.revive()

    def make(self, *, pending_bytes: int = 64 << 20) -> Bus:
        config = NatsConfig(urls=(self._server.url,), pending_bytes=pending_bytes)
        self._buses.append(NatsBus(config))
        return self._buses[-1]

    async def close(self) -> None:
        self.kill()
        for bus in self._buses:
            await bus.close()


class Listener:
    """Keeps what it is called with, and lets a test wait for it."""

    def __init__(self) -> None:
        self.messages: list[Message] = []
        self.events: list[BusEvent] = []
        self._changed = asyncio.Event()

    def __call__(self, message: Message) -> None:
        self.messages.append(message)
        self._changed.set()

    def on_event(self, event: BusEvent) -> None:
        self.events.append(event)
        self._changed.set()

    @property
    def payloads(self) -> list[bytes]:
        return [message.payload for message in self.messages]

    @property
    def kinds(self) -> list[str]:
        return [event.kind for event in self.events]

    @property
    def lost(self) -> int:
        return sum(event.count for event in self.events if event.kind == "lost")

    async def until(self, condition: Callable[[], Any]) -> None:
        async with asyncio.timeout(PATIENCE_S):
            while not condition():
                self._changed.clear()
                await self._changed.wait()

    async def have(self, number: int) -> list[bytes]:
        await self.until(lambda: len(self.messages) >= number)
        return self.payloads


async def started(world: World, *, pending_bytes: int = 64 << 20) -> Bus:
    bus = world.make(pending_bytes=pending_bytes)
    async with asyncio.timeout(PATIENCE_S):
        await bus.start()
    return bus


@asynccontextmanager
async def running(config: NatsConfig) -> AsyncIterator[tuple[NatsBus, Listener]]:
    """A bus that is up, and who hears `s` there."""
    bus, heard = NatsBus(config), Listener()
    bus.on_event(heard.on_event)
    try:
        async with asyncio.timeout(PATIENCE_S):
            await bus.start()
            await bus.subscribe("s", heard)
            bus.publish("s", b"hello")
            await heard.have(1)
        yield bus, heard
    finally:
        await bus.close()
