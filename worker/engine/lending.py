"""The lending end of the hand-off, driven: finished prefills become leases and handles.

The rules are in `worker.handoff.source`. Lives in the engine's thread.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from protocol.blocks import pack_ids
from protocol.errors import LocalError
from protocol.handoff import KvHandle, Offer, RankKv
from protocol.ids import JobKey
from worker.engine.batching import blocks_for
from worker.engine.sequences import ActiveSequence
from worker.handoff.source import Lease, Source


@dataclass(frozen=True, slots=True)
class HandleIdentity:
    """What every handle of this worker says."""

    worker: str
    incarnation: str
    block_size: int
    lease_s: float


class Lender:
    """Lends blocks of finished prefills, and remembers for whom."""

    def __init__(
        self,
        source: Source,
        identity: HandleIdentity,
        offers: Sequence[Offer],
        *,
        nonce: Callable[[], int],
    ) -> None:
        self._source = source
        self._identity = identity
        self._offers = list(offers)
        self._nonce = nonce
        self._handles: dict[JobKey, str] = {}
        self._keys: dict[str, JobKey] = {}

    def __contains__(self, key: JobKey) -> bool:
        """Whether blocks are lent for this attempt."""
        return key in self._handles

    @property
    def num_free_slots(self) -> int:
        return self._source.num_free_slots

    @property
    def num_lent(self) -> int:
        return self._source.num_lent

    @property
    def ended(self) -> dict[str, int]:
        return dict(self._source.ended)

    def lend(self, sequence: ActiveSequence, now: float) -> KvHandle | None:
        """Lend all blocks of its computed tokens, whose KV is written. None: no slot is free."""
        identity, num_tokens = self._identity, sequence.num_computed
        blocks = sequence.blocks[: blocks_for(num_tokens, identity.block_size)]
        handle_id = f"{self._nonce():016x}{self._nonce():016x}"
        lease = self._source.lend(handle_id, blocks, self._nonce(), now)
        if lease is None:
            return None
        self._handles[sequence.key] = handle_id
        self._keys[handle_id] = sequence.key
        rank = RankKv(pack_ids(blocks), lease.slot, lease.nonce, self._offers)
        return KvHandle(
            handle_id=handle_id,
            worker=identity.worker,
            incarnation=identity.incarnation,
            num_tokens=num_tokens,
            block_size=identity.block_size,
            content_hash=sequence.content_hash(num_tokens),
            lease_s=identity.lease_s,
            ranks=[rank],
        )

    def renew(self, handle_ids: Sequence[str], now: float) -> None:
        self._source.renew(handle_ids, now)

    def release(self, handle_ids: Sequence[str], now: float) -> None:
        self._forget(self._source.release(handle_ids, now))

    def revoke(self, key: JobKey, now: float) -> None:
        """The attempt was cancelled: nobody will fetch what was lent for it."""
        if key in self._handles:
            self._forget(self._source.revoke([self._handles[key]], now))

    def expire(self, now: float) -> None:
        deadline = self._source.next_deadline()
        if deadline is not None and deadline <= now:
            self._forget(self._source.expire(now))

    def next_deadline(self) -> float | None:
        return self._source.next_deadline()

    def validate(self) -> None:
        """Raises LocalError where a rule is broken."""
        self._source.validate()
        if len(self._handles) != len(self._keys) or len(self._keys) != self.num_lent:
            raise LocalError(f"{len(self._handles)} attempts lent, {self.num_lent} leases")

    def _forget(self, leases: Sequence[Lease]) -> None:
        for lease in leases:
            key = self._keys.pop(lease.handle_id, None)
            if key is not None:
                del self._handles[key]
