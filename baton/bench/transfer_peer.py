"""One of the two processes of `baton bench transfer`: the source, or the sink that measures.

    python -m baton.bench.transfer_peer '{"role": "source", "path": "shm", ...}'

Says one line of JSON first (the source: what the sink needs), then answers one line to each line.
"""

import base64
import json
import os
import queue
import random
import sys
import time
from array import array
from collections.abc import Callable, Sequence
from typing import Any, Final, TextIO

import msgspec

from baton.bench.transfer_floors import FLOORS, BlockPath
from protocol.errors import ConfigError
from protocol.handoff import Offer
from worker.kv.arena import Arena, LeaseTable, ScratchWords
from worker.transfer.base import PullSpec, TransferEnd
from worker.transfer.select import TransferOptions, build_transfers

BLOCK_BYTES: Final = 64 << 10
NUM_BLOCKS: Final = 1024
"""64 MiB: what the contiguous pull moves."""
NUM_SCATTERED: Final = 512
_NONCE: Final = 4711
_PATIENCE_S: Final = 60.0


class Port:
    """A Baton transport, used as the hand-off does: the blocks, then the lease word."""

    def __init__(self, transport: Any, name: str) -> None:
        options = TransferOptions(requested=transport, agent_name=name)
        self._transfer = build_transfers(options, os.environ).transfers[0]
        self._leases = LeaseTable(4)
        self._scratch = ScratchWords(4)
        self._ends: queue.SimpleQueue[TransferEnd] = queue.SimpleQueue()

    def serve(self, arena: Arena) -> bytes:
        self._transfer.start(arena, self._leases, self._scratch)
        self._leases.write(1, _NONCE)
        return msgspec.msgpack.encode(self._transfer.offer())

    def connect(self, arena: Arena, said: bytes) -> None:
        self._offer: Offer = msgspec.msgpack.decode(said, type=Offer)
        self._transfer.start(arena, self._leases, self._scratch)
        refused = self._transfer.refuse(self._offer)
        if refused:
            raise ConfigError(refused)

    def copy(self, remote: Sequence[int], local: Sequence[int]) -> None:
        spec = PullSpec(self._offer, array("I", remote), array("I", local), BLOCK_BYTES, 1, _NONCE)
        self._transfer.pull(spec, self._ends.put)
        word = self._terminal().word
        if word is None:
            self._scratch.zero(0)
            self._transfer.read_word(spec, 0, self._ends.put)
            word = self._terminal().word
        if word != _NONCE:
            raise RuntimeError(f"the lease word is {word}")

    def _terminal(self) -> TransferEnd:
        end = self._ends.get(timeout=_PATIENCE_S)
        if not end.ok:
            raise RuntimeError(end.reason)
        return end


def shapes(rng: random.Random) -> dict[str, tuple[list[int], list[int]]]:
    """Remote and local blocks of each kind of pull."""
    everything = list(range(NUM_BLOCKS))
    return {
        "contiguous": (everything, everything),
        "scattered": (rng.sample(everything, NUM_SCATTERED), rng.sample(everything, NUM_SCATTERED)),
        "one": ([17], [5]),
    }


def fill(arena: Arena) -> None:
    """Every block differs from the others."""
    for number in range(arena.num_blocks):
        arena.block(number)[:] = number.to_bytes(4, "little") * (BLOCK_BYTES // 4)


def check(arena: Arena, remote: Sequence[int], local: Sequence[int]) -> None:
    for theirs, mine in zip(remote, local, strict=True):
        if bytes(arena.block(mine)[:4]) != theirs.to_bytes(4, "little"):
            raise RuntimeError(f"block {mine} does not hold what was sent")


def _measurer(path: BlockPath, arena: Arena, *, checks: bool) -> Callable[[str, int], Any]:
    wanted = shapes(random.Random(7))

    def measure(shape: str, count: int) -> dict[str, Any]:
        remote, local = wanted[shape]
        if checks:
            for mine in local:
                arena.block(mine)[:4] = b"\xff\xff\xff\xff"
        path.copy(remote, local)
        if checks:
            check(arena, remote, local)
        began_cpu, seconds = time.process_time(), []
        for _ in range(count):
            began = time.perf_counter()
            path.copy(remote, local)
            seconds.append(time.perf_counter() - began)
        return {"seconds": seconds, "cpu_s": time.process_time() - began_cpu}

    return measure


def _serve(options: dict[str, Any], path: BlockPath, out: TextIO) -> None:
    arena = Arena(NUM_BLOCKS, BLOCK_BYTES)
    answers: dict[str, Callable[..., Any]] = {"cpu": time.process_time}
    if options["role"] == "source":
        fill(arena)
        _say(out, {"said": base64.b64encode(path.serve(arena)).decode()})
    else:
        path.connect(arena, base64.b64decode(options["said"]))
        answers["measure"] = _measurer(path, arena, checks=options["path"] != "memcpy")
        _say(out, {"said": ""})
    for line in sys.stdin:
        name, arguments = json.loads(line)
        _say(out, {"answer": answers[name](*arguments)})


def _say(out: TextIO, value: dict[str, Any]) -> None:
    out.write(json.dumps(value) + "\n")
    out.flush()


def main() -> None:
    # Libraries print: what we say goes out on a descriptor of its own, theirs on standard error.
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    options = json.loads(sys.argv[1])
    name = options["path"]
    try:
        role = options["role"]
        made = FLOORS[name]() if name in FLOORS else Port(options["transport"], f"{role}.bench")
        _serve(options, made, out)
    except (ConfigError, RuntimeError, OSError, queue.Empty) as error:
        _say(out, {"error": str(error) or type(error).__name__})
    finally:
        out.flush()
        os._exit(0)  # a transfer may be live: see the hand-off's rule of exits


if __name__ == "__main__":
    main()
