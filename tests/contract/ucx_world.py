"""Sources over ucx, and strangers who speak it: shared by the tests of `ucx`."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from protocol.handoff import FabricOffer
from tests.contract.transfer_sink import PeerProcess, until
from worker.transfer.reactor import Broken
from worker.transfer.ucx_library import Library, Stream

PeerMaker = Callable[..., PeerProcess]


def peers() -> Iterator[PeerMaker]:
    """For a fixture: makes sources that lend slot 1 under the nonce 77."""
    made: list[PeerProcess] = []

    def make(**options: Any) -> PeerProcess:
        made.append(PeerProcess("ucx", **options))
        made[-1].ask("lend", slot=1, nonce=77)
        return made[-1]

    yield make
    for peer in made:
        peer.close()


def place(offer: object) -> tuple[str, int]:
    assert isinstance(offer, FabricOffer)
    return offer.host, offer.port


class Stranger:
    """Somebody who speaks UCX, but not necessarily our protocol; driven by the test's thread."""

    def __init__(self) -> None:
        self.library = Library("lo")
        self.knocks: list[int] = []
        self.listener: Any = None

    def dial(self, peer: PeerProcess) -> Stream:
        return self.library.connect(*place(peer.offer))

    def listen(self) -> FabricOffer:
        self.listener = self.library.listen(0, self.knocks.append)
        return FabricOffer("ucx", "", b"", 0, 0, host="127.0.0.1", port=self.listener.port)

    def drive(self, condition: Callable[[], bool]) -> None:
        def turned() -> bool:
            while self.library.worker.progress_once():
                pass
            return condition()

        until(turned)

    def hear(self, stream: Stream, num_bytes: int) -> bytes:
        heard = stream.receive(bytearray(num_bytes))
        self.drive(heard.is_done)
        return bytes(heard.buffer)

    def is_closed(self, stream: Stream) -> bool:
        """The source says nothing, and then the end."""
        heard = stream.receive(bytearray(1))
        with pytest.raises(Broken):
            self.drive(heard.is_done)
        return heard.is_terminal()


def memory_kib(peer: PeerProcess, field: str = "VmHWM") -> int:
    status = Path(f"/proc/{peer.pid}/status").read_text()
    return int(status.split(f"{field}:")[1].split()[0])


def cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
