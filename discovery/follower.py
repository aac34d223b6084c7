"""Follows the workers in a store: lists, watches, and lists again whenever something is odd.

It must not know what its reader does with the changes, and never takes a worker away because the
store is away: only a complete listing or an event of the store does that.

A watch can be deaf without an error (a frozen server, a data directory that came back empty). So
beside the stream a probe asks every `probe_s` for the store's position: no answer, another cluster,
a revision that went backwards, or twice in a row another number of keys than we know: list again.
And every `relist_s` it lists anyway.
"""

import asyncio
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence

import msgspec

from discovery.backoff import delay_s
from discovery.changes import Change, Roster
from discovery.registry import RegistryState, Stale, Synced
from discovery.store import (
    KeyEvent,
    Listing,
    Position,
    Store,
    StoreDenied,
    StoreError,
    WatchBroken,
)
from protocol.worker_info import WorkerInfo

logger = logging.getLogger(__name__)

DENIED_RETRY_S = 5.0
LONGEST_BACKOFF_S = 0.5
LOG_EVERY_S = 60.0


class Pace(msgspec.Struct, frozen=True):
    """How often to ask and to list again, and how long to wait for a store that is away."""

    probe_s: float = 2.0
    relist_s: float = 30.0
    patience_s: float = 3.0
    """For an update to be stored, and for the goodbye on closing."""


class Follower:
    """A `Watch` over a store; `run` is its task, started and held by the registry."""

    def __init__(
        self,
        store: Store,
        prefix: str,
        *,
        on_change: Callable[[Change], None],
        on_state: Callable[[RegistryState], None],
        pace: Pace,
        jitter: Callable[[], float],
    ) -> None:
        self._store = store
        self._prefix = prefix
        self._on_change = on_change
        self._on_state = on_state
        self._pace = pace
        self._jitter = jitter
        self._now = asyncio.get_running_loop().time
        self._roster = Roster()
        self._state: RegistryState | None = None
        self._task: asyncio.Task[None] | None = None
        self.closed = False
        self._cluster_id = 0
        self._listed_revision = 0
        self._seen_revision = 0
        self._complained_at = -LOG_EVERY_S

    @property
    def workers(self) -> Mapping[str, WorkerInfo]:
        """See `Watch.workers`."""
        return self._roster.workers

    @property
    def num_unreadable_seen(self) -> int:
        """See `Watch.num_unreadable_seen`."""
        return self._roster.num_unreadable_seen

    def hold(self, task: "asyncio.Task[None]") -> None:
        """Take the task that runs `run`; `close` ends it."""
        self._task = task

    async def close(self) -> None:
        """See `Watch.close`."""
        self.closed = True
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])

    async def run(self) -> None:
        """Follow until cancelled."""
        failures = 0
        while True:
            began = self._now()
            try:
                await self._list_and_follow()
            except StoreError as error:
                reason, denied = str(error), isinstance(error, StoreDenied)
            except Exception as error:
                logger.exception("watch of %s: unexpected error", self._prefix)
                reason, denied = repr(error), False
            else:
                continue
            if self.closed:
                return  # an error that came with the cancellation has swallowed it
            self._enter(Stale(reason))
            failures = 1 if self._now() - began > self._pace.probe_s else failures + 1
            pause_s = delay_s(failures, jitter=self._jitter(), longest_s=LONGEST_BACKOFF_S)
            await asyncio.sleep(DENIED_RETRY_S if denied else pause_s)

    async def _list_and_follow(self) -> None:
        self._take_listing(await self._store.list(self._prefix))
        self._enter(Synced())
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._probe())
                group.create_task(
                    self._store.watch(
                        self._prefix,
                        start_revision=self._listed_revision + 1,
                        on_events=self._take_events,
                    )
                )
        except BaseExceptionGroup as trouble:
            raise trouble.exceptions[0] from None

    async def _probe(self) -> None:
        listed_at = self._now()
        num_odd = 0
        while True:
            await asyncio.sleep(self._pace.probe_s)
            self._log_unreadable()
            before = self._seen_revision
            if self._now() - listed_at >= self._pace.relist_s:
                listing = await self._store.list(self._prefix)
                self._check_history(listing, before)
                if listing.revision == self._seen_revision:  # else the stream was faster
                    self._take_listing(listing)
                    listed_at = self._now()
                continue
            position = await self._store.position(self._prefix)
            self._check_history(position, before)
            num_odd = num_odd + 1 if position.num_keys != self._roster.num_keys else 0
            if num_odd >= 2:
                raise WatchBroken("the watch misses changes")

    def _check_history(self, position: Position | Listing, before: int) -> None:
        if position.cluster_id != self._cluster_id:
            raise WatchBroken("another cluster answers")
        if position.revision < before:
            raise WatchBroken(f"revision went back from {before} to {position.revision}")
        self._seen_revision = max(self._seen_revision, position.revision)

    def _take_listing(self, listing: Listing) -> None:
        self._cluster_id = listing.cluster_id
        self._listed_revision = self._seen_revision = listing.revision
        skip = len(self._prefix)
        self._report(self._roster.reset((e.key[skip:], e.value) for e in listing.entries))
        self._log_unreadable()

    def _take_events(self, events: Sequence[KeyEvent]) -> None:
        skip = len(self._prefix)
        for event in events:
            if event.revision <= self._listed_revision:
                continue  # a listing that is newer has overtaken the stream
            worker_id = event.key[skip:]
            if event.value is None:
                self._report(self._roster.delete(worker_id))
            else:
                self._report(self._roster.put(worker_id, event.value))
            self._seen_revision = max(self._seen_revision, event.revision)

    def _report(self, changes: Iterable[Change]) -> None:
        for change in changes:
            try:
                self._on_change(change)
            except Exception:
                logger.exception("a reader of %s failed on %r", self._prefix, change)

    def _enter(self, state: RegistryState) -> None:
        if type(state) is type(self._state):
            return
        self._state = state
        if isinstance(state, Stale):
            logger.warning("watch of %s is stale: %s", self._prefix, state.reason)
        else:
            logger.info("watch of %s: %d workers", self._prefix, len(self.workers))
        try:
            self._on_state(state)
        except Exception:
            logger.exception("a reader of %s failed on %r", self._prefix, state)

    def _log_unreadable(self) -> None:
        unreadable = self._roster.unreadable
        if unreadable and self._now() - self._complained_at >= LOG_EVERY_S:
            self._complained_at = self._now()
            logger.warning(
                "%d keys under %s cannot be read, for instance %s",
                len(unreadable),
                self._prefix,
                min(unreadable),
            )
