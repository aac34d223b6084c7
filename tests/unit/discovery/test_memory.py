"""The in-memory server on a clock of the test's own."""

import pytest

from discovery.memory import MAX_HISTORY, MemoryServer, MemoryStore
from discovery.store import LeaseGone, StoreUnavailable
from discovery.stored_registry import workers_prefix


class Clock:
    """Stands still until moved."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


async def test_leases_expire_by_the_given_clock() -> None:
    clock = Clock()
    server = MemoryServer(clock)
    store = MemoryStore(server)
    lease = await store.grant(5.0)
    await store.put_if("k", b"v", lease_id=lease.lease_id, mod_revision=0)
    clock.now += 4.9
    server.tick()
    assert await store.get("k") is not None
    clock.now += 0.1
    server.tick()
    assert await store.get("k") is None
    with pytest.raises(LeaseGone):
        await store.keep_alive(lease.lease_id)


async def test_leases_stand_still_while_the_server_is_down() -> None:
    clock = Clock()
    server = MemoryServer(clock)
    store = MemoryStore(server)
    lease = await store.grant(5.0)
    server.kill()
    clock.now += 50
    server.tick()
    with pytest.raises(StoreUnavailable, match="refused"):
        await store.get("k")
    server.start()
    server.tick()
    assert await store.keep_alive(lease.lease_id) == 5.0


async def test_leases_run_out_while_the_server_is_frozen() -> None:
    clock = Clock()
    server = MemoryServer(clock)
    store = MemoryStore(server, call_timeout_s=0.01)
    lease = await store.grant(5.0)
    server.freeze()
    clock.now += 50
    server.tick()
    with pytest.raises(StoreUnavailable, match="in time"):
        await store.get("k")
    server.thaw()
    with pytest.raises(LeaseGone):
        await store.keep_alive(lease.lease_id)


async def test_history_is_bounded() -> None:
    server = MemoryServer()
    for _ in range(MAX_HISTORY + 1):
        server.write("k", b"v", 0)
    assert len(server.history) <= MAX_HISTORY
    assert server.compacted == server.history[0].revision - 1


@pytest.mark.parametrize("namespace", ["", "a/b"])
def test_namespace_is_one_path_segment(namespace: str) -> None:
    with pytest.raises(ValueError, match="namespace"):
        workers_prefix(namespace)
