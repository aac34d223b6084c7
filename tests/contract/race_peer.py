"""The source of the lease-word race, run as a process of its own: see `test_lease_word_race`.

The leases are those of the real `Source` over the real pool; what a scheduler would do by need is
done here at random moments: leases are revoked, and their blocks written again at once.
"""

import ctypes
import itertools
import json
import random
import sys
import threading
import time
from typing import Any

from tests.contract.transfer_peer import Peer, say
from worker.handoff.source import Lease, Source
from worker.kv.pool import BlockPool

OVERWRITTEN = 255


class RacePeer(Peer):
    def __init__(self, options: dict[str, Any]) -> None:
        super().__init__(options)
        self.rng = random.Random(options["seed"])
        self.pool = BlockPool(self.arena.num_blocks, block_size=16)
        self.source = Source(
            self.pool, self.leases, num_slots=self.leases.num_slots, lease_s=3600.0
        )
        self.handles = itertools.count()

    def round(self, *, pulls: int, blocks_each: int, span_s: float) -> str:  # type: ignore[override]
        """Lend `pulls` leases, say so, then end each at a random moment of about `span_s`."""
        leases = [self.lend_filled(blocks_each) for _ in range(pulls)]
        say([[lease.slot, lease.nonce, lease.blocks, byte_of(lease)] for lease in leases])
        moments = sorted(self.rng.uniform(0.0, 1.2 * span_s) for _ in leases)
        self.rng.shuffle(leases)
        begun = time.monotonic()
        for moment, lease in zip(moments, leases, strict=True):
            threading.Event().wait(max(0.0, begun + moment - time.monotonic()))
            self.revoke_and_write(lease)
        self.source.validate()
        self.pool.validate()
        return "revoked"

    def lend_filled(self, count: int) -> Lease:
        blocks = self.pool.allocate(count)
        assert blocks is not None
        self.rng.shuffle(blocks)
        handle = next(self.handles)
        self.write(blocks, 1 + handle % 250)
        nonce = self.rng.randrange(1, 1 << 64)
        lease = self.source.lend(str(handle), blocks, nonce, time.monotonic())
        assert lease is not None
        self.pool.release(blocks)  # the sequence is over: only the lease holds them now
        return lease

    def revoke_and_write(self, lease: Lease) -> None:
        assert not any(map(self.pool.is_writable, lease.blocks))
        self.source.revoke([lease.handle_id], time.monotonic())
        self.overwrite(lease.blocks)

    def overwrite(self, blocks: "tuple[int, ...]") -> None:
        """Not all at once, as a step of an engine does: were the word zeroed only after this, a
        reader would have the time to notice."""
        half = len(blocks) // 2
        self.write(blocks[:half], OVERWRITTEN)
        threading.Event().wait(0.004 if self.rng.random() < 0.25 else 0.0)
        self.write(blocks[half:], OVERWRITTEN)

    def write(self, blocks: "tuple[int, ...] | list[int]", byte: int) -> None:
        size = self.arena.block_bytes
        for block in blocks:
            ctypes.memset(self.arena.address + block * size, byte, size)


def byte_of(lease: Lease) -> int:
    return 1 + int(lease.handle_id) % 250


def main() -> None:
    peer = RacePeer(json.loads(sys.argv[1]))
    say(peer.offer())
    for line in sys.stdin:
        name, arguments = json.loads(line)
        say(getattr(peer, name)(**arguments))


if __name__ == "__main__":
    main()
