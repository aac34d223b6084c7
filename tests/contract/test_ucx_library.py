"""What UCX does with receives that are done at once, and that we are not taken in by it.

Their status is what the recycled request says: how an earlier one ended, or what lay in memory that
no request has used yet.
"""

import os
import subprocess
import sys
from array import array
from collections.abc import Iterator

import pytest

from tests.contract.transfer_peer import content
from tests.contract.transfer_sink import ROOT
from tests.contract.ucx_world import PeerMaker, Stranger, peers
from worker.transfer.tcp_wire import Request, encode_request

BLOCK = 65536
"""More than one piece of a stream."""


@pytest.fixture
def make_peer() -> Iterator[PeerMaker]:
    yield from peers()


def test_receive_that_is_done_at_once_does_not_end_as_an_earlier_one_did(
    make_peer: PeerMaker,
) -> None:
    peer, stranger = make_peer(), Stranger()
    stream = stranger.dial(peer)
    left_over = 0
    for _ in range(20):
        stream.send(encode_request(Request(1, 2, 77, BLOCK)) + array("I", [3, 4]).tobytes())
        stranger.hear(stream, 16)
        doomed = stranger.dial(peer)
        cancelled = [doomed.receive(bytearray(1)) for _ in range(32)]
        stranger.drive(lambda: peer.ask("stats")["served"] > 0)
        doomed.close()
        assert all(request.is_terminal() for request in cancelled), "when `close` returns"
        for block in (3, 4):
            heard = stream.receive(bytearray(BLOCK))
            left_over += heard.is_terminal() and heard._request.status != 0
            stranger.drive(heard.is_done)
            assert bytes(heard.buffer) == content(0, block, BLOCK)
        assert stranger.hear(stream, 8) == (77).to_bytes(8, "little")
    assert left_over > 0, "no receive was done at once with another's status: this proves nothing"
    stream.close()


def test_memory_that_no_request_has_used_makes_no_receive_endless() -> None:
    """glibc fills new memory with ones: a request's status is then "in progress"."""
    done = _run(_FRESH)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"256 well\n", b"")


def test_more_requests_than_were_used_before_are_used_before_they_are_posted() -> None:
    done = _run(
        "from worker.transfer import ucx_library; ucx_library._FIRST_REQUESTS = 300\n" + _FRESH
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, b"256 well\n", b"")


def _run(code: str) -> subprocess.CompletedProcess[bytes]:
    environ = {name: v for name, v in os.environ.items() if not name.startswith("UCX")}
    environ["MALLOC_PERTURB_"] = "254"
    command = [sys.executable, "-c", code]
    return subprocess.run(
        command, capture_output=True, cwd=ROOT, env=environ, timeout=60, check=False
    )


_FRESH = """
from array import array
from tests.contract.transfer_sink import PeerProcess
from tests.contract.ucx_world import Stranger
from worker.transfer.tcp_wire import Request, encode_request
peer, stranger = PeerProcess("ucx"), Stranger()
peer.ask("lend", slot=1, nonce=77)
idle, stream = stranger.dial(peer), stranger.dial(peer)
kept, well = [], 0
for turn in range(128):
    stream.send(encode_request(Request(1, 2, 77, 65536)) + array("I", [3, 4]).tobytes())
    stranger.hear(stream, 16)
    served = turn + 1
    stranger.drive(lambda: peer.ask("stats")["served"] >= served)
    kept += [idle.receive(bytearray(16)) for _ in range(8)]
    heard = [stream.receive(bytearray(65536)) for _ in range(2)]
    stranger.hear(stream, 8)
    well += sum(request.is_done() for request in heard)
print(well, "well")
stream.close()
idle.close()
peer.close()
"""
