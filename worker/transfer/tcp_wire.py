"""What is said on a tcp transfer connection, and the two loops that move bytes without copying.

The sink sends a request: header, then block numbers as packed 32-bit integers. The source answers
with a reply header, and if that says OK, with the blocks' bytes in the request's order and then the
lease word (zero if it is not the request's nonce any more: a reader learns no other's nonce). An
empty pull is how a word alone is read. One request at a time; all integers are little-endian.
"""

import itertools
import socket
import struct
from collections import deque
from enum import IntEnum
from typing import Final, NamedTuple

from worker.transfer.reactor import Broken

MAGIC: Final = b"BTKV"
VERSION: Final = 1
_REQUEST: Final = struct.Struct("<4sBxxxIIQQ")
_REPLY: Final = struct.Struct("<4sBBxxQ")
WORD: Final = struct.Struct("<Q")
REQUEST_BYTES: Final = _REQUEST.size
REPLY_BYTES: Final = _REPLY.size
ID_BYTES: Final = 4
MAX_PARTS: Final = 64
"""Buffers in one system call; 1024 is what the kernel takes."""


class Status(IntEnum):
    OK = 0
    LEASE_LOST = 1
    """The slot does not hold the nonce (any more)."""
    WRONG_BLOCKS = 2
    """Other block size, or block numbers outside of the arena."""


class Request(NamedTuple):
    slot: int
    num_blocks: int
    nonce: int
    block_bytes: int


def encode_request(request: Request) -> bytes:
    return _REQUEST.pack(MAGIC, VERSION, *request)


def decode_request(header: bytes | bytearray) -> Request:
    """Raises Broken if it is not of this protocol and version."""
    magic, version, *fields = _REQUEST.unpack(header)
    if magic != MAGIC or version != VERSION:
        raise Broken("protocol: not a request of this version")
    return Request(*fields)


def encode_reply(status: Status, num_bytes: int) -> bytes:
    return _REPLY.pack(MAGIC, VERSION, status, num_bytes)


def decode_reply(header: bytes | bytearray) -> tuple[Status, int]:
    """Raises Broken if it is not of this protocol and version."""
    magic, version, status, num_bytes = _REPLY.unpack(header)
    if magic != MAGIC or version != VERSION or status not in tuple(Status):
        raise Broken("protocol: not a reply of this version")
    return Status(status), num_bytes


def send_some(sock: socket.socket, parts: deque[memoryview]) -> int:
    """Hand the first parts to the kernel, which copies them before this returns; drop what was
    taken from `parts`. The number of bytes; 0 if the socket takes none now."""
    try:
        sent = sock.sendmsg(list(itertools.islice(parts, MAX_PARTS)))
    except (BlockingIOError, InterruptedError):
        return 0
    _advance(parts, sent)
    return sent


def receive_some(sock: socket.socket, parts: deque[memoryview]) -> int:
    """Fill the first parts, drop what is full. The number of bytes; 0 if none is there now.

    Raises Broken at the end of the stream.
    """
    try:
        received = sock.recvmsg_into(list(itertools.islice(parts, MAX_PARTS)))[0]
    except (BlockingIOError, InterruptedError):
        return 0
    if received == 0:
        raise Broken("closed: the peer closed the connection", peer_gone=True)
    _advance(parts, received)
    return received


def _advance(parts: deque[memoryview], num_bytes: int) -> None:
    while num_bytes:
        first = parts.popleft()
        if len(first) > num_bytes:
            parts.appendleft(first[num_bytes:])
            return
        num_bytes -= len(first)


def prepare(sock: socket.socket) -> None:
    """Options both ends set: no delay, and a dead host is noticed within about a minute."""
    sock.setblocking(False)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", 20), ("TCP_KEEPINTVL", 10), ("TCP_KEEPCNT", 4)):
        option = getattr(socket, name, None)
        if option is not None:
            sock.setsockopt(socket.IPPROTO_TCP, option, value)
