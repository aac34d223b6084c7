"""The source of the transfer contract suite, run as a process of its own.

    python tests/contract/transfer_peer.py '{"transport": "shm", ...}'

Says its offer first, then answers one line of JSON to each line of JSON on stdin. What the blocks
hold is a function of version and number (`content`), so that the sink knows what must arrive.
"""

import base64
import ctypes
import json
import os
import struct
import sys
import threading
from typing import Any

import msgspec

from protocol.handoff import Offer
from worker.kv.arena import Arena, LeaseTable, ScratchWords
from worker.transfer.base import Transfer
from worker.transfer.nixl import NixlTransfer
from worker.transfer.shm import ShmTransfer
from worker.transfer.tcp import TcpTransfer
from worker.transfer.ucx import UcxTransfer


def content(version: int, block: int, block_bytes: int) -> bytes:
    return struct.pack("<QQ", version, block) * (block_bytes // 16)


def build(options: dict[str, Any]) -> Transfer:
    if options["transport"] == "shm":
        return ShmTransfer(num_threads=1)
    if options["transport"].startswith("nixl"):
        name = options.get("agent_name", f"peer.{os.getpid()}")
        return NixlTransfer(agent_name=name, host=options.get("host", "127.0.0.1"))
    if options["transport"] == "ucx":
        return UcxTransfer(
            port=options.get("port", 0),
            max_connections=options.get("max_connections", 64),
            idle_timeout_s=options.get("idle_timeout_s", 60.0),
            throttle_bytes_per_s=options.get("throttle_bytes_per_s"),
        )
    return TcpTransfer(
        port=options.get("port", 0),
        num_threads=1,
        max_connections=options.get("max_connections", 64),
        idle_timeout_s=options.get("idle_timeout_s", 60.0),
        throttle_bytes_per_s=options.get("throttle_bytes_per_s"),
    )


class Peer:
    def __init__(self, options: dict[str, Any]) -> None:
        self.arena = Arena(options["num_blocks"], options["block_bytes"])
        self.leases = LeaseTable(options["num_slots"])
        self.transfer = build(options)
        self.transfer.start(self.arena, self.leases, ScratchWords(1))
        self.fill(version=0)

    def offer(self) -> str:
        packed = msgspec.msgpack.encode(self.transfer.offer())
        return base64.b64encode(packed).decode()

    def fill(self, *, version: int) -> None:
        size = self.arena.block_bytes
        for block in range(self.arena.num_blocks):
            self.arena.block(block)[:] = content(version, block, size)

    def lend(self, *, slot: int, nonce: int) -> None:
        self.leases.write(slot, nonce)

    def revoke(self, *, slot: int) -> None:
        self.leases.zero(slot)

    def stats(self) -> dict[str, int]:
        assert isinstance(self.transfer, (TcpTransfer, UcxTransfer))
        stats = self.transfer.stats
        return {name: getattr(stats, name) for name in asdict_names(stats)}

    def round(self, *, slot: int, nonce: int, byte: int, num_bytes: int, hold_s: float) -> None:
        """One lease of the stress test: write, lend, hold, revoke, overwrite at once."""
        ctypes.memset(self.arena.address, byte, num_bytes)
        self.leases.write(slot, nonce)
        say("lent")
        threading.Event().wait(hold_s)
        self.leases.zero(slot)
        ctypes.memset(self.arena.address, 0, num_bytes)

    def stop(self) -> bool:
        stopped = self.transfer.stop()
        self.arena.close()
        self.leases.close()
        return stopped


def asdict_names(stats: Any) -> list[str]:
    return [name for name in stats.__slots__ if name != "lock"]


def say(value: object) -> None:
    sys.stdout.write(json.dumps(value) + "\n")
    sys.stdout.flush()


def main() -> None:
    peer = Peer(json.loads(sys.argv[1]))
    say(peer.offer())
    for line in sys.stdin:
        name, arguments = json.loads(line)
        say(getattr(peer, name)(**arguments))


def decode_offer(text: str) -> Offer:
    offer: Offer = msgspec.msgpack.decode(base64.b64decode(text), type=Offer)
    return offer


if __name__ == "__main__":
    main()
