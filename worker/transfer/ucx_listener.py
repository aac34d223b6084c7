"""Where UCX listens, kept as small as a plain socket's place would be.

UCXX's listener takes a port and no address, so it is open on every interface. The listening socket
is our process's: it is found among our descriptors by its port, and bound to the loopback device
where only this host may come. UCX also waits for ever for a client that connects and says nothing;
such sockets are found the same way and shut down, and UCX drops them then.
"""

import os
import socket
import struct
from collections.abc import Iterator
from typing import Final

_DESCRIPTORS: Final = "/proc/self/fd"
_TCP_INFO_BYTES_RECEIVED: Final = 128
"""Offset of `tcpi_bytes_received` in Linux's `struct tcp_info`, which only ever grows."""
_U64: Final = struct.Struct("=Q")


def keep_local(port: int) -> bool:
    """Let only this host reach the listener on `port`; False if that is not possible here."""
    done = False
    for sock in _sockets_on(port):
        try:
            if sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b"lo")
                done = True
        except OSError:
            pass
    return done


def drop_silent(port: int, seen: set[tuple[str, int]]) -> set[tuple[str, int]]:
    """Shut down the connections to `port` that have sent nothing, if they were so the last time
    too (`seen`). The ones that are silent now, for the next time."""
    silent: set[tuple[str, int]] = set()
    for sock in _sockets_on(port):
        try:
            peer = sock.getpeername()[:2]
            if _has_spoken(sock):
                continue
            if peer in seen:
                sock.shutdown(socket.SHUT_RDWR)
            else:
                silent.add(peer)
        except OSError:
            pass  # the listener itself, or gone in the meantime
    return silent


def _has_spoken(sock: socket.socket) -> bool:
    size = _TCP_INFO_BYTES_RECEIVED + _U64.size
    info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, size)
    return len(info) < size or _U64.unpack_from(info, _TCP_INFO_BYTES_RECEIVED)[0] > 0


def _sockets_on(port: int) -> Iterator[socket.socket]:
    """Our TCP sockets whose own end is `port`, each while it is looked at."""
    for name in os.listdir(_DESCRIPTORS):
        sock = _socket(int(name))
        if sock is None:
            continue
        with sock:
            if sock.family == socket.AF_INET and sock.type == socket.SOCK_STREAM:
                try:
                    own_port = sock.getsockname()[1]
                except OSError:
                    continue
                if own_port == port:
                    yield sock


def _socket(descriptor: int) -> socket.socket | None:
    """Another descriptor of the same socket, so that closing it changes nothing."""
    try:
        if not os.readlink(f"{_DESCRIPTORS}/{descriptor}").startswith("socket:"):
            return None
        copy = os.dup(descriptor)
    except OSError:
        return None  # closed in the meantime
    try:
        return socket.socket(fileno=copy)
    except OSError:
        os.close(copy)
        return None
