"""What changed between two pictures of the fleet, and the picture itself.

Pure: no event loop, clock, randomness or sockets. It must not know etcd; it sees worker ids and
the bytes stored under them.
"""

from collections.abc import Iterable, Mapping

import msgspec

from protocol.worker_info import WorkerInfo, problem


class Joined(msgspec.Struct, frozen=True):
    """A worker process appeared in the registry."""

    info: WorkerInfo


class Updated(msgspec.Struct, frozen=True):
    """The same process (same incarnation) now says something else about itself."""

    info: WorkerInfo
    before: WorkerInfo


class Left(msgspec.Struct, frozen=True):
    """The key of this process is gone or belongs to another incarnation now.

    It says nothing about whether the process still runs; the reader applies its own grace.
    """

    info: WorkerInfo


Change = Joined | Updated | Left

_decoder = msgspec.json.Decoder(WorkerInfo)


def encode_worker(info: WorkerInfo) -> bytes:
    """The value stored under a worker's key."""
    return msgspec.json.encode(info)


def decode_worker(value: bytes) -> WorkerInfo | None:
    """The worker described by a stored value; None if the value cannot be read, or says what
    cannot be."""
    try:
        info = _decoder.decode(value)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
    return None if problem(info) else info


def diff(old: Mapping[str, WorkerInfo], new: Mapping[str, WorkerInfo]) -> list[Change]:
    """What turns `old` into `new`, both by worker id.

    An incarnation that replaced another under the same id is a `Left` followed by a `Joined`.
    All `Left` come first, so that a reader never holds more than either picture.
    """
    left: list[Change] = []
    arrived: list[Change] = []
    for worker_id, before in old.items():
        after = new.get(worker_id)
        if after is None or after.incarnation != before.incarnation:
            left.append(Left(before))
    for worker_id, after in new.items():
        known = old.get(worker_id)
        if known is None or known.incarnation != after.incarnation:
            arrived.append(Joined(after))
        elif known != after:
            arrived.append(Updated(after, known))
    return left + arrived


class Roster:
    """The registered workers by id, as of the last listing and the events since.

    A value that cannot be read counts as absent, so that the picture depends on the registry's
    contents alone and not on what this reader saw before.
    """

    def __init__(self) -> None:
        self._workers: dict[str, WorkerInfo] = {}
        self._keys: set[str] = set()
        self._unreadable: set[str] = set()
        self.num_unreadable_seen = 0

    @property
    def workers(self) -> Mapping[str, WorkerInfo]:
        """The readable workers by id. Do not change it."""
        return self._workers

    @property
    def num_keys(self) -> int:
        """Keys in the registry, readable or not."""
        return len(self._keys)

    @property
    def unreadable(self) -> frozenset[str]:
        """Ids whose value cannot be read at present."""
        return frozenset(self._unreadable)

    def reset(self, entries: Iterable[tuple[str, bytes]]) -> list[Change]:
        """Take a complete listing of (worker id, value)."""
        before = self._workers
        self._workers, self._keys, self._unreadable = {}, set(), set()
        for worker_id, value in entries:
            self._store(worker_id, value)
        return diff(before, self._workers)

    def put(self, worker_id: str, value: bytes) -> list[Change]:
        """Take a new value of one key."""
        before = self._one(worker_id)
        self._forget(worker_id)
        self._store(worker_id, value)
        return diff(before, self._one(worker_id))

    def delete(self, worker_id: str) -> list[Change]:
        """Take the end of one key; an unknown one changes nothing."""
        before = self._one(worker_id)
        self._forget(worker_id)
        return diff(before, {})

    def _one(self, worker_id: str) -> dict[str, WorkerInfo]:
        info = self._workers.get(worker_id)
        return {} if info is None else {worker_id: info}

    def _forget(self, worker_id: str) -> None:
        self._workers.pop(worker_id, None)
        self._keys.discard(worker_id)
        self._unreadable.discard(worker_id)

    def _store(self, worker_id: str, value: bytes) -> None:
        self._keys.add(worker_id)
        info = decode_worker(value)
        if info is None or info.worker_id != worker_id:
            self._unreadable.add(worker_id)
            self.num_unreadable_seen += 1
        else:
            self._workers[worker_id] = info
