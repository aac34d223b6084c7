"""Operations between their start and their one end, and how block lists become long copies.

Shared by the built-in transports. Knows nothing of how bytes move.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence

from worker.transfer.base import OnEnd, PullSpec, TransferEnd

_logger = logging.getLogger(__name__)


class Operation:
    """One pull or word read; also the ticket that the caller of `pull` gets."""

    def __init__(
        self,
        spec: PullSpec,
        on_end: OnEnd,
        live: "LiveCount",
        *,
        scratch_slot: int | None = None,
        on_abort: "Callable[[Operation], None] | None" = None,
    ) -> None:
        self.spec = spec
        self.scratch_slot = scratch_slot
        """Where the word goes if this is a word read; None for a pull."""
        self.num_bytes_done = 0
        self.retries = 0
        self.aborted = False
        self.ended = False
        self._on_end = on_end
        self._on_abort = on_abort
        self._live = live
        self._started_at = time.monotonic()
        live.add(1)

    @property
    def num_bytes(self) -> int:
        """Bytes of the whole operation, the word not counted."""
        return 0 if self.scratch_slot is not None else len(self.spec.local) * self.spec.block_bytes

    def abort(self) -> None:
        self.aborted = True
        if self._on_abort is not None:
            self._on_abort(self)

    def end(
        self, ok: bool, reason: str = "", *, word: int | None = None, peer_gone: bool = False
    ) -> None:
        """Tell the caller, once; called in the transport's thread, when nothing more can land."""
        if self.ended:
            return
        self.ended = True
        self._live.add(-1)
        end = TransferEnd(
            ok=ok,
            reason=reason,
            word=word,
            num_bytes=self.num_bytes_done,
            seconds=time.monotonic() - self._started_at,
            peer_gone=peer_gone,
        )
        try:
            self._on_end(end)
        except Exception:
            _logger.exception("on_end of a transfer raised")


class LiveCount:
    """How many operations have not ended; changed from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._value = 0

    @property
    def value(self) -> int:
        return self._value

    def add(self, difference: int) -> None:
        with self._lock:
            self._value += difference


def wrong_local(spec: PullSpec, num_blocks: int, block_bytes: int) -> str:
    """Why this pull would write outside of our arena's blocks; empty if it would not."""
    if spec.block_bytes != block_bytes:
        return f"bad_request: blocks of {spec.block_bytes} bytes, ours have {block_bytes}"
    if len(spec.remote) != len(spec.local):
        return f"bad_request: {len(spec.remote)} remote blocks for {len(spec.local)} local ones"
    if out_of_range(spec.local, num_blocks):
        return f"bad_request: a local block outside of 0 .. {num_blocks - 1}"
    return ""


def out_of_range(blocks: Sequence[int], num_blocks: int) -> bool:
    return len(blocks) > 0 and (min(blocks) < 0 or max(blocks) >= num_blocks)


def runs(
    remote: Sequence[int], local: Sequence[int], max_blocks: int
) -> Iterator[tuple[int, int, int]]:
    """Neighbours on both sides as one copy: (first remote block, first local block, count)."""
    count = 0
    start = (0, 0)
    for pair in zip(remote, local, strict=True):
        if count and count < max_blocks and pair == (start[0] + count, start[1] + count):
            count += 1
            continue
        if count:
            yield (*start, count)
        start, count = pair, 1
    if count:
        yield (*start, count)
