"""What every registry promises, asked of the twin in memory and of a real etcd alike."""

import asyncio
import time
from collections.abc import AsyncIterator, Iterator

import pytest
import pytest_asyncio

from discovery.changes import Joined, Left, Updated
from discovery.registry import Registration, Synced, TwinAlive
from discovery.store import LeaseGone, WatchBroken
from protocol.worker_info import WorkerInfo
from tests.contract.etcd_plants import EtcdPlant, MemoryPlant, Plant, Record, alive, dead, worker
from tests.contract.etcd_server import EtcdServer

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EtcdServer]:
    made = EtcdServer(tmp_path_factory.mktemp("etcd"))
    made.start()
    yield made
    made.kill()


@pytest_asyncio.fixture(loop_scope="module", params=["memory", "etcd"])
async def plant(request: pytest.FixtureRequest) -> AsyncIterator[Plant]:
    if request.param == "memory":
        made: Plant = MemoryPlant()
    else:
        made = EtcdPlant(request.getfixturevalue("server"))
    await made.begin()
    yield made
    await made.end()


async def watching(plant: Plant) -> Record:
    record = Record()
    plant.registry().watch(record.on_change, record.on_state)
    await record.synced()
    return record


async def registered(plant: Plant, info: WorkerInfo, *, leases: float = 1) -> Registration:
    return await plant.registry().register(info, ttl_s=leases * plant.ttl_s, is_alive=dead)


def is_lost(registration: Registration) -> bool:
    return registration.lost


async def test_register_update_close_are_seen_as_joined_updated_left(plant: Plant) -> None:
    record = await watching(plant)
    registration = await registered(plant, worker())
    assert not registration.lost
    await record.joined(worker())
    await registration.update(worker(draining=True))
    await registration.close()
    await record.left(worker(draining=True))
    assert record.changes == [
        Joined(worker()),
        Updated(worker(draining=True), worker()),
        Left(worker(draining=True)),
    ]
    assert record.states == [Synced()]
    assert registration.lost


async def test_watch_lists_who_was_there_before_and_says_synced_after(plant: Plant) -> None:
    await registered(plant, worker("a"))
    await registered(plant, worker("b"))
    record = Record()
    watch = plant.registry().watch(record.on_change, record.on_state)
    await record.synced()
    assert record.changes == [Joined(worker("a")), Joined(worker("b"))]
    assert watch.workers == {"a": worker("a"), "b": worker("b")}
    await watch.close()


async def test_update_keeps_identity(plant: Plant) -> None:
    registration = await registered(plant, worker())
    with pytest.raises(ValueError, match="incarnation"):
        await registration.update(worker(incarnation="i2"))
    await registration.close()
    with pytest.raises(RuntimeError, match="closed"):
        await registration.update(worker(draining=True))


async def test_crashed_worker_leaves_after_its_ttl_and_not_before(plant: Plant) -> None:
    record = await watching(plant)
    registration = await plant.fragile().register(worker(), ttl_s=plant.ttl_s, is_alive=dead)
    await record.joined(worker())
    began = time.monotonic()
    await plant.cut()
    await record.left(worker(), within_s=plant.ttl_s + 2)
    assert time.monotonic() - began > plant.ttl_s / 2
    assert registration.lost


async def test_living_twin_is_refused_and_not_disturbed(plant: Plant) -> None:
    record = await watching(plant)
    first = await registered(plant, worker(incarnation="i1"))
    with pytest.raises(TwinAlive) as refusal:
        await plant.registry().register(worker(incarnation="i2"), ttl_s=plant.ttl_s, is_alive=alive)
    assert refusal.value.info == worker(incarnation="i1")
    await registered(plant, worker("other"))
    await record.joined(worker("other"))
    assert record.changes == [Joined(worker(incarnation="i1")), Joined(worker("other"))]
    assert not first.lost


async def test_dead_twin_is_taken_over_at_once_and_does_not_strike_back(plant: Plant) -> None:
    record = await watching(plant)
    old, new = worker(incarnation="i1"), worker(incarnation="i2")

    async def only_new_lives(info: WorkerInfo) -> bool:
        return info == new

    first = await plant.fragile().register(old, ttl_s=plant.ttl_s, is_alive=only_new_lives)
    await record.joined(old)
    await plant.cut()
    began = time.monotonic()
    second = await plant.registry().register(new, ttl_s=plant.ttl_s, is_alive=only_new_lives)
    assert time.monotonic() - began < plant.ttl_s / 2
    await record.joined(new)
    await plant.mend()
    await asyncio.sleep(plant.ttl_s)
    assert record.changes == [Joined(old), Left(old), Joined(new)]
    assert first.lost
    assert not second.lost
    await second.close()
    await record.until(lambda: record.changes[-1] == Joined(old), within_s=plant.ttl_s + 2)


