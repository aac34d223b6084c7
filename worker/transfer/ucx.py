"""The `ucx` transport: UCXX endpoints, two-sided, authenticated with the lease's nonce.

Says over an endpoint's stream what `tcp` says over a socket (`tcp_wire`), in one thread that owns a
UCX worker (`ucx_loop`) and serves both the listening side (`ucx_server`) and the pulling side
(`ucx_sink`). For networks that UCX knows better than the kernel; never chosen by itself.

On a loopback host only the device `lo` is used, for listening too. Elsewhere UCX uses what
`UCX_NET_DEVICES` says, or every network it finds.
"""

import ipaddress
import logging
from typing import Final

from protocol.errors import ConfigError, LocalError
from protocol.handoff import FabricOffer, Offer
from worker.kv.arena import Arena, LeaseTable, ScratchWords
from worker.transfer.addresses import reachable, wrong_place
from worker.transfer.base import OnEnd, PullSpec
from worker.transfer.operations import LiveCount, Operation
from worker.transfer.sink_pool import SinkPool
from worker.transfer.tcp_server import ServerLimits, ServerStats
from worker.transfer.ucx_library import ucx_unavailable as ucx_unavailable
from worker.transfer.ucx_loop import UcxLoop
from worker.transfer.ucx_server import UcxListener
from worker.transfer.ucx_sink import UcxSinkConnection

_logger = logging.getLogger(__name__)

_BACKEND: Final = "ucx"
_STOP_S: Final = 2.0


class UcxTransfer:
    """Implements `Transfer`.

    `host` says which network we listen on and, unless `advertise_host` does, how others reach us;
    `port` 0 is any free one. `throttle_bytes_per_s` bounds each reader's pace.
    """

    def __init__(
        self,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        advertise_host: str = "",
        max_connections: int = 256,
        idle_timeout_s: float = 300.0,
        connect_timeout_s: float = 10.0,
        max_per_peer: int = 4,
        throttle_bytes_per_s: float | None = None,
    ) -> None:
        self._host = host
        self._port = port
        self._advertise_host = advertise_host
        self._limits = ServerLimits(max(1, max_connections), idle_timeout_s, throttle_bytes_per_s)
        self._connect_timeout_s = connect_timeout_s
        self._max_per_peer = max(1, max_per_peer)
        self._live = LiveCount()
        self._loop: UcxLoop | None = None
        self._pool: SinkPool[UcxSinkConnection] | None = None
        self._listener: UcxListener | None = None
        self._offer: FabricOffer | None = None

    @property
    def name(self) -> str:
        return "ucx"

    @property
    def stats(self) -> ServerStats:
        """Of the listening side."""
        return self._listener.stats if self._listener is not None else ServerStats()

    def start(self, arena: Arena, leases: LeaseTable, scratch: ScratchWords) -> None:
        missing = ucx_unavailable()
        if missing:
            raise ConfigError(f"ucx cannot be used: {missing}")
        host = reachable(self._advertise_host or self._host)
        if ipaddress.ip_address(host).version != 4:
            raise ConfigError(f"ucx listens on IPv4 only, not on {host}")
        only_local = ipaddress.ip_address(reachable(self._host)).is_loopback
        loop = UcxLoop("ucx-transfer", "lo" if only_local else "")
        listener = UcxListener(loop, arena, leases, self._limits)
        warnings: list[str] = []
        loop.start(lambda: warnings.append(listener.begin(self._port, only_local=only_local)))
        for warning in filter(None, warnings):
            _logger.warning(warning)
        self._pool = SinkPool[UcxSinkConnection](
            loop,
            arena,
            scratch,
            connect=lambda offer, pool: UcxSinkConnection(
                offer, pool, loop, self._connect_timeout_s
            ),
            wrong_offer=_wrong_offer,
            max_per_peer=self._max_per_peer,
            max_active=256,
        )
        loop.at_end(self._pool.stop)
        self._loop, self._listener = loop, listener
        self._offer = FabricOffer(_BACKEND, "", b"", 0, 0, host=host, port=listener.port)

    def offer(self) -> Offer:
        if self._offer is None:
            raise LocalError("ucx is not started")
        return self._offer

    def refuse(self, offer: Offer) -> str:
        has_ended = self._loop is not None and self._loop.is_stopping
        return _wrong_offer(offer) or ("ucx does not run any more" if has_ended else "")

    def pull(self, spec: PullSpec, on_end: OnEnd) -> Operation:
        return self._submit(spec, on_end, None)

    def read_word(self, spec: PullSpec, scratch_slot: int, on_end: OnEnd) -> None:
        self._submit(spec, on_end, scratch_slot)

    def num_live(self) -> int:
        return self._live.value

    def stop(self) -> bool:
        """Closes every endpoint; what ran ends with `stopped`."""
        ended = self._loop is None or self._loop.stop(_STOP_S)
        return ended and self._live.value == 0

    def _submit(self, spec: PullSpec, on_end: OnEnd, scratch_slot: int | None) -> Operation:
        loop, pool = self._loop, self._pool
        if loop is None or pool is None or loop.is_stopping:
            raise LocalError("ucx is not running")
        return pool.begin(spec, on_end, self._live, scratch_slot)


def _wrong_offer(offer: Offer) -> str:
    if not isinstance(offer, FabricOffer) or offer.backend != _BACKEND:
        return "not an offer of ucx"
    return wrong_place(offer.host, offer.port)
