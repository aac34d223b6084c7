"""How one operation of a transport ended: what both the transports and the hand-off speak of.

Pure values. Knows nothing of memory, threads or the transports themselves.
"""

import msgspec


class TransferEnd(msgspec.Struct, frozen=True):
    """The terminal state of one operation: no byte of it will be written after this."""

    ok: bool
    reason: str = ""
    """Why not, for people and for the metric's label (first word)."""
    word: int | None = None
    """The lease word, where it was read as (or right after) the last byte; else None."""
    num_bytes: int = 0
    seconds: float = 0.0
    peer_gone: bool = False
    """The source process is known to be dead or unreachable."""