async def test_twin_question_that_fails_is_asked_again(plant: Plant) -> None:
    await registered(plant, worker(incarnation="i1"))
    num_asked = 0

    async def broken_first(_: WorkerInfo) -> bool:
        nonlocal num_asked
        num_asked += 1
        if num_asked == 1:
            raise ConnectionError("the bus is away")
        return False

    await plant.registry().register(
        worker(incarnation="i2"), ttl_s=plant.ttl_s, is_alive=broken_first
    )
    assert num_asked == 2


async def test_first_registration_and_watch_wait_for_an_absent_server(plant: Plant) -> None:
    await plant.kill()
    record = Record()
    plant.registry().watch(record.on_change, record.on_state)
    async with asyncio.TaskGroup() as group:
        pending = group.create_task(registered(plant, worker()))
        await record.stale()
        assert not pending.done()
        await plant.start()
        async with asyncio.timeout(5):
            assert not (await pending).lost
    await record.joined(worker())


async def test_cancelled_registration_leaves_no_key(plant: Plant) -> None:
    record = await watching(plant)
    await registered(plant, worker(incarnation="i1"))
    asked = asyncio.Event()

    async def never_answers(_: WorkerInfo) -> bool:
        asked.set()
        await asyncio.Event().wait()
        return True

    pending = asyncio.create_task(
        plant.registry().register(
            worker(incarnation="i2"), ttl_s=plant.ttl_s, is_alive=never_answers
        )
    )
    await asked.wait()
    pending.cancel()
    with pytest.raises(asyncio.CancelledError):
        await pending
    await registered(plant, worker("other"))
    await record.joined(worker("other"))
    assert record.changes == [Joined(worker(incarnation="i1")), Joined(worker("other"))]


async def test_restart_harms_nobody(plant: Plant) -> None:
    record = await watching(plant)
    registration = await registered(plant, worker(), leases=1.5)
    await record.joined(worker())
    await plant.kill()
    await record.stale(plant.stale_s)
    await asyncio.sleep(plant.ttl_s * 1.5 + 0.1)
    assert is_lost(registration)
    await plant.start()
    await record.synced()
    await registered(plant, worker("late"))
    await record.joined(worker("late"))
    await asyncio.sleep(plant.ttl_s * 1.5)
    assert not registration.lost
    assert record.changes == [Joined(worker()), Joined(worker("late"))]


async def test_freeze_is_noticed_and_survived(plant: Plant) -> None:
    record = await watching(plant)
    registration = await registered(plant, worker())
    await record.joined(worker())
    await plant.freeze()
    await record.stale(plant.stale_s)
    assert record.changes == [Joined(worker())]
    await asyncio.sleep(plant.ttl_s * 1.3)
    assert is_lost(registration)
    await plant.thaw()
    await record.synced()
    await asyncio.sleep(plant.ttl_s * 0.6)
    assert not registration.lost
    await registered(plant, worker("late"))
    await record.joined(worker("late"))
    assert {c.info.worker_id for c in record.changes if not isinstance(c, Left)} == {"w1", "late"}
    assert await plant.store().get(plant.key("w1")) is not None


async def test_compaction_while_cut_off_is_survived(plant: Plant) -> None:
    record = Record()
    plant.fragile().watch(record.on_change, record.on_state)
    gone = await registered(plant, worker("gone"))
    stays = await registered(plant, worker("stays"))
    await record.joined(worker("stays"))
    await plant.cut()
    await record.stale()
    await gone.close()
    await stays.update(worker("stays", draining=True))
    await registered(plant, worker("new"))
    await plant.compact()
    await plant.mend()
    await record.joined(worker("new"))
    assert record.changes[2] == Left(worker("gone"))
    rest = sorted(record.changes[3:], key=lambda change: change.info.worker_id)
    assert rest == [
        Joined(worker("new")),
        Updated(worker("stays", draining=True), worker("stays")),
    ]


async def test_emptied_server_is_filled_again(plant: Plant) -> None:
    record = await watching(plant)
    registration = await registered(plant, worker())
    await record.joined(worker())
    await plant.kill()
    await plant.wipe()
    await plant.start()
    await record.until(lambda: record.changes[-1] == Joined(worker()), within_s=8)
    await asyncio.sleep(plant.ttl_s)
    assert not registration.lost
    assert await plant.store().get(plant.key("w1")) is not None
    await registered(plant, worker("late"))
    await record.joined(worker("late"))


async def test_ended_lease_is_replaced(plant: Plant) -> None:
    record = await watching(plant)
    registration = await registered(plant, worker())
    await record.joined(worker())
    store = plant.store()
    entry = await store.get(plant.key("w1"))
    assert entry is not None
    await store.revoke(entry.lease_id)
    await record.until(lambda: len(record.changes) == 3, within_s=plant.ttl_s)
    assert record.changes == [Joined(worker()), Left(worker()), Joined(worker())]
    await registration.update(worker())  # the answer to the write may come after the event
    assert not registration.lost


