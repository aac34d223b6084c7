"""A sink that leaves with a read in flight, run as a process of its own.

    python tests/contract/nixl_leaver.py OFFER [frozen | running]

Reads one block (so that the two are connected) and says so. Then it waits for a line of stdin.

`frozen`: the source is frozen by now; it begins a pull that cannot end, stops, and says what `stop`
and `num_live` gave; on another line it leaves as a worker does. `running`: it begins a pull and
leaves in the middle of it, without a stop.
"""

import os
import sys

from tests.contract.transfer_peer import decode_offer, say
from tests.contract.transfer_sink import Sink, until
from worker.transfer.nixl import NixlTransfer


def main() -> None:
    offer = decode_offer(sys.argv[1])
    transfer = NixlTransfer(agent_name=f"leaver.{os.getpid()}")
    sink = Sink(transfer, 1024)
    say(sink.pull(sink.spec(offer, [0])).ok)
    sys.stdin.readline()
    ticket, _ = sink.begin(sink.spec(offer, range(1024)))
    if sys.argv[2] == "running":
        until(lambda: ticket.num_bytes_done > 0)
        os._exit(0 if transfer.num_live() else 3)
    thread = transfer._thread
    assert thread is not None
    until(lambda: bool(thread._flights and thread._flights[0].posted))
    say([sink.transfer.stop(), sink.transfer.num_live()])
    sys.stdin.readline()
    os._exit(0)


if __name__ == "__main__":
    main()
