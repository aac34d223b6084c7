"""Handles whose blocks vLLM lends: what they carry, whom they fit, how long they last.

vLLM itself checks none of it: it serves any prompt with any handle's blocks, and reads blocks that
their owner has freed. So the sink's checks here are the only ones. It knows no sockets; time is an
argument: `wall` is the hosts' common clock, `now` this process's own.
"""

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, Final

import msgspec

from protocol.handoff import KvHandle
from worker.engine.sequences import ActiveSequence, SequenceRefused

MARGIN: Final = 0.2
"""This part of a lease is left alone: vLLM's D needs time to say that it wants the blocks."""
MAX_LENT: Final = 65_536


class VllmHandle(msgspec.Struct, frozen=True):
    """What `KvHandle.opaque` holds."""

    params: dict[str, Any]
    """vLLM's `kv_transfer_params`, as its prefill side said them."""
    lent_at: float
    """Unix time, by the source's clock."""


def make_handle(
    sequence: ActiveSequence,
    params: dict[str, Any],
    *,
    handle_id: str,
    worker: str,
    incarnation: str,
    lease_s: float,
    wall: float,
) -> KvHandle:
    num_tokens = len(sequence.ids)
    opaque = msgspec.msgpack.encode(VllmHandle(params, wall))
    return KvHandle(
        handle_id=handle_id,
        worker=worker,
        incarnation=incarnation,
        num_tokens=num_tokens,
        block_size=sequence.limits.block_size,
        content_hash=sequence.content_hash(num_tokens),
        lease_s=lease_s,
        ranks=[],
        opaque=msgspec.Raw(opaque),
    )


def check_handle(handle: KvHandle, sequence: ActiveSequence, *, wall: float) -> dict[str, Any]:
    """vLLM's parameters, if these blocks are this sequence's and surely still lent.

    Raises SequenceRefused: nothing may be sent to vLLM with this handle then."""
    if handle.num_tokens != len(sequence.ids) or handle.block_size != sequence.limits.block_size:
        raise SequenceRefused(
            "handle_mismatch",
            f"the handle is of {handle.num_tokens} tokens in blocks of {handle.block_size}, the "
            f"job of {len(sequence.ids)} in blocks of {sequence.limits.block_size}",
        )
    if handle.content_hash != sequence.content_hash(handle.num_tokens):
        raise SequenceRefused("handle_mismatch", "the handle is of another prompt or model")
    try:
        ours = msgspec.msgpack.decode(handle.opaque, type=VllmHandle)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise SequenceRefused("handle_mismatch", f"the handle is not vLLM's: {error}") from None
    age_s = wall - ours.lent_at
    if not age_s <= handle.lease_s * (1 - MARGIN):
        raise SequenceRefused(
            "lease_lost",
            f"the handle is {age_s:.1f} s old, of a lease of {handle.lease_s:g} s "
            "(or the clocks of the two hosts disagree)",
        )
    return ours.params


class LentHandles:
    """What this worker's vLLM lends. It cannot be told to stop: entries end when the router says
    that the blocks were fetched, or with the lease."""

    def __init__(self, *, lease_s: float, block_size: int) -> None:
        self._lease_s = lease_s
        self._block_size = block_size
        self._lent: OrderedDict[str, tuple[float, int]] = OrderedDict()
        self.num_blocks = 0
        """Of all that is lent; a plain number, as other threads read it."""
        self.num_released = 0
        self.num_expired = 0

    def __len__(self) -> int:
        return len(self._lent)

    def lend(self, handle: KvHandle, now: float) -> None:
        self._forget(handle.handle_id)
        blocks = -(-handle.num_tokens // self._block_size)
        self._lent[handle.handle_id] = (now + self._lease_s, blocks)
        self.num_blocks += blocks
        if len(self._lent) > MAX_LENT:
            self._forget(next(iter(self._lent)))

    def release(self, handle_ids: Sequence[str]) -> None:
        for handle_id in handle_ids:
            if self._forget(handle_id):
                self.num_released += 1

    def expire(self, now: float) -> None:
        while self._lent:
            handle_id, (due, _) = next(iter(self._lent.items()))
            if due > now:
                return
            self._forget(handle_id)
            self.num_expired += 1

    def _forget(self, handle_id: str) -> bool:
        """True if it was lent."""
        entry = self._lent.pop(handle_id, None)
        if entry is None:
            return False
        self.num_blocks -= entry[1]
        return True
