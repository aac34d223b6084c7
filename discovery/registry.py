"""The registry port: how a worker says that it exists and how a router hears of it.

It must not know where the registry lives (`etcd`, `memory`), nor what the router does with the
changes. The registry going away harms nobody: registrations come back by themselves and watches
keep their last list.
"""

from collections.abc import Awaitable, Callable, Mapping
from typing import Protocol

import msgspec

from discovery.changes import Change
from protocol.worker_info import WorkerInfo

IsAlive = Callable[[WorkerInfo], Awaitable[bool]]


class TwinAlive(Exception):
    """Another process that still answers holds this worker id. `info` is what it registered."""

    def __init__(self, info: WorkerInfo) -> None:
        super().__init__(
            f"worker id {info.worker_id!r} is in use by a living process on {info.host or '?'} "
            f"(incarnation {info.incarnation})"
        )
        self.info = info


class Synced(msgspec.Struct, frozen=True):
    """The watch shows what the registry holds."""


class Stale(msgspec.Struct, frozen=True):
    """The registry cannot be followed at present; the watch keeps its last list."""

    reason: str


RegistryState = Synced | Stale


class Registration(Protocol):
    """A worker's own key, kept alive for ever until closed.

    It comes back by itself after a lost lease, a restart or an emptied registry.
    """

    @property
    def lost(self) -> bool:
        """Whether the key may be gone: not registered, or a whole TTL without a confirmation.

        Computed from the clock, so it is right at any moment, however long a call hangs.
        """
        ...

    async def update(self, info: WorkerInfo) -> None:
        """Store a new value under the same key and lease.

        From now on `info` is what every registration writes. Returns once it is stored, or after
        a few seconds if the registry is away; it then follows by itself. `ValueError` if `info`
        is another worker or incarnation.
        """
        ...

    async def close(self) -> None:
        """Delete the key. Takes bounded time: if the registry is away, the key expires instead."""
        ...


class Watch(Protocol):
    """A supervised watch of all workers of the namespace."""

    @property
    def workers(self) -> Mapping[str, WorkerInfo]:
        """The last known workers by id. Do not change it."""
        ...

    @property
    def num_unreadable_seen(self) -> int:
        """Values that could not be decoded, since the watch began."""
        ...

    async def close(self) -> None:
        """Stop watching. No callback is called afterwards."""
        ...


class Registry(Protocol):
    """Where workers register and routers look."""

    async def register(self, info: WorkerInfo, *, ttl_s: float, is_alive: IsAlive) -> Registration:
        """Register a worker; waits as long as the registry is away.

        Raises `TwinAlive` if another incarnation that `is_alive` confirms holds the key; a dead
        one's key is taken over at once. If `is_alive` raises, it is asked again later. Atomic with
        respect to cancellation: either you got the registration, or the key is given back.
        """
        ...

    def watch(
        self, on_change: Callable[[Change], None], on_state: Callable[[RegistryState], None]
    ) -> Watch:
        """Follow the workers. Callbacks run on the loop, must not wait, and see each change once.

        `Synced` follows the changes of the first listing. In trouble the watch says `Stale`, keeps
        its list, lists again and reports the difference.
        """
        ...

    async def close(self) -> None:
        """Close what was registered or watched through this registry, and its connections."""
        ...
