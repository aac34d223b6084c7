"""How a watch notices that it is being told nothing, or something old."""

import asyncio
import logging

import pytest

from discovery.changes import Change, Joined, Left, Updated, encode_worker
from discovery.follower import Follower, Pace
from discovery.memory import MemoryServer, MemoryStore
from discovery.registry import RegistryState
from discovery.store import KeyEvent, OnEvents
from protocol.worker_info import Capacity, KvLayout, WorkerInfo

PREFIX = "/w/"


def worker(worker_id: str, *, draining: bool = False) -> WorkerInfo:
    return WorkerInfo(
        worker_id=worker_id,
        incarnation="i",
        role="decode",
        model="m",
        model_digest="d",
        layout=KvLayout(block_size=16, block_bytes=1024),
        capacity=Capacity(num_blocks=8, max_running=4, max_context=128),
        engine="simulated",
        draining=draining,
    )


class DeafStore(MemoryStore):
    """Its watch stands, but says nothing."""

    async def watch(self, prefix: str, *, start_revision: int, on_events: OnEvents) -> None:
        await asyncio.Event().wait()


class RepeatingStore(MemoryStore):
    """Its watch begins with what the listing already had."""

    async def watch(self, prefix: str, *, start_revision: int, on_events: OnEvents) -> None:
        on_events([KeyEvent(PREFIX + "a", None, start_revision - 1)])
        await super().watch(prefix, start_revision=start_revision, on_events=on_events)


class Reader:
    """A follower with its task, and what it said."""

    def __init__(self, store: MemoryStore, pace: Pace) -> None:
        self.changes: list[Change] = []
        self.states: list[RegistryState] = []
        self._moved = asyncio.Event()
        self.follower = Follower(
            store,
            PREFIX,
            on_change=self._changed,
            on_state=self.states.append,
            pace=pace,
            jitter=lambda: 0.0,
        )

    def _changed(self, change: Change) -> None:
        self.changes.append(change)
        self._moved.set()

    async def until(self, changes: list[Change]) -> None:
        async with asyncio.timeout(3):
            while self.changes != changes:
                self._moved.clear()
                await self._moved.wait()


def put(server: MemoryServer, info: WorkerInfo) -> None:
    server.write(PREFIX + info.worker_id, encode_worker(info), 0)


async def test_revision_that_went_back_leads_to_a_new_list() -> None:
    server = MemoryServer()
    put(server, worker("a"))
    put(server, worker("b"))
    put(server, worker("b"))
    reader = Reader(MemoryStore(server), Pace(probe_s=0.02, relist_s=1e9))
    async with asyncio.TaskGroup() as group:
        task = group.create_task(reader.follower.run())
        await reader.until([Joined(worker("a")), Joined(worker("b"))])
        server.empty()
        put(server, worker("c"))
        put(server, worker("d"))  # as many keys as before, at a lower revision
        await reader.until(
            [
                Joined(worker("a")),
                Joined(worker("b")),
                Left(worker("a")),
                Left(worker("b")),
                Joined(worker("c")),
                Joined(worker("d")),
            ]
        )
        task.cancel()


async def test_deaf_watch_is_found_by_the_number_of_keys() -> None:
    server = MemoryServer()
    reader = Reader(DeafStore(server), Pace(probe_s=0.02, relist_s=1e9))
    async with asyncio.TaskGroup() as group:
        task = group.create_task(reader.follower.run())
        await asyncio.sleep(0)
        put(server, worker("a"))
        await reader.until([Joined(worker("a"))])
        task.cancel()


async def test_deaf_watch_is_helped_by_listing_again_without_becoming_stale() -> None:
    server = MemoryServer()
    put(server, worker("a"))
    reader = Reader(DeafStore(server), Pace(probe_s=0.02, relist_s=0.1))
    async with asyncio.TaskGroup() as group:
        task = group.create_task(reader.follower.run())
        await reader.until([Joined(worker("a"))])
        put(server, worker("a", draining=True))
        after = worker("a", draining=True)
        await reader.until([Joined(worker("a")), Updated(after, worker("a"))])
        task.cancel()
    assert len(reader.states) == 1


async def test_events_older_than_the_listing_change_nothing() -> None:
    server = MemoryServer()
    put(server, worker("a"))
    reader = Reader(RepeatingStore(server), Pace(probe_s=10, relist_s=1e9))
    async with asyncio.TaskGroup() as group:
        task = group.create_task(reader.follower.run())
        await reader.until([Joined(worker("a"))])
        put(server, worker("b"))
        await reader.until([Joined(worker("a")), Joined(worker("b"))])
        task.cancel()


async def test_unreadable_keys_are_logged_once_a_minute(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    server = MemoryServer()
    server.write(PREFIX + "bad", b"junk", 0)
    reader = Reader(MemoryStore(server), Pace(probe_s=0.01, relist_s=0.02))
    async with asyncio.TaskGroup() as group:
        task = group.create_task(reader.follower.run())
        await asyncio.sleep(0.1)
        put(server, worker("a"))
        await reader.until([Joined(worker("a"))])
        task.cancel()
    assert reader.follower.num_unreadable_seen > 1
    said = [one.getMessage() for one in caplog.records]
    assert said == ["1 keys under /w/ cannot be read, for instance bad"]
