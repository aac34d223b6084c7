"""A pull, as the sink is asked for it, and what the sink wants done: values without behaviour.

Also what makes a handle unfit for a pull before a single byte has moved.
"""

from typing import Final

import msgspec

from protocol.blocks import unpack_ids
from protocol.handoff import KvHandle
from protocol.out import FailureCode

_MAX_WORD: Final = (1 << 64) - 1


class Pull(msgspec.Struct, frozen=True):
    """What is to be copied: `remote_blocks[i]` of the source into `local_blocks[i]` of ours."""

    handle: KvHandle
    expected_hash: bytes
    """Content hash of our own prompt under our own model."""
    local_blocks: tuple[int, ...]
    """Writable blocks that nobody else holds."""
    remote_blocks: tuple[int, ...]
    num_tokens: int
    """Tokens whose KV is copied: what `max_tokens_in_flight` counts."""


class PostData(msgspec.Struct, frozen=True):
    """Start copying."""

    pull_id: int
    pull: Pull


class PostWord(msgspec.Struct, frozen=True):
    """Zero the scratch slot, then start reading the lease's word into it."""

    pull_id: int
    scratch_slot: int


class Ready(msgspec.Struct, frozen=True):
    """The blocks hold what was lent, and are the sequence's from now on."""

    pull_id: int


class PullFailed(msgspec.Struct, frozen=True):
    """Tell the router. Says nothing of the blocks."""

    pull_id: int
    code: FailureCode
    message: str


class FreeBlocks(msgspec.Struct, frozen=True):
    """Drop the quarantine's references if `Quarantine` came before, else the sequence's."""

    pull_id: int
    blocks: tuple[int, ...]


class Quarantine(msgspec.Struct, frozen=True):
    """Turn the sequence's references into the transfer's; `FreeBlocks` follows."""

    pull_id: int
    blocks: tuple[int, ...]


Command = PostData | PostWord | Ready | PullFailed | FreeBlocks | Quarantine


def mismatch(pull: Pull, block_size: int | None) -> str:
    """Why the handle is not the pull's, or none that can be pulled; empty if all is well.

    `block_size` is our own pool's, in tokens, where the caller knows it.
    """
    handle = pull.handle
    if handle.content_hash != pull.expected_hash:
        return "the handle is of another prompt or model"
    if handle.block_size < 1 or block_size not in (None, handle.block_size):
        return f"blocks of {handle.block_size} tokens, ours have {block_size}"
    if not 0 < pull.num_tokens <= handle.num_tokens:
        return f"{pull.num_tokens} tokens to pull of {handle.num_tokens}"
    if len(handle.ranks) != 1:
        return f"KV of {len(handle.ranks)} ranks, not of one"
    if not 0 < handle.ranks[0].nonce <= _MAX_WORD:
        return f"the lease's word would be {handle.ranks[0].nonce}"
    return _block_mismatch(pull)


def _block_mismatch(pull: Pull) -> str:
    handle, wanted = pull.handle, pull.remote_blocks
    num_blocks = -(-handle.num_tokens // handle.block_size)
    packed = handle.ranks[0].blocks
    if len(packed) != 4 * num_blocks:
        return f"{len(packed)} bytes of block numbers for {num_blocks} blocks"
    if not 0 < len(wanted) == len(pull.local_blocks):
        return f"{len(wanted)} blocks to pull into {len(pull.local_blocks)}"
    if not set(wanted) <= set(unpack_ids(packed)):
        return "blocks to pull that the handle does not name"
    return ""
