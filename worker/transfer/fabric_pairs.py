"""Which sources a fabric library (NIXL) is fit for: those that it reaches by a fast way.

Where neither RDMA nor CMA works between two processes, UCX goes over TCP without a word, at a tenth
of the speed of `shm` and a third of our own `tcp`. So under `auto` an offer is taken only if its
memory is on a GPU, or both ends have RDMA, or we have just read a known word of that very process
the way CMA would. Frozen sources can be read too; a dead one is left to the pull, which says so.

Wraps the transport and adds to its offer what the other side needs for the same question. Knows no
library.
"""

import errno
import os
import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Final

import msgspec

from protocol.errors import ConfigError
from protocol.handoff import FabricOffer, Offer
from worker.kv.arena import TOKEN_BYTES, Arena, LeaseTable, ScratchWords
from worker.transfer.base import OnEnd, PassedOver, PullSpec, PullTicket, Transfer

MAX_REMEMBERED: Final = 256
"""Sources whose answer is kept; one more incarnation than that pushes the oldest out."""

ReadForeign = Callable[[int, int, int], bytes]


class FabricPairs:
    """A `Transfer` around another one. `picky` false takes whatever the inner one takes: what
    the operator asked for by name is not second-guessed."""

    def __init__(
        self,
        inner: Transfer,
        *,
        picky: bool,
        has_rdma: bool,
        lacks_cma: str,
        host_id: str,
        read: ReadForeign,
    ) -> None:
        """`lacks_cma` says why CMA does not work in this process, empty if it does."""
        self.inner = inner
        self._picky = picky
        self._has_rdma = has_rdma
        self._lacks_cma = lacks_cma
        self._host_id = host_id
        self._read = read
        self._token = ""
        self._lock = threading.Lock()
        self._answers: OrderedDict[tuple[str, str, int], str] = OrderedDict()

    @property
    def name(self) -> str:
        return self.inner.name

    def start(self, arena: Arena, leases: LeaseTable, scratch: ScratchWords) -> None:
        self._token = leases.token
        try:
            self.inner.start(arena, leases, scratch)
        except ConfigError as error:
            if not self._picky:
                raise
            raise PassedOver(str(error)) from error

    def offer(self) -> Offer:
        offer = self.inner.offer()
        if not isinstance(offer, FabricOffer):
            return offer
        return msgspec.structs.replace(
            offer,
            host_id=offer.host_id or self._host_id,
            pid=offer.pid or os.getpid(),
            token="" if self._lacks_cma else self._token,
            rdma=self._has_rdma,
        )

    def refuse(self, offer: Offer) -> str:
        reason = self.inner.refuse(offer)
        if reason or not self._picky or not isinstance(offer, FabricOffer):
            return reason
        if offer.kind != "host" or (offer.rdma and self._has_rdma):
            return ""
        return self._without_cma(offer)

    def pull(self, spec: PullSpec, on_end: OnEnd) -> PullTicket:
        return self.inner.pull(spec, on_end)

    def read_word(self, spec: PullSpec, scratch_slot: int, on_end: OnEnd) -> None:
        self.inner.read_word(spec, scratch_slot, on_end)

    def num_live(self) -> int:
        return self.inner.num_live()

    def stop(self) -> bool:
        return self.inner.stop()

    def _without_cma(self, offer: FabricOffer) -> str:
        """Why this source cannot be read by CMA; empty if it was."""
        if offer.host_id != self._host_id:
            return "no RDMA, and the source is on another host or in another pid namespace"
        if self._lacks_cma:
            return f"CMA does not work here: {self._lacks_cma}"
        if not offer.token:
            return "CMA does not work at the source"
        source = (offer.agent, offer.host_id, offer.pid)
        with self._lock:
            answer = self._answers.get(source)
            if answer is None:
                answer = self._answers[source] = self._try(offer)
            self._answers.move_to_end(source)
            while len(self._answers) > MAX_REMEMBERED:
                self._answers.popitem(last=False)
        return answer

    def _try(self, offer: FabricOffer) -> str:
        """Read the last bytes of its lease table."""
        address = offer.lease_address + offer.lease_bytes - TOKEN_BYTES
        if not 0 < address < 1 << 63 or not 0 < offer.pid < 1 << 31:
            return "an offer of nothing"
        try:
            found = self._read(offer.pid, address, TOKEN_BYTES)
        except OSError as error:
            if error.errno == errno.ESRCH:
                return ""  # the pull says so, with `peer_gone`
            return f"tried CMA: {error.strerror}"
        return "" if found == offer.token.encode() else "tried CMA: another process's memory"
