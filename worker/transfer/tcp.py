"""The `tcp` transport: plain sockets, two-sided, authenticated with the lease's nonce.

Ties the listening side (`tcp_server`) and the pulling side (`tcp_sink`) to a few reactor threads
that serve both. An offer always carries an IP address and the port that was really bound. What a
thread did that has died, the others do from then on; without any, `tcp` refuses what it is offered.
"""

import errno
import itertools
import logging
import socket
from typing import Final

from protocol.errors import ConfigError, LocalError
from protocol.handoff import Offer, TcpOffer
from worker.kv.arena import Arena, LeaseTable, ScratchWords
from worker.transfer.addresses import reachable, wrong_place
from worker.transfer.base import OnEnd, PullSpec
from worker.transfer.operations import LiveCount, Operation
from worker.transfer.reactor import Reactor
from worker.transfer.sink_pool import SinkPool
from worker.transfer.tcp_server import ServerLimits, ServerStats, TcpListener
from worker.transfer.tcp_sink import SinkConnection, connect

_logger = logging.getLogger(__name__)

_BACKLOG: Final = 256
_STOP_S: Final = 2.0


class TcpTransfer:
    """Implements `Transfer`.

    `host` and `port` are what we listen on (port 0: any free one); `advertise_host` is how other
    hosts reach us, when that is not `host`. `throttle_bytes_per_s` bounds each reader's pace.
    """

    def __init__(
        self,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        advertise_host: str = "",
        num_threads: int = 2,
        max_connections: int = 256,
        idle_timeout_s: float = 60.0,
        connect_timeout_s: float = 2.0,
        max_per_peer: int = 4,
        throttle_bytes_per_s: float | None = None,
    ) -> None:
        self._host = host
        self._port = port
        self._advertise_host = advertise_host
        self._num_threads = max(1, num_threads)
        self._limits = ServerLimits(max(1, max_connections), idle_timeout_s, throttle_bytes_per_s)
        self._connect_timeout_s = connect_timeout_s
        self._max_per_peer = max_per_peer
        self._live = LiveCount()
        self._reactors: list[Reactor] = []
        self._turns: itertools.cycle[SinkPool[SinkConnection]] = itertools.cycle(())
        self._listener: TcpListener | None = None
        self._offer: TcpOffer | None = None
        self._stopped = False

    @property
    def name(self) -> str:
        return "tcp"

    @property
    def stats(self) -> ServerStats:
        """Of the listening side."""
        return self._listener.stats if self._listener is not None else ServerStats()

    def start(self, arena: Arena, leases: LeaseTable, scratch: ScratchWords) -> None:
        sock = _listen(self._host, self._port)
        try:
            host = reachable(self._advertise_host or self._host)
        except ConfigError:
            sock.close()
            raise
        self._offer = TcpOffer(host=host, port=sock.getsockname()[1])
        self._reactors = [Reactor(f"tcp-transfer-{n}") for n in range(self._num_threads)]
        pools = [self._pool(reactor, arena, scratch) for reactor in self._reactors]
        self._turns = itertools.cycle(pools)
        self._listener = TcpListener(sock, self._reactors, arena, leases, self._limits)
        for reactor in self._reactors:
            reactor.at_end(self._on_thread_end)
            reactor.start()
        self._reactors[0].call(self._listener.begin)

    def offer(self) -> Offer:
        if self._offer is None:
            raise LocalError("tcp is not started")
        return self._offer

    def refuse(self, offer: Offer) -> str:
        has_ended = bool(self._reactors) and not self._living()
        return _wrong_offer(offer) or ("tcp does not run any more" if has_ended else "")

    def pull(self, spec: PullSpec, on_end: OnEnd) -> Operation:
        return self._submit(spec, on_end, None)

    def read_word(self, spec: PullSpec, scratch_slot: int, on_end: OnEnd) -> None:
        self._submit(spec, on_end, scratch_slot)

    def num_live(self) -> int:
        return self._live.value

    def stop(self) -> bool:
        """Closes every socket; what ran ends with `stopped`."""
        self._stopped = True
        ended = [reactor.stop(_STOP_S) for reactor in self._reactors]
        return all(ended) and self._live.value == 0

    def _submit(self, spec: PullSpec, on_end: OnEnd, scratch_slot: int | None) -> Operation:
        if self._stopped or not self._reactors:
            raise LocalError("tcp is not running")
        pool = next(self._turns)
        for _ in self._reactors[1:]:
            if pool.loop.is_stopping:
                pool = next(self._turns)
        return pool.begin(spec, on_end, self._live, scratch_slot)

    def _living(self) -> list[Reactor]:
        return [reactor for reactor in self._reactors if not reactor.is_stopping]

    def _on_thread_end(self) -> None:
        """In the thread that ends: unless we stop, it has died."""
        listener, offer, living = self._listener, self._offer, self._living()
        if self._stopped or listener is None or offer is None:
            return
        _logger.error("tcp goes on with %d of %d threads", len(living), len(self._reactors))
        if living and listener.home.is_stopping:
            listener.move(_listen(self._host, offer.port), living[0])

    def _pool(
        self, reactor: Reactor, arena: Arena, scratch: ScratchWords
    ) -> SinkPool[SinkConnection]:
        timeout_s = self._connect_timeout_s
        pool = SinkPool[SinkConnection](
            reactor,
            arena,
            scratch,
            connect=lambda offer, pool: connect(offer, pool, reactor, timeout_s),
            wrong_offer=_wrong_offer,
            max_per_peer=max(1, self._max_per_peer // self._num_threads),
            max_active=256,
        )
        reactor.at_end(pool.stop)
        return pool


def _wrong_offer(offer: Offer) -> str:
    if not isinstance(offer, TcpOffer):
        return "not an offer of tcp"
    return wrong_place(offer.host, offer.port)


def _listen(host: str, port: int) -> socket.socket:
    """Raises ConfigError."""
    sock = None
    try:
        family, kind, proto, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        sock = socket.socket(family, kind, proto)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
        sock.listen(_BACKLOG)
    except OSError as error:
        if sock is not None:
            sock.close()
        hint = "; is another worker running?" if error.errno == errno.EADDRINUSE else ""
        reason = error.strerror or error
        raise ConfigError(f"cannot serve KV on {host}:{port}: {reason}{hint}") from error
    sock.setblocking(False)
    return sock
