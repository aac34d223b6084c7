"""Keeps one worker registered: what to do next, decided from what happened.

Pure: no event loop, clock, randomness or sockets; `now` and `jitter` are arguments. It must not
know etcd. The driver performs one command at a time and hands back one event:

    command = keeper.start(now)
    while True:
        event = ...perform command...
        command = keeper.handle(event, now)

Rules:
* A lease that could not be renewed is *not* given up: leases survive a restart of the store. Only
  the store's own word (`LeaseEnded`) ends it; then a new one is granted and the key written again.
* Every write is guarded by the key's revision as last seen, so that two processes never write over
  each other unseen. A write whose answer was lost is recognised by its incarnation.
* After every renewal the key is looked at: a key deleted or taken by others does not stay unseen.
* A key of another incarnation is taken over if that one does not answer. If it answers, a newcomer
  refuses to start, and one that was registered before waits, unregistered, until the other is gone.
"""

from collections.abc import Callable
from typing import assert_never

import msgspec

from discovery.backoff import delay_s
from discovery.changes import decode_worker, encode_worker
from protocol.worker_info import WorkerInfo

DENIED_RETRY_S = 5.0
LONGEST_BACKOFF_S = 0.5


class Grant(msgspec.Struct, frozen=True):
    """Ask for a lease. Answers: `Granted`, `Failed`."""

    ttl_s: float


class Write(msgspec.Struct, frozen=True):
    """Put the value if the key's last write was `mod_revision`. Answers: `Written`, `Seen`,
    `LeaseEnded`, `Failed`."""

    value: bytes
    lease_id: int
    mod_revision: int


class Renew(msgspec.Struct, frozen=True):
    """Keep the lease alive. Answers: `Renewed`, `LeaseEnded`, `Failed`."""

    lease_id: int


class Look(msgspec.Struct, frozen=True):
    """Read the key. Answers: `Seen`, `Failed`."""


class AskTwin(msgspec.Struct, frozen=True):
    """Ask whether that process is alive. Answers: `TwinAnswered`, `Failed`."""

    info: WorkerInfo


class Wait(msgspec.Struct, frozen=True):
    """Nothing to do until then, or until `change`. Answer: `Woken`."""

    until: float


class Refuse(msgspec.Struct, frozen=True):
    """Give up: a living process holds the key. No answer; the keeper is finished."""

    info: WorkerInfo


Command = Grant | Write | Renew | Look | AskTwin | Wait | Refuse


class Granted(msgspec.Struct, frozen=True):
    """A lease was granted for that long."""

    lease_id: int
    ttl_s: float


class Written(msgspec.Struct, frozen=True):
    """The value is stored, at this revision."""

    mod_revision: int


class Seen(msgspec.Struct, frozen=True):
    """The key as it is; `value` None: there is none."""

    value: bytes | None
    mod_revision: int = 0
    lease_id: int = 0


class Renewed(msgspec.Struct, frozen=True):
    """The lease lives for that long again."""

    ttl_s: float


class LeaseEnded(msgspec.Struct, frozen=True):
    """The store does not know the lease (any more)."""


class TwinAnswered(msgspec.Struct, frozen=True):
    """Whether the other process is alive."""

    alive: bool


class Failed(msgspec.Struct, frozen=True):
    """No answer; `denied`: the store refuses us, so knocking harder does not help."""

    denied: bool = False


class Woken(msgspec.Struct, frozen=True):
    """The wait is over."""


Event = Granted | Written | Seen | Renewed | LeaseEnded | TwinAnswered | Failed | Woken


