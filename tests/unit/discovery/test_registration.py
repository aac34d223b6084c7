"""What a registration says of a store that refuses it: not with every try."""

import asyncio

import pytest

from discovery import lease_keeper
from discovery.lease_keeper import LeaseKeeper
from discovery.memory import MemoryServer, MemoryStore
from discovery.registration import KeptRegistration
from discovery.store import PutResult, StoreDenied
from protocol.worker_info import WorkerInfo
from tests.unit.discovery.test_lease_keeper import worker

PATIENCE_S = 5.0
ENOUGH = 5


class Denying(MemoryStore):
    """Grants and renews leases, but nobody may write."""

    def __init__(self) -> None:
        super().__init__(MemoryServer())
        self.num_denied = 0
        self.num_renewed = 0
        self.enough = asyncio.Event()

    async def keep_alive(self, lease_id: int) -> float:
        self.num_renewed += 1
        return await super().keep_alive(lease_id)

    async def put_if(
        self, key: str, value: bytes, *, lease_id: int, mod_revision: int
    ) -> PutResult:
        self.num_denied += 1
        if min(self.num_denied, self.num_renewed) >= ENOUGH:
            self.enough.set()
        raise StoreDenied("permission denied")


async def is_alive(_: WorkerInfo) -> bool:
    return False


async def test_calls_that_succeed_between_refusals_make_them_no_news(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(lease_keeper, "DENIED_RETRY_S", 0.05)
    store = Denying()
    keeper = LeaseKeeper(worker(), ttl_s=0.1, jitter=lambda: 0.0)
    registration = KeptRegistration(
        store, "k", keeper, is_alive, ask_limit_s=PATIENCE_S, patience_s=PATIENCE_S
    )
    beginning = asyncio.ensure_future(registration.begin(asyncio.ensure_future))
    async with asyncio.timeout(PATIENCE_S):
        await store.enough.wait()
    beginning.cancel()
    await asyncio.wait([beginning])
    said = [line for line in caplog.messages if "refused" in line]
    assert said == ["registration k: registry refused: permission denied"]
