"""Other processes' arenas and lease tables, mapped read-only into ours.

A mapping keeps the memory of a dead source alive, so what the source no longer holds is unmapped
soon (`sweep`), but never while a copy uses it. Linux only: memory is reached by `/proc/<pid>/fd`.
"""

import ctypes
import functools
import mmap
import os
import stat
import threading
from collections import OrderedDict
from typing import Final

from protocol.handoff import ShmOffer
from worker.kv.arena import TOKEN_BYTES, WORD_BYTES

MAX_SOURCES: Final = 64
GRACE_S: Final = 2.0
"""How long a dead source's memory stays mapped."""


class SourceGone(Exception):
    """The process that made the offer does not run any more."""


class SourceClosed(Exception):
    """It may run, but its memory is not open to us."""


class SourceMap:
    """One source incarnation's memory in our address space."""

    def __init__(self, offer: ShmOffer) -> None:
        if offer.pid < 1 or offer.arena_bytes < 1 or offer.lease_bytes < TOKEN_BYTES + WORD_BYTES:
            raise SourceClosed("an offer of nothing")
        # The arena first: the token in the lease table, read after, then proves that this pid was
        # still the offer's process when the arena was opened.
        self.arena_address, _ = _map_file(offer.pid, offer.arena_fd, offer.arena_bytes)
        self.arena_bytes = offer.arena_bytes
        self.num_users = 0
        self.gone_at: float | None = None
        """When a sweep first found the source gone."""
        try:
            self.lease_address, self._inode = _map_file(
                offer.pid, offer.lease_fd, offer.lease_bytes
            )
        except BaseException:
            _unmap(self.arena_address, offer.arena_bytes)
            raise
        self.lease_bytes = offer.lease_bytes
        self._path = _path(offer.pid, offer.lease_fd)
        token_at = self.lease_address + offer.lease_bytes - TOKEN_BYTES
        if ctypes.string_at(token_at, TOKEN_BYTES) != offer.token.encode():
            self.unmap()
            raise SourceGone(f"process {offer.pid} is another one now")

    @property
    def num_slots(self) -> int:
        return (self.lease_bytes - TOKEN_BYTES) // WORD_BYTES

    def word(self, slot: int) -> int:
        """One aligned 64-bit load."""
        return ctypes.c_uint64.from_address(self.lease_address + slot * WORD_BYTES).value

    def is_held(self) -> bool:
        """The source still has that very lease table open: same process, still alive."""
        try:
            found = os.stat(self._path)
        except OSError:
            return False
        return (found.st_dev, found.st_ino) == self._inode

    def unmap(self) -> None:
        _unmap(self.arena_address, self.arena_bytes)
        _unmap(self.lease_address, self.lease_bytes)


class SourceMaps:
    """Mappings by offer (pid and token), least recently used first; used from several threads."""

    def __init__(self, max_sources: int = MAX_SOURCES) -> None:
        self._max = max_sources
        self._lock = threading.Lock()
        self._maps: OrderedDict[ShmOffer, SourceMap] = OrderedDict()
        self._dropped: list[SourceMap] = []
        """Nobody can get them any more. The next sweep unmaps them, which takes long for much
        memory: not while others wait for the lock, nor in a thread that asks for a mapping."""

    def __len__(self) -> int:
        return len(self._maps)

    def acquire(self, offer: ShmOffer) -> SourceMap:
        """The mapping, not unmapped before `release`. Raises SourceGone or SourceClosed."""
        with self._lock:
            found = self._maps.get(offer)
            if found is None:
                self._make_room()
                found = self._maps[offer] = SourceMap(offer)
            self._maps.move_to_end(offer)
            found.num_users += 1
            return found

    def release(self, source: SourceMap) -> None:
        with self._lock:
            source.num_users -= 1

    def sweep(self, now: float) -> None:
        """Unmap what belonged to processes that have been gone for a while: a pull that was under
        way when its source died still reads the word."""
        with self._lock:
            for offer, source in list(self._maps.items()):
                if source.num_users or source.is_held():
                    continue
                if source.gone_at is None:
                    source.gone_at = now
                elif now - source.gone_at >= GRACE_S:
                    self._drop(offer)
        self._unmap_dropped()

    def clear(self) -> None:
        """Unmap all that nobody uses."""
        with self._lock:
            for offer, source in list(self._maps.items()):
                if source.num_users == 0:
                    self._drop(offer)
        self._unmap_dropped()

    def _make_room(self) -> None:
        """More than the bound only while as many are in use."""
        for offer, source in list(self._maps.items()):
            if len(self._maps) < self._max:
                return
            if source.num_users == 0:
                self._drop(offer)

    def _drop(self, offer: ShmOffer) -> None:
        self._dropped.append(self._maps.pop(offer))

    def _unmap_dropped(self) -> None:
        with self._lock:
            dropped, self._dropped = self._dropped, []
        for source in dropped:
            source.unmap()


def _path(pid: int, fd: int) -> str:
    return f"/proc/{pid}/fd/{fd}"


def _map_file(pid: int, fd: int, nbytes: int) -> tuple[int, tuple[int, int]]:
    """Address, and (device, inode)."""
    path = _path(pid, fd)
    try:
        # A recycled pid may have anything under that number: opening a device can have effects.
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise SourceGone(f"{path} is no memory any more")
        own = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except (FileNotFoundError, ProcessLookupError) as error:
        raise _missing(pid, path) from error
    except OSError as error:
        raise SourceClosed(f"cannot open {path}: {error.strerror}") from error
    try:
        found = os.fstat(own)
        if found.st_size < nbytes:
            raise SourceGone(f"{path} is another file now")
        return _map(own, nbytes), (found.st_dev, found.st_ino)
    finally:
        os.close(own)


def _missing(pid: int, path: str) -> Exception:
    """A process of another user may be invisible under /proc (hidepid) and yet run."""
    try:
        os.kill(pid, 0)
    except PermissionError:
        return SourceClosed(f"{path} is hidden from us: another user's process")
    except OSError:
        pass
    return SourceGone(f"process {pid} is gone")


@functools.cache
def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [
        ctypes.c_void_p,
        ctypes.c_size_t,
        ctypes.c_int,
        ctypes.c_int,
        ctypes.c_int,
        ctypes.c_long,
    ]
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    return libc


def _map(fd: int, nbytes: int) -> int:
    """By libc and not by `mmap.mmap`: ctypes gives no address of a read-only buffer."""
    address = _libc().mmap(None, nbytes, mmap.PROT_READ, mmap.MAP_SHARED, fd, 0)
    if address is None or address == ctypes.c_void_p(-1).value:
        raise SourceClosed(f"mmap: {os.strerror(ctypes.get_errno())}")
    return int(address)


def _unmap(address: int, nbytes: int) -> None:
    _libc().munmap(address, nbytes)
