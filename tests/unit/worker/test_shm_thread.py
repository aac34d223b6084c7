"""The threads of `shm` make copies whatever happens to their housekeeping."""

import threading
from array import array

import pytest

from worker.handoff.ends import TransferEnd
from worker.kv.arena import Arena, LeaseTable, ScratchWords
from worker.transfer import shm
from worker.transfer.base import PullSpec
from worker.transfer.shm import ShmTransfer
from worker.transfer.shm_map import SourceMaps

PATIENCE_S = 5.0


def test_a_sweep_that_raises_ends_no_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    swept, heard = threading.Semaphore(0), threading.Event()
    ends: list[TransferEnd] = []

    def fail(_maps: SourceMaps, now: float) -> None:
        swept.release()
        raise MemoryError

    def on_end(end: TransferEnd) -> None:
        ends.append(end)
        heard.set()

    monkeypatch.setattr(shm, "_SWEEP_S", 0.01)
    monkeypatch.setattr(SourceMaps, "sweep", fail)
    arena, leases, scratch = Arena(8, 64), LeaseTable(4), ScratchWords(4)
    transfer = ShmTransfer(num_threads=1)
    transfer.start(arena, leases, scratch)
    assert swept.acquire(timeout=PATIENCE_S)
    assert swept.acquire(timeout=PATIENCE_S), "it sweeps again"
    spec = PullSpec(transfer.offer(), array("I", [0]), array("I", [4]), 64, 0, 77)
    transfer.pull(spec, on_end)
    assert heard.wait(PATIENCE_S)
    assert ends[0].ok
    assert transfer.stop()
    arena.close()
    leases.close()
