"""Host memory that other processes on this host can map: the KV arena, the lease table, scratch.

One allocation each, for the life of the process: what a transfer may still touch is never freed or
moved. Knows nothing of blocks' contents, of leases' rules, of transports or torch.
"""

import ctypes
import fcntl
import mmap
import os
import secrets
import tempfile
from typing import Final, Literal

from protocol.errors import ConfigError, LocalError

WORD_BYTES: Final = 8
TOKEN_BYTES: Final = 32
"""The token is the last 32 bytes of a lease table, as ASCII hex digits."""


class SharedMemory:
    """An anonymous file of `nbytes` bytes, mapped readable and writable, zeroed.

    Raises ConfigError if the system does not give that much.
    """

    def __init__(self, name: str, nbytes: int) -> None:
        self.nbytes = nbytes
        self.fd = -1
        try:
            self.fd = _anonymous_file(name)
            _fix_size(self.fd, nbytes)
            self._map = mmap.mmap(self.fd, nbytes)
        except (OSError, OverflowError) as error:
            if self.fd >= 0:
                os.close(self.fd)
            raise ConfigError(f"{name}: cannot get {nbytes} bytes of memory: {error}") from error
        self.memory = memoryview(self._map)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self._map))

    def close(self) -> None:
        """Close the file and unmap. A view that somebody still holds (a tensor over the arena)
        keeps the mapping until it dies, so that no access faults. Repeats do nothing."""
        if self.fd < 0:
            return
        os.close(self.fd)
        self.fd = -1
        self.memory.release()
        try:
            self._map.close()
        except BufferError:
            pass


class Arena(SharedMemory):
    """All KV blocks of a worker, block after block; `block_bytes` is one block's size."""

    kind: Literal["host", "cuda"] = "host"
    device: int = 0
    """The GPU's number, if `kind` is "cuda"."""

    def __init__(self, num_blocks: int, block_bytes: int) -> None:
        if num_blocks < 1 or block_bytes < 1:
            raise LocalError(f"an arena of {num_blocks} blocks of {block_bytes} bytes")
        self.num_blocks = num_blocks
        self.block_bytes = block_bytes
        super().__init__("baton-arena", num_blocks * block_bytes)

    def block(self, index: int) -> memoryview:
        """The writable bytes of block `index`."""
        if not 0 <= index < self.num_blocks:
            raise LocalError(f"block {index} of {self.num_blocks}")
        start = index * self.block_bytes
        return self.memory[start : start + self.block_bytes]


class LeaseTable(SharedMemory):
    """64-bit words that readers in other processes compare with a handle's nonce, then the token.

    A word is stored and loaded by one aligned 64-bit access: a reader sees the old or the new.
    """

    def __init__(self, num_slots: int) -> None:
        if num_slots < 1:
            raise LocalError(f"a lease table of {num_slots} slots")
        self.num_slots = num_slots
        super().__init__("baton-leases", num_slots * WORD_BYTES + TOKEN_BYTES)
        self.token = secrets.token_hex(TOKEN_BYTES // 2)
        self.memory[-TOKEN_BYTES:] = self.token.encode()
        self._words: ctypes.Array[ctypes.c_uint64] | None = (
            ctypes.c_uint64 * num_slots
        ).from_buffer(self._map)

    def write(self, slot: int, word: int) -> None:
        """Store `word`. Raises LocalError outside of 0 .. 2**64 - 1 or of the table."""
        words = self._checked(slot)
        if not 0 <= word < 1 << 64:
            raise LocalError(f"{word} is no 64-bit word")
        words[slot] = word

    def zero(self, slot: int) -> None:
        self.write(slot, 0)

    def read(self, slot: int) -> int:
        return self._checked(slot)[slot]

    def close(self) -> None:
        self._words = None
        super().close()

    def _checked(self, slot: int) -> "ctypes.Array[ctypes.c_uint64]":
        if self._words is None:
            raise LocalError("the lease table is closed")
        if not 0 <= slot < self.num_slots:
            raise LocalError(f"slot {slot} of {self.num_slots}")
        return self._words


class ScratchWords:
    """Private 64-bit words that transports read a source's lease word into."""

    def __init__(self, num_slots: int) -> None:
        if num_slots < 1:
            raise LocalError(f"{num_slots} scratch words")
        self.num_slots = num_slots
        self._words = (ctypes.c_uint64 * num_slots)()
        self.address = ctypes.addressof(self._words)
        self.nbytes = num_slots * WORD_BYTES

    def write(self, slot: int, word: int) -> None:
        """What a transport without direct memory access does at the end of `read_word`."""
        self._words[self._checked(slot)] = word

    def zero(self, slot: int) -> None:
        self._words[self._checked(slot)] = 0

    def read(self, slot: int) -> int:
        return self._words[self._checked(slot)]

    def _checked(self, slot: int) -> int:
        if not 0 <= slot < self.num_slots:
            raise LocalError(f"scratch slot {slot} of {self.num_slots}")
        return slot


def _anonymous_file(name: str) -> int:
    """A file descriptor without a path; Linux's can also be opened under `/proc/<pid>/fd`."""
    return _memfd(name) if hasattr(os, "memfd_create") else _unlinked_file(name)


def _memfd(name: str) -> int:
    return os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)


def _unlinked_file(name: str) -> int:
    fd, path = tempfile.mkstemp(prefix=name)
    os.unlink(path)
    return fd


def _fix_size(fd: int, nbytes: int) -> None:
    """Who maps it must never fault because somebody made it smaller (only a memfd can promise)."""
    os.ftruncate(fd, nbytes)
    if hasattr(fcntl, "F_ADD_SEALS"):
        try:
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
        except OSError:
            pass
