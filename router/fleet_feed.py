"""What the fleet says about itself, turned into scheduler events.

Two sources: discovery (who may exist) and the workers' event subjects (who is alive, what is
cached). Rubbish is counted and ignored.
"""

import logging

from discovery.changes import Change, Joined, Left, Updated
from discovery.registry import Registry, RegistryState, Synced, Watch
from protocol.bus import Bus, Message, Subscription
from protocol.codec import decode_events
from protocol.errors import BadMessage
from protocol.events import KvEvents, Leaving, LoadReport
from protocol.subjects import Subjects
from router.catalog import Catalog
from router.dispatch import Dispatch
from router.metrics import RouterMetrics
from router.scheduling import events as ev

_log = logging.getLogger("baton.router")


class FleetFeed:
    """Feeds one router's scheduler and catalog."""

    def __init__(
        self,
        *,
        bus: Bus,
        registry: Registry,
        subjects: Subjects,
        dispatch: Dispatch,
        catalog: Catalog,
        metrics: RouterMetrics,
    ) -> None:
        self._bus = bus
        self._registry = registry
        self._subjects = subjects
        self._dispatch = dispatch
        self._catalog = catalog
        self._metrics = metrics
        self._watch: Watch | None = None
        self._subscription: Subscription | None = None
        self.synced = False

    async def start(self) -> None:
        self._subscription = await self._bus.subscribe(self._subjects.all_events, self._on_events)
        self._watch = self._registry.watch(self._on_change, self._on_state)

    async def close(self) -> None:
        if self._subscription is not None:
            await self._subscription.close()
        if self._watch is not None:
            await self._watch.close()

    def _on_change(self, change: Change) -> None:
        info = change.info
        match change:
            case Joined() | Updated():
                _log.info(
                    "worker listed worker=%s incarnation=%s role=%s model=%s draining=%s",
                    info.worker_id,
                    info.incarnation,
                    info.role,
                    info.model,
                    info.draining,
                )
                self._catalog.listed(info)
                self._dispatch.feed(ev.WorkerListed(info))
            case Left():
                _log.info(
                    "worker unlisted worker=%s incarnation=%s", info.worker_id, info.incarnation
                )
                self._catalog.unlisted(info.worker_id, info.incarnation)
                self._dispatch.feed(ev.WorkerUnlisted(info.worker_id, info.incarnation))
                if not self._dispatch.scheduler.has_worker(info.worker_id, info.incarnation):
                    self._dispatch.inbox.forget_worker(info.worker_id, info.incarnation)

    def _on_state(self, state: RegistryState) -> None:
        synced = isinstance(state, Synced)
        if synced != self.synced:
            reason = "" if isinstance(state, Synced) else state.reason
            _log.info("discovery %s %s", "in step" if synced else "stale, list kept:", reason)
        self.synced = synced
        self._catalog.listing_came |= synced
        self._metrics.registry_fresh.set(1 if synced else 0)

    def _on_events(self, message: Message) -> None:
        try:
            envelope = decode_events(message.payload)
        except BadMessage as error:
            self._dispatch.inbox.bad_message(message.subject, error)
            return
        worker, incarnation = envelope.worker, envelope.incarnation
        if message.subject != self._subjects.events_or_none(worker):
            problem = BadMessage("another worker's name")
            self._dispatch.inbox.bad_message(message.subject, problem, "wrong_name")
            return
        for event in envelope.events:
            match event:
                case LoadReport():
                    self._dispatch.feed(ev.WorkerReported(worker, incarnation, event))
                    last = event.last_seq.get(self._dispatch.router_id, 0)
                    self._dispatch.inbox.reported(worker, incarnation, last)
                case KvEvents():
                    self._dispatch.feed(
                        ev.KvChanged(worker, incarnation, event.first_id, event.events)
                    )
                case Leaving():
                    self._dispatch.feed(ev.WorkerLeaving(worker, incarnation))
