"""What `baton bench transfer` compares the transports with: the same copies without Baton's port.

`memcpy` inside one process, a `socket` between two, and the bare NIXL library. Each is a path: it
serves an arena, or copies blocks of one into ours, and blocks until they are there.
"""

import ctypes
import importlib
import socket
import struct
import threading
import time
from collections.abc import Sequence
from typing import Any, Protocol

import msgspec

from protocol.errors import ConfigError
from worker.kv.arena import Arena
from worker.transfer.operations import runs

_MAX_RUN = 1 << 16
_PARTS = 512
"""Pieces handed to the kernel at once: below IOV_MAX."""


class BlockPath(Protocol):
    """One way for blocks to come here."""

    def serve(self, arena: Arena) -> bytes:
        """Be the source: what the other side needs to know."""

    def connect(self, arena: Arena, said: bytes) -> None:
        """Be the sink."""

    def copy(self, remote: Sequence[int], local: Sequence[int]) -> None:
        """Returns when every byte is here. Raises RuntimeError."""


class Memcpy:
    """Within one process: what the memory can do."""

    def serve(self, arena: Arena) -> bytes:
        return b""

    def connect(self, arena: Arena, said: bytes) -> None:
        self._arena = arena
        self._other = Arena(arena.num_blocks, arena.block_bytes)
        ctypes.memset(self._other.address, 1, self._other.nbytes)

    def copy(self, remote: Sequence[int], local: Sequence[int]) -> None:
        size = self._arena.block_bytes
        for first, mine, count in runs(remote, local, _MAX_RUN):
            ctypes.memmove(
                self._arena.address + mine * size, self._other.address + first * size, count * size
            )


class Socket:
    """Blocking sockets on the loopback, scattered and gathered by the kernel."""

    def serve(self, arena: Arena) -> bytes:
        listener = socket.create_server(("127.0.0.1", 0))
        threading.Thread(target=self._serve, args=(arena, listener), daemon=True).start()
        return struct.pack("<H", listener.getsockname()[1])

    def _serve(self, arena: Arena, listener: socket.socket) -> None:
        connection, _ = listener.accept()
        with connection, connection.makefile("rb") as asked:
            while head := asked.read(4):
                blocks = struct.unpack(f"<{int.from_bytes(head, 'little')}I", asked.read(
                    4 * int.from_bytes(head, "little")
                ))  # fmt: skip
                parts = _parts(arena, [(first, count) for first, _, count in _own_runs(blocks)])
                while parts:
                    _drop(parts, connection.sendmsg(parts[:_PARTS]))

    def connect(self, arena: Arena, said: bytes) -> None:
        self._arena = arena
        self._socket = socket.create_connection(("127.0.0.1", struct.unpack("<H", said)[0]))
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def copy(self, remote: Sequence[int], local: Sequence[int]) -> None:
        self._socket.sendall(struct.pack(f"<I{len(remote)}I", len(remote), *remote))
        parts = _parts(self._arena, [(first, count) for first, _, count in _own_runs(local)])
        while parts:
            count, *_ = self._socket.recvmsg_into(parts[:_PARTS])
            if not count:
                raise RuntimeError("the source closed the connection")
            _drop(parts, count)


def _own_runs(blocks: Sequence[int]) -> Sequence[tuple[int, int, int]]:
    return list(runs(blocks, blocks, _MAX_RUN))


def _parts(arena: Arena, pieces: Sequence[tuple[int, int]]) -> list[memoryview]:
    size = arena.block_bytes
    return [arena.memory[first * size : (first + count) * size] for first, count in pieces]


def _drop(parts: list[memoryview], count: int) -> None:
    """The first `count` bytes are done."""
    done = 0
    while done < len(parts) and count >= len(parts[done]):
        count -= len(parts[done])
        done += 1
    del parts[:done]
    if count:
        parts[0] = parts[0][count:]


class BareNixl:
    """The library as its examples use it; only its progress thread is kept from spinning."""

    def serve(self, arena: Arena) -> bytes:
        self._agent = _agent("bench-source", arena)
        metadata = self._agent.get_agent_metadata()
        return msgspec.msgpack.encode((metadata, arena.address, arena.num_blocks))

    def connect(self, arena: Arena, said: bytes) -> None:
        metadata, address, num_blocks = msgspec.msgpack.decode(said)
        self._agent = _agent("bench-sink", arena)
        name = self._agent.add_remote_agent(metadata)
        size = arena.block_bytes
        self._local = self._agent.prep_xfer_dlist(
            "NIXL_INIT_AGENT", _blocks(arena.address, arena.num_blocks, size), "DRAM"
        )
        self._remote = self._agent.prep_xfer_dlist(name, _blocks(address, num_blocks, size), "DRAM")

    def copy(self, remote: Sequence[int], local: Sequence[int]) -> None:
        agent = self._agent
        handle = agent.make_prepped_xfer("READ", self._local, local, self._remote, remote)
        state, pause = agent.transfer(handle), 50e-6
        while state == "PROC":
            time.sleep(pause)
            pause = min(pause * 1.5, 2e-3)
            state = agent.check_xfer_state(handle)
        agent.release_xfer_handle(handle)
        if state != "DONE":
            raise RuntimeError(f"nixl says {state}")


def _blocks(address: int, count: int, size: int) -> list[tuple[int, int, int]]:
    return [(address + number * size, size, 0) for number in range(count)]


def _agent(name: str, arena: Arena) -> Any:
    """Raises ConfigError where no NIXL is installed."""
    for package in ("nixl_cu13", "nixl_cu12"):
        try:
            api = importlib.import_module(f"{package}._api")
            bindings = importlib.import_module(f"{package}._bindings")
        except ModuleNotFoundError:
            continue
        agent = _calm(api, bindings, name)
        agent.register_memory([(arena.address, arena.nbytes, 0, "")], "DRAM")
        return agent
    raise ConfigError("nixl is not installed")


def _calm(api: Any, bindings: Any, name: str) -> Any:
    """An agent whose progress thread sleeps a millisecond: the default burns a core."""
    plain = bindings.nixlAgentConfig

    class Calm(plain):  # type: ignore[misc, valid-type]
        def __setattr__(self, key: str, value: Any) -> None:
            super().__setattr__(key, 1000 if key == "pthrDelay" else value)

    bindings.nixlAgentConfig = Calm
    try:
        return api.nixl_agent(name, api.nixl_agent_config(backends=["UCX"]))
    finally:
        bindings.nixlAgentConfig = plain


FLOORS: dict[str, type[BlockPath]] = {"memcpy": Memcpy, "socket": Socket, "nixl-bare": BareNixl}
