"""What only a real etcd can do to us: TLS, users, clusters, dead connections, other settings."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import pytest_asyncio

from discovery.changes import Joined
from discovery.etcd import EtcdConfig, EtcdRegistry, EtcdStore
from discovery.store import StoreDenied, StoreUnavailable
from tests.contract.etcd_certs import Authority
from tests.contract.etcd_plants import EtcdPlant, Record, dead, worker
from tests.contract.etcd_server import EtcdServer, cluster_of_three, free_port

pytestmark = pytest.mark.asyncio(loop_scope="module")
TTL_S = 2.0


def config(*endpoints: str, **more: str) -> EtcdConfig:
    return EtcdConfig(
        list(endpoints), namespace="t", call_timeout_s=0.7, probe_s=0.5, relist_s=2.0, **more
    )


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EtcdServer]:
    made = EtcdServer(tmp_path_factory.mktemp("etcd"))
    made.start()
    yield made
    made.kill()


@pytest_asyncio.fixture(loop_scope="module")
async def plant(server: EtcdServer) -> AsyncIterator[EtcdPlant]:
    made = EtcdPlant(server)
    await made.begin()
    yield made
    await made.end()


async def meets(settings: EtcdConfig) -> None:
    """Register and see it through one registry, then leave."""
    registry, record = EtcdRegistry(settings), Record()
    try:
        async with asyncio.timeout(10):
            registry.watch(record.on_change, record.on_state)
            registration = await registry.register(worker(), ttl_s=TTL_S, is_alive=dead)
            await record.joined(worker())
            await registration.close()
            await record.left(worker())
    finally:
        await registry.close()


async def refusal(settings: EtcdConfig) -> Exception:
    """The error of one call."""
    store = EtcdStore(settings)
    try:
        await store.list("/baton/t/")
    except (StoreDenied, StoreUnavailable) as error:
        return error
    finally:
        await store.close()
    raise AssertionError("it was let in")


async def test_absence_costs_no_cpu(plant: EtcdPlant) -> None:
    record = Record()
    registry = plant.registry()
    registry.watch(record.on_change, record.on_state)
    await registry.register(worker(), ttl_s=TTL_S, is_alive=dead)
    await record.joined(worker())
    await plant.kill()
    await record.stale()
    before = time.process_time()
    await asyncio.sleep(3)
    used_s = time.process_time() - before
    await plant.start()
    await record.synced()
    print(f"cpu in 3 s of absence: {used_s:.3f} s")
    assert used_s < 0.2


async def test_connection_that_swallows_everything_is_replaced(plant: EtcdPlant) -> None:
    record = Record()
    registry = plant.fragile()
    registry.watch(record.on_change, record.on_state)
    registration = await registry.register(worker(), ttl_s=TTL_S * 5, is_alive=dead)
    await record.joined(worker())
    plant.swallow()
    await record.stale()
    await record.synced(10)
    await plant.registry().register(worker("late"), ttl_s=TTL_S, is_alive=dead)
    await record.joined(worker("late"))
    assert record.changes == [Joined(worker()), Joined(worker("late"))]
    assert not registration.lost


async def test_proxy_settings_of_the_environment_are_not_for_etcd(
    server: EtcdServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("http_proxy", "https_proxy", "grpc_proxy"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{free_port()}")
    await meets(config(server.url))


async def test_first_end_point_may_be_dead(server: EtcdServer) -> None:
    await meets(config(f"http://127.0.0.1:{free_port()}", server.url))


async def test_large_listing_passes(plant: EtcdPlant) -> None:
    store = plant.store()
    for number in range(50):
        await store.put_if(plant.key(f"large{number}"), b"x" * 100_000, lease_id=0, mod_revision=0)
    assert len((await store.list(plant.key("large"))).entries) == 50


@pytest.mark.parametrize("fault", ["kill", "freeze"])
async def test_loss_of_the_connected_member_of_three_harms_nobody(
    tmp_path: Path, fault: str
) -> None:
    members = await asyncio.to_thread(cluster_of_three, tmp_path)
    registry = EtcdRegistry(config(*(member.url for member in members)))
    others = EtcdRegistry(config(members[2].url))
    record = Record()
    try:
        registry.watch(record.on_change, record.on_state)
        registration = await registry.register(worker(), ttl_s=TTL_S * 2, is_alive=dead)
        await record.joined(worker())
        getattr(members[0], fault)()
        await record.stale()
        await others.register(worker("late"), ttl_s=TTL_S * 2, is_alive=dead)
        await record.joined(worker("late"))
        await registration.update(worker(draining=True))
        assert not registration.lost
        assert record.changes[:2] == [Joined(worker()), Joined(worker("late"))]
    finally:
        await registry.close()
        await others.close()
        for member in members:
            member.kill()


async def test_tls_and_mutual_tls(tmp_path: Path) -> None:
    authority, stranger = Authority(tmp_path, "ours"), Authority(tmp_path, "strange")
    certificate, key = map(str, authority.server())
    flags = ["--cert-file", certificate, "--key-file", key]
    server = EtcdServer(tmp_path, extra=flags, secure=True)
    ca = str(authority.path)
    try:
        await asyncio.to_thread(server.start)
        await meets(config(server.url, ca_cert=ca))
        wrong_ca = await refusal(config(server.url, ca_cert=str(stranger.path)))
        assert "CERTIFICATE_VERIFY_FAILED" in str(wrong_ca)
        server.kill()
        server.extra += ["--client-cert-auth", "--trusted-ca-file", ca]
        await asyncio.to_thread(server.start)
        for name in ("somebody", ""):
            cert, key = map(str, authority.client(name))
            await meets(config(server.url, ca_cert=ca, cert=cert, key=key))
        assert isinstance(await refusal(config(server.url, ca_cert=ca)), StoreUnavailable)
        missing = await refusal(config(server.url, ca_cert=str(tmp_path / "none.pem")))
        assert isinstance(missing, StoreDenied)
        assert "none.pem" in str(missing)
    finally:
        server.kill()


@pytest_asyncio.fixture(loop_scope="module")
async def guarded(tmp_path: Path) -> AsyncIterator[EtcdServer]:
    """A server that asks for a user; `baton` may use its own prefix."""
    made = EtcdServer(tmp_path)

    def prepare() -> None:
        made.start()
        made.ctl("user", "add", "root:r")
        made.ctl("role", "add", "baton")
        made.ctl("role", "grant-permission", "baton", "--prefix=true", "readwrite", "/baton/t/")
        made.ctl("user", "add", "baton:secret")
        made.ctl("user", "grant-role", "baton", "baton")
        made.ctl("user", "grant-role", "root", "root")
        made.ctl("auth", "enable")

    try:
        await asyncio.to_thread(prepare)
        yield made
    finally:
        made.kill()


async def test_user_and_password_survive_a_restart_that_kills_the_token(
    guarded: EtcdServer, caplog: pytest.LogCaptureFixture
) -> None:
    ours = config(guarded.url, username="baton", password="secret")
    registry, record = EtcdRegistry(ours), Record()
    try:
        registry.watch(record.on_change, record.on_state)
        registration = await registry.register(worker(), ttl_s=TTL_S, is_alive=dead)
        await record.joined(worker())
        await asyncio.to_thread(guarded.kill)
        await record.stale()
        await asyncio.to_thread(guarded.start)
        await record.synced()
        await asyncio.to_thread(guarded.ctl, "--user", "root:r", "user", "add", "somebody:else")
        await registration.update(worker(draining=True))
        await record.until(lambda: len(record.changes) == 2, within_s=5)
        assert not registration.lost
        assert not [one for one in caplog.records if one.levelno >= logging.ERROR]
    finally:
        await registry.close()


async def test_wrong_password_is_said_clearly_and_not_in_a_spin(
    guarded: EtcdServer, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    wrong = config(guarded.url, username="baton", password="wrong")
    registry, record = EtcdRegistry(wrong), Record()
    registry.watch(record.on_change, record.on_state)
    before = time.process_time()
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(1.5):
            await registry.register(worker(), ttl_s=TTL_S, is_alive=dead)
    assert time.process_time() - before < 0.15
    await registry.close()
    said = [one.getMessage() for one in caplog.records if one.name.startswith("discovery")]
    assert [text for text in said if "invalid user ID or password" in text]
    assert len(said) == 2
    assert not [text for text in said if "wrong" in text]
    assert isinstance(await refusal(config(guarded.url)), StoreDenied)
    other = EtcdStore(config(guarded.url, username="baton", password="secret"))
    with pytest.raises(StoreDenied, match="permission denied"):
        await other.list("/elsewhere/")
    await other.close()


async def test_user_name_for_a_server_without_users_is_let_in(server: EtcdServer) -> None:
    await meets(config(server.url, username="baton", password="secret"))
