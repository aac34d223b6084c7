"""The sink of the transfer contract suite: drives one peer process and one transfer of our own."""

import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from array import array
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from protocol.handoff import Offer, ShmOffer
from tests.contract.transfer_peer import content, decode_offer
from worker.handoff.ends import TransferEnd
from worker.kv.arena import Arena, LeaseTable, ScratchWords
from worker.transfer.base import PullSpec, PullTicket, Transfer

ROOT = Path(__file__).parents[2]
BLOCK_BYTES = 64 * 1024
PATIENCE_S = 20.0
FOREIGN = 0xEE
"""What a local block holds before anything is pulled into it."""


class PeerProcess:
    """A source in another process, which runs `script`."""

    script = ROOT / "tests/contract/transfer_peer.py"

    def __init__(self, transport: str, **options: Any) -> None:
        settings = {
            "transport": transport,
            "num_blocks": 64,
            "block_bytes": BLOCK_BYTES,
            "num_slots": 8,
            **options,
        }
        self.process = subprocess.Popen(
            [sys.executable, str(self.script), json.dumps(settings)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
        self.offer: Offer = decode_offer(self.hear())

    @property
    def pid(self) -> int:
        return self.process.pid

    def hear(self) -> Any:
        assert self.process.stdout is not None
        return json.loads(self.process.stdout.readline())

    def say(self, command: str, **arguments: Any) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps([command, arguments]) + "\n")
        self.process.stdin.flush()

    def ask(self, command: str, **arguments: Any) -> Any:
        self.say(command, **arguments)
        return self.hear()

    def freeze(self) -> None:
        os.kill(self.pid, signal.SIGSTOP)
        os.waitid(os.P_PID, self.pid, os.WSTOPPED | os.WNOWAIT)

    def thaw(self) -> None:
        os.kill(self.pid, signal.SIGCONT)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def close(self) -> None:
        self.kill()
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            try:
                pipe.close()
            except BrokenPipeError:
                pass


class Ends:
    """Collects what `on_end` is called with, from whatever thread."""

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[TransferEnd] = queue.SimpleQueue()
        self.threads: list[str] = []

    def __call__(self, end: TransferEnd) -> None:
        self.threads.append(threading.current_thread().name)
        self._queue.put(end)

    def wait(self, timeout_s: float = PATIENCE_S) -> TransferEnd:
        return self._queue.get(timeout=timeout_s)

    def is_empty(self) -> bool:
        return self._queue.empty()


class Sink:
    """Our arena and our transfer."""

    def __init__(self, transfer: Transfer, num_blocks: int = 64) -> None:
        self.transfer = transfer
        self.arena = Arena(num_blocks, BLOCK_BYTES)
        self.leases = LeaseTable(1)
        self.scratch = ScratchWords(4)
        self.arena.memory[:] = bytes([FOREIGN]) * self.arena.nbytes
        transfer.start(self.arena, self.leases, self.scratch)

    def spec(
        self,
        offer: Offer,
        remote: Sequence[int],
        local: Sequence[int] | None = None,
        *,
        slot: int = 1,
        nonce: int = 77,
    ) -> PullSpec:
        mine = remote if local is None else local
        return PullSpec(offer, array("I", remote), array("I", mine), BLOCK_BYTES, slot, nonce)

    def begin(self, spec: PullSpec) -> tuple[PullTicket, Ends]:
        ends = Ends()
        return self.transfer.pull(spec, ends), ends

    def pull(self, spec: PullSpec) -> TransferEnd:
        return self.begin(spec)[1].wait()

    def word(self, spec: PullSpec, end: TransferEnd | None = None) -> int | None:
        """As the hand-off does: the end's own word, or a read of its own into a zeroed slot."""
        if end is not None and end.word is not None:
            return end.word
        self.scratch.zero(2)
        ends = Ends()
        self.transfer.read_word(spec, 2, ends)
        read = ends.wait()
        if not read.ok:
            return None
        assert read.word == self.scratch.read(2)
        return read.word

    def holds(self, local: Sequence[int], remote: Sequence[int], version: int = 0) -> bool:
        return all(
            bytes(self.arena.block(mine)) == content(version, theirs, BLOCK_BYTES)
            for mine, theirs in zip(local, remote, strict=True)
        )

    def is_untouched(self, local: Sequence[int]) -> bool:
        foreign = bytes([FOREIGN]) * BLOCK_BYTES
        return all(bytes(self.arena.block(mine)) == foreign for mine in local)

    def close(self) -> bool:
        stopped = self.transfer.stop()
        self.arena.close()
        self.leases.close()
        return stopped


def until(condition: Callable[[], bool], timeout_s: float = PATIENCE_S) -> None:
    """For what has no event: progress that a ticket shows, a mapping that goes away."""
    limit = time.monotonic() + timeout_s
    pause = threading.Event()
    while not condition():
        assert time.monotonic() < limit, "did not happen in time"
        pause.wait(0.002)


def altered(offer: ShmOffer, **changes: Any) -> ShmOffer:
    fields = {name: getattr(offer, name) for name in offer.__struct_fields__}
    return ShmOffer(**{**fields, **changes})
