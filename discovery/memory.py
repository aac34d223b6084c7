"""The registry in memory: the twin of the etcd one, for tests and for a fleet inside one process.

`MemoryServer` stands for the etcd server: it holds keys, leases and revisions and can be down,
frozen, compacted or emptied. Each `MemoryRegistry` is one client of it and can be cut off.
It must not know workers.
"""

import asyncio
import itertools
import math
import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from discovery.follower import Pace
from discovery.store import (
    Entry,
    KeyEvent,
    Lease,
    LeaseGone,
    Listing,
    OnEvents,
    Position,
    PutResult,
    StoreUnavailable,
    WatchBroken,
)
from discovery.stored_registry import StoredRegistry

MAX_HISTORY = 10_000


class _Switch:
    """A condition that tasks can wait for, both ways."""

    def __init__(self) -> None:
        self.on = asyncio.Event()
        self.off = asyncio.Event()
        self.off.set()

    def set(self, value: bool) -> None:
        """Turn it on or off."""
        (self.on if value else self.off).set()
        (self.off if value else self.on).clear()


class _Held:
    """A lease as the server sees it."""

    def __init__(self, ttl_s: float, expires_at: float) -> None:
        self.ttl_s = ttl_s
        self.expires_at = expires_at


class MemoryServer:
    """Keys, leases and faults, shared by the clients of one loop.

    Without a `clock` leases expire by timers of the loop. With one, time stands still until the
    test moves it and calls `tick`.
    """

    def __init__(self, clock: Callable[[], float] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        self._clock = clock or self._loop.time
        self._timed = clock is None
        self._timer: asyncio.TimerHandle | None = None
        self._lease_ids = itertools.count(1)
        self._frozen = _Switch()
        self._down = _Switch()
        self.changed = asyncio.Event()
        self._clear()

    def _clear(self) -> None:
        self.revision = 1
        self.compacted = 0
        self.entries: dict[str, Entry] = {}
        self.history: list[KeyEvent] = []
        self._leases: dict[int, _Held] = {}

    @property
    def down(self) -> asyncio.Event:
        """Set while the server is down."""
        return self._down.on

    @property
    def is_down(self) -> bool:
        """Whether calls are refused at once."""
        return self._down.on.is_set()

    def kill(self) -> None:
        """Refuse all calls and end all watches. Leases stand still, as those of a dead etcd do."""
        self._down.set(True)

    def start(self) -> None:
        """Answer again; every lease lives for its whole TTL from now, as etcd's do."""
        for held in self._leases.values():
            held.expires_at = self._clock() + held.ttl_s
        self._down.set(False)
        self._arm()

    def freeze(self) -> None:
        """Answer nothing, without an error. Leases go on to expire."""
        self._frozen.set(True)

    def thaw(self) -> None:
        """Go on; what expired meanwhile goes first."""
        self._frozen.set(False)
        self.tick()

    def empty(self) -> None:
        """Lose keys, leases and history, as a fresh data directory does."""
        self._clear()
        self._notify()

    def compact(self) -> None:
        """Forget the history up to now."""
        self.compacted = self.revision
        self.history.clear()

    def tick(self) -> None:
        """Expire what is due."""
        if self.is_down or self._frozen.on.is_set():
            return
        now = self._clock()
        for lease_id in [i for i, held in self._leases.items() if held.expires_at <= now]:
            self.end_lease(lease_id)
        self._arm()

    def grant(self, ttl_s: float) -> Lease:
        """A new lease."""
        lease_id = next(self._lease_ids)
        self._leases[lease_id] = _Held(ttl_s, self._clock() + ttl_s)
        self._arm()
        return Lease(lease_id, ttl_s)

    def renew(self, lease_id: int) -> float:
        """Let a lease live for its TTL again. Raises `LeaseGone`."""
        held = self._leases.get(lease_id)
        if held is None:
            raise LeaseGone(f"lease {lease_id} is unknown")
        held.expires_at = self._clock() + held.ttl_s
        self._arm()
        return held.ttl_s

    def end_lease(self, lease_id: int) -> None:
        """Forget a lease and delete its keys, in one revision."""
        self._leases.pop(lease_id, None)
        keys = [entry.key for entry in self.entries.values() if entry.lease_id == lease_id]
        if lease_id and keys:
            self.revision += 1
            for key in keys:
                del self.entries[key]
                self._record(KeyEvent(key, None, self.revision))

    def write(self, key: str, value: bytes, lease_id: int) -> int:
        """Write a key; the new revision. Raises `LeaseGone`."""
        if lease_id and lease_id not in self._leases:
            raise LeaseGone(f"lease {lease_id} is unknown")
        self.revision += 1
        self.entries[key] = Entry(key, value, self.revision, lease_id)
        self._record(KeyEvent(key, value, self.revision))
        return self.revision

    def delete(self, key: str) -> None:
        """Delete a key, whoever's it is."""
        if self.entries.pop(key, None) is not None:
            self.revision += 1
            self._record(KeyEvent(key, None, self.revision))

    def _record(self, event: KeyEvent) -> None:
        self.history.append(event)
        if len(self.history) > MAX_HISTORY:
            half = MAX_HISTORY // 2
            self.compacted = self.history[half - 1].revision
            del self.history[:half]
        self._notify()

    def _notify(self) -> None:
        self.changed.set()
        self.changed = asyncio.Event()

    def _arm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        first = min((held.expires_at for held in self._leases.values()), default=math.inf)
        if self._timed and first < math.inf:
            self._timer = self._loop.call_at(first, self.tick)

    async def reach(self) -> None:
        """Return when the server can answer. Raises `StoreUnavailable` if it is down."""
        while True:
            if self.is_down:
                raise StoreUnavailable("connection refused")
            if not self._frozen.on.is_set():
                return
            await _first_of(self._down.on, self._frozen.off)


async def _first_of(*events: asyncio.Event) -> None:
    tasks = [asyncio.create_task(event.wait()) for event in events]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()


class MemoryStore:
    """One client's `Store` on a `MemoryServer`, with the time limits of a real client."""

    def __init__(self, server: MemoryServer, *, call_timeout_s: float = 1.5) -> None:
        self._server = server
        self._call_timeout_s = call_timeout_s
        self._cut = _Switch()

    def cut(self) -> None:
        """Lose the way to the server: calls fail at once, watches end."""
        self._cut.set(True)

    def mend(self) -> None:
        """Find the way again."""
        self._cut.set(False)

    @asynccontextmanager
    async def _reached(self) -> AsyncIterator[MemoryServer]:
        if self._cut.on.is_set():
            raise StoreUnavailable("cut off")
        try:
            async with asyncio.timeout(self._call_timeout_s):
                await self._server.reach()
        except TimeoutError:
            raise StoreUnavailable("no answer in time") from None
        yield self._server

    async def grant(self, ttl_s: float) -> Lease:
        """See `Store.grant`."""
        async with self._reached() as server:
            return server.grant(ttl_s)

    async def keep_alive(self, lease_id: int) -> float:
        """See `Store.keep_alive`."""
        async with self._reached() as server:
            return server.renew(lease_id)

    async def revoke(self, lease_id: int) -> None:
        """See `Store.revoke`."""
        async with self._reached() as server:
            server.end_lease(lease_id)

    async def put_if(
        self, key: str, value: bytes, *, lease_id: int, mod_revision: int
    ) -> PutResult:
        """See `Store.put_if`."""
        async with self._reached() as server:
            current = server.entries.get(key)
            if (current.mod_revision if current else 0) != mod_revision:
                return PutResult(False, server.revision, current)
            return PutResult(True, server.write(key, value, lease_id))

    async def get(self, key: str) -> Entry | None:
        """See `Store.get`."""
        async with self._reached() as server:
            return server.entries.get(key)

    async def list(self, prefix: str) -> Listing:
        """See `Store.list`."""
        async with self._reached() as server:
            found = [entry for key, entry in server.entries.items() if key.startswith(prefix)]
            return Listing(1, server.revision, found)

    async def position(self, prefix: str) -> Position:
        """See `Store.position`."""
        listing = await self.list(prefix)
        return Position(listing.cluster_id, listing.revision, len(listing.entries))

    async def watch(self, prefix: str, *, start_revision: int, on_events: OnEvents) -> None:
        """See `Store.watch`. After the server was emptied it is deaf, as etcd's is."""
        next_revision = start_revision
        while True:
            async with self._reached() as server:
                if next_revision <= server.compacted:
                    raise WatchBroken(f"compacted up to {server.compacted}")
                news = [event for event in server.history if event.revision >= next_revision]
                if news:
                    next_revision = news[-1].revision + 1
                mine = [event for event in news if event.key.startswith(prefix)]
                if mine:
                    on_events(mine)
                changed = server.changed
            await _first_of(changed, self._cut.on, server.down)

    async def close(self) -> None:
        """See `Store.close`."""
        self.cut()


class MemoryRegistry(StoredRegistry):
    """A `Registry` on a `MemoryServer`."""

    def __init__(
        self,
        server: MemoryServer,
        namespace: str = "default",
        *,
        call_timeout_s: float = 1.5,
        pace: Pace | None = None,
        jitter: Callable[[], float] = random.random,
    ) -> None:
        pace = pace or Pace()
        self.store = MemoryStore(server, call_timeout_s=call_timeout_s)
        super().__init__(self.store, namespace, pace=pace, jitter=jitter)
