"""The registries under contract, each with the faults the contract speaks of.

A plant is a server with clients. `registry` makes a client with a safe way to the server,
`fragile` one whose way can be cut.
"""

import asyncio
import itertools
from collections.abc import Callable
from typing import Protocol

from discovery.changes import Change, Joined, Left
from discovery.etcd import EtcdConfig, EtcdRegistry, EtcdStore
from discovery.follower import Pace
from discovery.memory import MemoryRegistry, MemoryServer, MemoryStore
from discovery.registry import RegistryState, Stale, Synced
from discovery.store import Store
from discovery.stored_registry import StoredRegistry
from protocol.worker_info import Capacity, KvLayout, WorkerInfo
from tests.contract.etcd_proxy import Proxy
from tests.contract.etcd_server import EtcdServer

_numbers = itertools.count(1)


def worker(worker_id: str = "w1", incarnation: str = "i1", *, draining: bool = False) -> WorkerInfo:
    """A worker that says little about itself."""
    return WorkerInfo(
        worker_id=worker_id,
        incarnation=incarnation,
        role="both",
        model="m",
        model_digest="d",
        layout=KvLayout(block_size=16, block_bytes=1024),
        capacity=Capacity(num_blocks=8, max_running=4, max_context=128),
        engine="simulated",
        draining=draining,
    )


async def dead(_: WorkerInfo) -> bool:
    """Nobody answers."""
    return False


async def alive(_: WorkerInfo) -> bool:
    """Everybody answers."""
    return True


class Record:
    """What a watch said, to be waited for."""

    def __init__(self) -> None:
        self.changes: list[Change] = []
        self.states: list[RegistryState] = []
        self._moved = asyncio.Event()

    def on_change(self, change: Change) -> None:
        """For `Registry.watch`."""
        self.changes.append(change)
        self._moved.set()

    def on_state(self, state: RegistryState) -> None:
        """For `Registry.watch`."""
        self.states.append(state)
        self._moved.set()

    async def until(self, told: Callable[[], bool], within_s: float) -> None:
        """Wait until `told()` holds; looked at after every callback."""
        async with asyncio.timeout(within_s):
            while not told():
                self._moved.clear()
                await self._moved.wait()

    async def joined(self, info: WorkerInfo, within_s: float = 5.0) -> None:
        """Wait until this worker joined."""
        await self.until(lambda: Joined(info) in self.changes, within_s)

    async def left(self, info: WorkerInfo, within_s: float = 5.0) -> None:
        """Wait until this worker left."""
        await self.until(lambda: Left(info) in self.changes, within_s)

    async def synced(self, within_s: float = 5.0) -> None:
        """Wait until the watch shows what the registry holds."""
        await self.until(lambda: bool(self.states) and self.states[-1] == Synced(), within_s)

    async def stale(self, within_s: float = 5.0) -> None:
        """Wait until the watch says that it is cut off."""
        await self.until(lambda: bool(self.states) and isinstance(self.states[-1], Stale), within_s)


class Plant(Protocol):
    """What the contract asks of a kind of registry."""

    ttl_s: float
    stale_s: float

    def registry(self) -> StoredRegistry: ...
    def fragile(self) -> StoredRegistry: ...
    def store(self) -> Store: ...
    def key(self, worker_id: str) -> str: ...
    async def begin(self) -> None: ...
    async def end(self) -> None: ...
    async def cut(self) -> None: ...
    async def mend(self) -> None: ...
    async def kill(self) -> None: ...
    async def start(self) -> None: ...
    async def freeze(self) -> None: ...
    async def thaw(self) -> None: ...
    async def wipe(self) -> None: ...
    async def compact(self) -> None: ...
    async def delete(self, key: str) -> None: ...


class MemoryPlant:
    """The twin, with times ten times shorter."""

    ttl_s = 0.4
    stale_s = 0.5

    def __init__(self) -> None:
        self._server = MemoryServer()
        self._pace = Pace(probe_s=0.1, relist_s=0.5, patience_s=0.3)
        self._open: list[StoredRegistry] = []
        self._fragile: list[MemoryStore] = []

    def registry(self) -> StoredRegistry:
        return self._make()

    def fragile(self) -> StoredRegistry:
        made = self._make()
        self._fragile.append(made.store)
        return made

    def _make(self) -> MemoryRegistry:
        made = MemoryRegistry(self._server, "test", call_timeout_s=0.15, pace=self._pace)
        self._open.append(made)
        return made

    def store(self) -> Store:
        return MemoryStore(self._server, call_timeout_s=0.15)

    def key(self, worker_id: str) -> str:
        return f"/baton/test/workers/{worker_id}"

    async def begin(self) -> None:
        """Nothing to set up."""

    async def end(self) -> None:
        for one in self._open:
            await one.close()

    async def cut(self) -> None:
        for store in self._fragile:
            store.cut()

    async def mend(self) -> None:
        for store in self._fragile:
            store.mend()

    async def kill(self) -> None:
        self._server.kill()

    async def start(self) -> None:
        self._server.start()

    async def freeze(self) -> None:
        self._server.freeze()

    async def thaw(self) -> None:
        self._server.thaw()

    async def wipe(self) -> None:
        self._server.empty()

    async def compact(self) -> None:
        self._server.compact()

    async def delete(self, key: str) -> None:
        self._server.delete(key)


class EtcdPlant:
    """A real etcd that tests share one after the other, each under its own namespace."""

    ttl_s = 2.0
    stale_s = 2.0

    def __init__(self, server: EtcdServer) -> None:
        self._server = server
        self._namespace = f"test{next(_numbers)}"
        self._proxy = Proxy(server.port)
        self._open: list[StoredRegistry | EtcdStore] = []

    def config(self, url: str) -> EtcdConfig:
        return EtcdConfig(
            [url], namespace=self._namespace, call_timeout_s=0.7, probe_s=0.5, relist_s=2.0
        )

    def registry(self) -> StoredRegistry:
        made = EtcdRegistry(self.config(self._server.url))
        self._open.append(made)
        return made

    def fragile(self) -> StoredRegistry:
        made = EtcdRegistry(self.config(f"http://127.0.0.1:{self._proxy.port}"))
        self._open.append(made)
        return made

    def store(self) -> Store:
        made = EtcdStore(self.config(self._server.url))
        self._open.append(made)
        return made

    def key(self, worker_id: str) -> str:
        return f"/baton/{self._namespace}/workers/{worker_id}"

    async def begin(self) -> None:
        await self._proxy.mend()

    async def end(self) -> None:
        async with asyncio.TaskGroup() as group:
            for one in self._open:
                group.create_task(one.close())
        await self._proxy.cut()

    async def cut(self) -> None:
        await self._proxy.cut()

    async def mend(self) -> None:
        await self._proxy.mend()

    def swallow(self) -> None:
        self._proxy.swallow()

    async def kill(self) -> None:
        await asyncio.to_thread(self._server.kill)

    async def start(self) -> None:
        await asyncio.to_thread(self._server.start)

    async def freeze(self) -> None:
        self._server.freeze()

    async def thaw(self) -> None:
        self._server.thaw()

    async def wipe(self) -> None:
        await asyncio.to_thread(self._server.wipe)

    async def compact(self) -> None:
        store = self.store()
        revision = (await store.list(self.key(""))).revision
        await asyncio.to_thread(self._server.ctl, "compaction", str(revision))

    async def delete(self, key: str) -> None:
        await asyncio.to_thread(self._server.ctl, "del", key)
