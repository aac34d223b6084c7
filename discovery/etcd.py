"""The registry in etcd: `discovery.store.Store` spoken in etcd's v3 API.

It must not know workers. Connections, tokens and errors are in `etcd_channel`.
"""

import asyncio
import math
import random
from collections.abc import Callable
from typing import Any

from discovery import etcd_pb2 as pb
from discovery.etcd_channel import (
    END,
    GRANT,
    KEEP_ALIVE,
    RANGE,
    REVOKE,
    TXN,
    WATCH,
    EtcdChannel,
)
from discovery.etcd_config import EtcdConfig
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

__all__ = ["EtcdConfig", "EtcdRegistry", "EtcdStore"]


class EtcdStore:
    """A `Store` in etcd. Make it on the loop that uses it."""

    def __init__(self, config: EtcdConfig) -> None:
        self._channel = EtcdChannel(config)
        self._call_timeout_s = config.call_timeout_s
        self._probe_s = config.probe_s

    async def grant(self, ttl_s: float) -> Lease:
        """See `Store.grant`; etcd counts whole seconds."""
        request = pb.LeaseGrantRequest(TTL=max(1, math.ceil(ttl_s)))
        answer = await self._channel.call(GRANT, request)
        return Lease(answer.ID, float(answer.TTL))

    async def keep_alive(self, lease_id: int) -> float:
        """See `Store.keep_alive`."""
        request = pb.LeaseKeepAliveRequest(ID=lease_id)
        answer = await self._channel.exchange(KEEP_ALIVE, request)
        if answer.TTL <= 0:  # an unknown lease is a regular answer
            raise LeaseGone(f"lease {lease_id:x} has ended")
        return float(answer.TTL)

    async def revoke(self, lease_id: int) -> None:
        """See `Store.revoke`."""
        try:
            await self._channel.call(REVOKE, pb.LeaseRevokeRequest(ID=lease_id))
        except LeaseGone:
            pass

    async def put_if(
        self, key: str, value: bytes, *, lease_id: int, mod_revision: int
    ) -> PutResult:
        """See `Store.put_if`."""
        name = key.encode()
        guard = pb.Compare(
            result=pb.Compare.EQUAL,
            target=pb.Compare.MOD,
            key=name,
            mod_revision=mod_revision,
        )
        put = pb.PutRequest(key=name, value=value, lease=lease_id)
        look = pb.RangeRequest(key=name)
        request = pb.TxnRequest(
            compare=[guard],
            success=[pb.RequestOp(request_put=put)],
            failure=[pb.RequestOp(request_range=look)],
        )
        answer = await self._channel.call(TXN, request)
        if answer.succeeded:
            return PutResult(True, answer.header.revision)
        found = answer.responses[0].response_range.kvs
        return PutResult(False, answer.header.revision, _entry(found[0]) if found else None)

    async def get(self, key: str) -> Entry | None:
        """See `Store.get`."""
        answer = await self._channel.call(RANGE, pb.RangeRequest(key=key.encode()))
        return _entry(answer.kvs[0]) if answer.kvs else None

    async def list(self, prefix: str) -> Listing:
        """See `Store.list`."""
        answer = await self._channel.call(RANGE, _range(prefix))
        entries = [_entry(kv) for kv in answer.kvs]
        return Listing(answer.header.cluster_id, answer.header.revision, entries)

    async def position(self, prefix: str) -> Position:
        """See `Store.position`."""
        answer = await self._channel.call(RANGE, _range(prefix, count_only=True))
        return Position(answer.header.cluster_id, answer.header.revision, answer.count)

    async def watch(self, prefix: str, *, start_revision: int, on_events: OnEvents) -> None:
        """See `Store.watch`. A stream that does not answer a progress request counts as ended."""
        begin = pb.WatchCreateRequest(
            key=prefix.encode(), range_end=prefix_end(prefix), start_revision=start_revision
        )
        async with self._channel.stream(WATCH) as stream:
            heard = asyncio.Event()
            try:
                async with asyncio.TaskGroup() as group:
                    group.create_task(self._ask_progress(stream, heard))
                    await stream.write(pb.WatchRequest(create_request=begin))
                    await self._read(stream, heard, on_events)
            except BaseExceptionGroup as trouble:
                raise trouble.exceptions[0] from None

    async def _ask_progress(self, stream: Any, heard: asyncio.Event) -> None:
        request = pb.WatchRequest(progress_request=pb.WatchProgressRequest())
        while True:
            await asyncio.sleep(self._probe_s)
            heard.clear()
            await stream.write(request)
            try:
                async with asyncio.timeout(self._call_timeout_s):
                    await heard.wait()
            except TimeoutError:
                raise StoreUnavailable("the watch stream is silent") from None

    async def _read(self, stream: Any, heard: asyncio.Event, on_events: OnEvents) -> None:
        while True:
            answer = await stream.read()
            if answer is END:
                raise StoreUnavailable(f"the watch stream ended: {await stream.details()}")
            heard.set()
            if answer.canceled:
                self._cancelled(answer)
            if answer.events:
                on_events([_event(event) for event in answer.events])

    def _cancelled(self, answer: pb.WatchResponse) -> None:
        if answer.compact_revision:
            raise WatchBroken(f"compacted up to {answer.compact_revision}")
        # A stale token shows here, with other words per version; the next list tells the truth.
        raise WatchBroken(f"etcd cancelled the watch: {answer.cancel_reason}")

    async def close(self) -> None:
        """See `Store.close`."""
        await self._channel.close()


class EtcdRegistry(StoredRegistry):
    """A `Registry` in etcd. Make it on the loop that uses it."""

    def __init__(self, config: EtcdConfig, *, jitter: Callable[[], float] = random.random) -> None:
        self.store = EtcdStore(config)
        pace = Pace(
            probe_s=config.probe_s,
            relist_s=config.relist_s,
            patience_s=2 * config.call_timeout_s,
        )
        super().__init__(self.store, config.namespace, pace=pace, jitter=jitter)


def prefix_end(prefix: str) -> bytes:
    """The first key after all that begin with `prefix`, which is not empty and plain text."""
    encoded = prefix.encode()
    return encoded[:-1] + bytes([encoded[-1] + 1])


def _range(prefix: str, *, count_only: bool = False) -> pb.RangeRequest:
    return pb.RangeRequest(key=prefix.encode(), range_end=prefix_end(prefix), count_only=count_only)


def _entry(kv: pb.KeyValue) -> Entry:
    return Entry(kv.key.decode(errors="replace"), kv.value, kv.mod_revision, kv.lease)


def _event(event: pb.Event) -> KeyEvent:
    gone = event.type == pb.Event.DELETE
    key = event.kv.key.decode(errors="replace")
    return KeyEvent(key, None if gone else event.kv.value, event.kv.mod_revision)
