"""What is said to everybody: `events.<worker>` (to all routers) and `routers` (beats).

KV events are numbered per worker incarnation; a reader that misses a number asks for a snapshot.
"""

import msgspec


class LoadReport(msgspec.Struct, tag="l", array_like=True, frozen=True):
    """Twice a second and on change. Its arrival is what makes a worker *live*."""

    running: int
    waiting: int
    num_blocks: int
    free_blocks: int
    """Blocks a new sequence could get: free or evictable."""
    lent_blocks: int
    quarantined_blocks: int
    steps: int
    """Engine steps since start; must move while `running + waiting > 0`."""
    last_kv_event: int
    last_seq: dict[str, int] = {}
    """The last envelope number sent to each recent router: a lost tail shows here."""
    draining: bool = False


class KvStored(msgspec.Struct, tag="s", array_like=True, frozen=True):
    """These blocks are in the prefix cache (16-byte chained hashes, concatenated)."""

    hashes: bytes


class KvRemoved(msgspec.Struct, tag="r", array_like=True, frozen=True):
    hashes: bytes


class KvCleared(msgspec.Struct, tag="c", array_like=True, frozen=True):
    """Nothing is cached any more."""


KvEvent = KvStored | KvRemoved | KvCleared


class KvEvents(msgspec.Struct, tag="k", array_like=True, frozen=True):
    """Consecutive events; the first has number `first_id`."""

    first_id: int
    events: list[KvEvent]


class KvSnapshot(msgspec.Struct, array_like=True, frozen=True):
    """The whole prefix cache after event `last_id`. Reply to `GetKvSnapshot`."""

    worker: str
    incarnation: str
    last_id: int
    hashes: bytes


class Leaving(msgspec.Struct, tag="b", array_like=True, frozen=True):
    """The worker drains and will be gone; give it no new work."""


WorkerEvent = LoadReport | KvEvents | Leaving


class EventEnvelope(msgspec.Struct, array_like=True, frozen=True):
    worker: str
    incarnation: str
    events: list[WorkerEvent]


class Beat(msgspec.Struct, array_like=True, frozen=True):
    """Once a second from every router; a worker stops the jobs of a router that falls silent."""

    router: str
    leaving: bool = False
    joining: bool = False
    """It has just come: every worker reports now, so that it need not wait for their next ones."""