async def test_key_deleted_by_others_comes_back(plant: Plant) -> None:
    record = await watching(plant)
    registration = await registered(plant, worker())
    await record.joined(worker())
    await plant.delete(plant.key("w1"))
    await record.until(lambda: len(record.changes) == 3, within_s=plant.ttl_s)
    assert record.changes == [Joined(worker()), Left(worker()), Joined(worker())]
    await registration.update(worker())  # the answer to the write may come after the event
    assert not registration.lost


async def test_unreadable_values_are_counted_and_harm_nobody(plant: Plant) -> None:
    record = Record()
    watch = plant.registry().watch(record.on_change, record.on_state)
    await record.synced()
    await plant.store().put_if(plant.key("bad"), b"{not json", lease_id=0, mod_revision=0)
    await registered(plant, worker())
    await record.joined(worker())
    assert watch.num_unreadable_seen >= 1
    assert watch.workers == {"w1": worker()}
    await registered(plant, worker("bad"))
    await record.joined(worker("bad"))


async def test_reader_that_raises_does_not_end_the_watch(plant: Plant) -> None:
    record = Record()

    def raises_once(change: object) -> None:
        record.on_change(change)  # type: ignore[arg-type]
        if len(record.changes) == 1:
            raise KeyError("a defect of the reader")

    plant.registry().watch(raises_once, record.on_state)
    await record.synced()
    await registered(plant, worker("a"))
    await registered(plant, worker("b"))
    await record.joined(worker("b"))


@pytest.mark.parametrize("fault", ["kill", "freeze"])
async def test_update_and_close_return_soon_while_the_server_is_away(
    plant: Plant, fault: str
) -> None:
    registration = await registered(plant, worker())
    await (plant.kill() if fault == "kill" else plant.freeze())
    began = time.monotonic()
    await registration.update(worker(draining=True))
    await registration.close()
    took_s = time.monotonic() - began
    await (plant.start() if fault == "kill" else plant.thaw())
    assert took_s < 4


async def test_update_during_an_absence_follows_by_itself(plant: Plant) -> None:
    """The lease is long: however slow the machine is, it does not end before the update is in."""
    record = await watching(plant)
    registration = await registered(plant, worker(), leases=10)
    await record.joined(worker())
    await plant.kill()
    async with asyncio.TaskGroup() as group:
        group.create_task(registration.update(worker(draining=True)))
        await record.stale()
        await plant.start()
    await record.until(lambda: len(record.changes) == 2, within_s=5)
    assert record.changes[1] == Updated(worker(draining=True), worker())


async def test_two_hundred_workers_are_seen(plant: Plant) -> None:
    store = plant.store()
    record = await watching(plant)
    value = b'{"worker_id":"%s","incarnation":"i","role":"both","model":"m","model_digest":"d",' + (
        b'"layout":{"block_size":1,"block_bytes":1},"engine":"e",'
        b'"capacity":{"num_blocks":1,"max_running":1,"max_context":1}}'
    )
    lease = await store.grant(plant.ttl_s * 10)
    for number in range(200):
        name = f"n{number}"
        await store.put_if(
            plant.key(name), value % name.encode(), lease_id=lease.lease_id, mod_revision=0
        )
    await record.until(lambda: len(record.changes) == 200, within_s=5)
    await store.revoke(lease.lease_id)
    await record.until(lambda: len(record.changes) == 400, within_s=5)
    assert all(isinstance(change, Left) for change in record.changes[200:])


async def test_store_guards_writes_and_names_ended_leases(plant: Plant) -> None:
    store = plant.store()
    key = plant.key("k")
    lease = await store.grant(plant.ttl_s)
    first = await store.put_if(key, b"1", lease_id=lease.lease_id, mod_revision=0)
    clash = await store.put_if(key, b"2", lease_id=lease.lease_id, mod_revision=0)
    entry = await store.get(key)
    assert (first.stored, clash.stored, clash.current) == (True, False, entry)
    assert await store.keep_alive(lease.lease_id) == lease.ttl_s
    await store.revoke(lease.lease_id)
    await store.revoke(lease.lease_id)
    with pytest.raises(LeaseGone):
        await store.keep_alive(lease.lease_id)
    with pytest.raises(LeaseGone):
        await store.put_if(key, b"3", lease_id=lease.lease_id, mod_revision=0)
    gone = await store.put_if(key, b"3", lease_id=0, mod_revision=first.revision)
    assert (gone.stored, gone.current) == (False, None)
    await store.close()


async def test_store_refuses_to_watch_what_was_compacted(plant: Plant) -> None:
    store = plant.store()
    listing = await store.list(plant.key(""))
    for name in ("k", "l", "m"):
        await store.put_if(plant.key(name), b"1", lease_id=0, mod_revision=0)
    await plant.compact()
    async with asyncio.timeout(5):
        with pytest.raises(WatchBroken, match="compacted"):
            await store.watch(
                plant.key(""), start_revision=listing.revision, on_events=lambda _: None
            )
    await store.close()