class LeaseKeeper:
    """The state of one registration; changed only by `start`, `handle` and `change`."""

    def __init__(self, info: WorkerInfo, *, ttl_s: float, jitter: Callable[[], float]) -> None:
        self._info = info
        self._value = encode_worker(info)
        self._asked_ttl_s = ttl_s
        self._jitter = jitter
        self._ttl_s = ttl_s
        self._lease_id = 0
        self._writing = b""
        self._stored: bytes | None = None
        self._mod_revision = 0
        self._twin: tuple[Seen, WorkerInfo] | None = None
        self._was_registered = False
        self._look_due = False
        self._num_failures = 0
        self._asked_at = 0.0
        self._confirmed_at = 0.0
        self._renew_at = 0.0
        self._retry_at = 0.0

    @property
    def lease_id(self) -> int:
        """The lease to revoke on leaving; 0 if there is none."""
        return self._lease_id

    @property
    def settled(self) -> bool:
        """Whether the newest value is stored under our lease, as far as we know."""
        return self._stored == self._value

    def lost(self, now: float) -> bool:
        """Whether the key may be gone by now."""
        return self._stored is None or now >= self._confirmed_at + self._ttl_s

    def change(self, info: WorkerInfo) -> None:
        """Register `info` from now on; wake the driver afterwards."""
        ours = (self._info.worker_id, self._info.incarnation)
        if (info.worker_id, info.incarnation) != ours:
            raise ValueError("an update must keep worker id and incarnation")
        self._info = info
        self._value = encode_worker(info)

    def start(self, now: float) -> Command:
        """The first command."""
        return self._next(now)

    def handle(self, event: Event, now: float) -> Command:
        """Take what the last command led to; the next command."""
        match event:
            case Failed():
                self._failed(event, now)
                return self._next(now)
            case Granted():
                self._lease_id, self._ttl_s = event.lease_id, event.ttl_s
                self._confirm()
            case Renewed():
                self._ttl_s = event.ttl_s
                self._look_due = True
                self._confirm()
            case LeaseEnded():
                self._lease_ended(now)
                return self._next(now)
            case Written():
                self._registered(self._writing, event.mod_revision)
            case Seen():
                self._seen(event)
            case TwinAnswered():
                return self._twin_answered(event.alive, now)
            case Woken():
                return self._next(now)
            case _:  # pragma: no cover
                assert_never(event)
        self._num_failures = 0
        return self._next(now)

    def _next(self, now: float) -> Command:
        self._asked_at = now
        if now < self._retry_at:
            return Wait(self._retry_at)
        if self._lease_id == 0:
            return Grant(self._asked_ttl_s)
        if now >= self._renew_at:
            return Renew(self._lease_id)
        if self._twin is not None:
            return AskTwin(self._twin[1])
        if not self.settled:
            self._writing = self._value
            return Write(self._value, self._lease_id, self._mod_revision)
        if self._look_due:
            return Look()
        return Wait(self._renew_at)

    def _confirm(self) -> None:
        # The store counts from when it got the call; we from when we sent it, which is earlier.
        self._confirmed_at = self._asked_at
        self._renew_at = self._asked_at + self._ttl_s / 3

    def _lease_ended(self, now: float) -> None:
        if self._stored is None:
            # A lease that ends before it carried the key: do not spin through such leases.
            self._failed(Failed(), now)
        self._lease_id = 0
        self._unregister()

    def _failed(self, event: Failed, now: float) -> None:
        self._twin = None  # who holds the key by the next try is read again
        self._num_failures += 1
        longest_s = min(LONGEST_BACKOFF_S, self._asked_ttl_s / 6)
        pause_s = delay_s(self._num_failures, jitter=self._jitter(), longest_s=longest_s)
        self._retry_at = now + (DENIED_RETRY_S if event.denied else pause_s)

    def _registered(self, value: bytes, mod_revision: int) -> None:
        self._stored = value
        self._mod_revision = mod_revision
        self._was_registered = True
        self._look_due = False
        self._twin = None

    def _unregister(self) -> None:
        self._stored = None
        self._mod_revision = 0
        self._twin = None

    def _seen(self, seen: Seen) -> None:
        self._look_due = False
        if seen.value is None:
            self._unregister()
            return
        info = decode_worker(seen.value)
        if info is not None and info.incarnation != self._info.incarnation:
            self._unregister()
            self._twin = seen, info
        elif info is not None and seen.lease_id == self._lease_id:
            self._registered(seen.value, seen.mod_revision)
        else:
            # Ours under an old lease, or unreadable: nobody to ask, write over exactly this.
            self._unregister()
            self._mod_revision = seen.mod_revision

    def _twin_answered(self, alive: bool, now: float) -> Command:
        assert self._twin is not None, "an answer without a question"
        seen, info = self._twin
        if alive and not self._was_registered:
            return Refuse(info)
        self._num_failures = 0
        self._twin = None
        if alive:
            self._retry_at = now + self._ttl_s / 3
        else:
            self._mod_revision = seen.mod_revision
        return self._next(now)
