"""The registry over any store: keys `/baton/<namespace>/workers/<worker_id>`.

It must not know which store that is. It owns the tasks of its registrations and watches.
"""

import asyncio
import random
from collections.abc import Callable, Coroutine
from typing import Any

from discovery.changes import Change
from discovery.follower import Follower, Pace
from discovery.lease_keeper import LeaseKeeper
from discovery.registration import KeptRegistration
from discovery.registry import IsAlive, Registration, RegistryState, Watch
from discovery.store import Store
from protocol.worker_info import WorkerInfo


def workers_prefix(namespace: str) -> str:
    """Where the workers of a namespace are. `ValueError` if it is not one plain path segment."""
    if not namespace or "/" in namespace:
        raise ValueError(f"namespace must be a name without '/', not {namespace!r}")
    return f"/baton/{namespace}/workers/"


class StoredRegistry:
    """A `Registry` over a store. Make it on the loop that uses it."""

    def __init__(
        self,
        store: Store,
        namespace: str,
        *,
        pace: Pace,
        jitter: Callable[[], float] = random.random,
    ) -> None:
        self._store = store
        self._prefix = workers_prefix(namespace)
        self._pace = pace
        self._jitter = jitter
        self._tasks: set[asyncio.Task[None]] = set()
        self._open: list[KeptRegistration | Follower] = []
        self._closed = False

    async def register(self, info: WorkerInfo, *, ttl_s: float, is_alive: IsAlive) -> Registration:
        """See `Registry.register`."""
        self._check_open()
        keeper = LeaseKeeper(info, ttl_s=ttl_s, jitter=self._jitter)
        key = self._prefix + info.worker_id
        registration = KeptRegistration(
            self._store,
            key,
            keeper,
            is_alive,
            ask_limit_s=ttl_s,
            patience_s=self._pace.patience_s,
        )
        self._remember(registration)
        await registration.begin(self._spawn)
        return registration

    def watch(
        self, on_change: Callable[[Change], None], on_state: Callable[[RegistryState], None]
    ) -> Watch:
        """See `Registry.watch`."""
        self._check_open()
        follower = Follower(
            self._store,
            self._prefix,
            on_change=on_change,
            on_state=on_state,
            pace=self._pace,
            jitter=self._jitter,
        )
        follower.hold(self._spawn(follower.run()))
        self._remember(follower)
        return follower

    async def close(self) -> None:
        """See `Registry.close`."""
        self._closed = True
        async with asyncio.TaskGroup() as group:
            for one in list(self._open):
                group.create_task(one.close())
        await self._store.close()

    def _remember(self, one: KeptRegistration | Follower) -> None:
        self._open = [known for known in self._open if not known.closed]
        self._open.append(one)

    def _check_open(self) -> None:
        if self._closed:
            raise RuntimeError("the registry is closed")

    def _spawn(self, work: Coroutine[Any, Any, None]) -> "asyncio.Task[None]":
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task
