"""The key-value store under a registry, as a port: keys with leases, listings, a watch.

It must not know workers. Every call is one try with a bounded time; who calls it decides whether to
try again. The registry over it (`stored_registry`) is the same for etcd and for memory.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

import msgspec


class StoreError(Exception):
    """A call on the store failed."""


class StoreUnavailable(StoreError):
    """The store did not answer, or not in time. Trying again later may help."""


class StoreDenied(StoreError):
    """The store refuses us: credentials, permissions or an unknown call. A person must act."""


class LeaseGone(StoreError):
    """The lease of this call has expired or never existed."""


class WatchBroken(StoreError):
    """The watch cannot go on from where it was (compacted, cancelled): list again."""


class Entry(msgspec.Struct, frozen=True):
    """One key as stored. `mod_revision` is the revision of its last write."""

    key: str
    value: bytes
    mod_revision: int
    lease_id: int


class Lease(msgspec.Struct, frozen=True):
    """A granted lease. The store may grant more seconds than asked."""

    lease_id: int
    ttl_s: float


class PutResult(msgspec.Struct, frozen=True):
    """What a guarded put found: the new revision, or the entry that was in its way."""

    stored: bool
    revision: int
    current: Entry | None = None


class Position(msgspec.Struct, frozen=True):
    """Where the store is, and how many keys a prefix has."""

    cluster_id: int
    revision: int
    num_keys: int


class Listing(msgspec.Struct, frozen=True):
    """All keys of a prefix at one revision."""

    cluster_id: int
    revision: int
    entries: list[Entry]


class KeyEvent(msgspec.Struct, frozen=True):
    """One change of one key at `revision`; value None: it is gone."""

    key: str
    value: bytes | None
    revision: int


OnEvents = Callable[[Sequence[KeyEvent]], None]


class Store(Protocol):
    """Every method raises `StoreUnavailable` or `StoreDenied` when it cannot do its work."""

    async def grant(self, ttl_s: float) -> Lease:
        """A new lease."""
        ...

    async def keep_alive(self, lease_id: int) -> float:
        """Renew a lease; the seconds it lives on. Raises `LeaseGone`."""
        ...

    async def revoke(self, lease_id: int) -> None:
        """End a lease and delete its keys. An unknown one is no error."""
        ...

    async def put_if(
        self, key: str, value: bytes, *, lease_id: int, mod_revision: int
    ) -> PutResult:
        """Write if the key's last write was `mod_revision` (0: there is no key).

        Raises `LeaseGone`.
        """
        ...

    async def get(self, key: str) -> Entry | None:
        """One key."""
        ...

    async def list(self, prefix: str) -> Listing:
        """All keys that begin with `prefix`."""
        ...

    async def position(self, prefix: str) -> Position:
        """As `list`, but only the number of keys: a cheap sign of life."""
        ...

    async def watch(self, prefix: str, *, start_revision: int, on_events: OnEvents) -> None:
        """Deliver changes from `start_revision` on, in order, until cancelled.

        Never returns normally.
        Raises `StoreUnavailable` when the stream ends or goes silent, `WatchBroken` when the
        store ended it.
        """
        ...

    async def close(self) -> None:
        """Close the connections. Calls under way fail."""
        ...
