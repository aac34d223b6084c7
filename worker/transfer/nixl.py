"""The `nixl` transport: one-sided reads through NVIDIA's NIXL (UCX or libfabric underneath).

The source does nothing but keep its agent alive. The lease word is a second read, posted by the
caller after the data's end. Ties the agent's thread (`nixl_agent`) to the port; knows nothing of
the library itself (`nixl_library`).
"""

import os
import threading
from collections.abc import Iterator
from typing import Final

from protocol.errors import ConfigError, LocalError
from protocol.handoff import FabricOffer, Offer
from worker.kv.arena import Arena, LeaseTable, ScratchWords
from worker.transfer.base import OnEnd, PullSpec
from worker.transfer.nixl_agent import AgentThread, Flight
from worker.transfer.nixl_library import Backend, OpenAgent, open_agent
from worker.transfer.nixl_library import nixl_unavailable as nixl_unavailable
from worker.transfer.nixl_places import (
    Piece,
    block_pieces,
    memory_kind,
    word_piece,
    wrong_memory,
    wrong_remote,
    wrong_slot,
)
from worker.transfer.operations import LiveCount, Operation, wrong_local
from worker.transfer.shm import host_id

_STOP_S: Final = 2.0
MAX_PEERS: Final = 256


class NixlTransfer:
    """Implements `Transfer`.

    `agent_name` must be unique for each process start (worker and incarnation). `host` is the
    address of ours that others reach us by: it picks the network interface UCX uses, where the
    operator has not set `UCX_NET_DEVICES`, there is no RDMA, and it is no wildcard. `plugin_dir` is
    where the library's plug-ins lie, if not in the wheel.
    """

    def __init__(
        self,
        *,
        agent_name: str,
        backend: Backend = "UCX",
        host: str = "127.0.0.1",
        plugin_dir: str = "",
        max_peers: int = MAX_PEERS,
        throttle_bytes_per_s: float | None = None,
    ) -> None:
        self._agent_name = agent_name
        self._backend = backend
        self._host = host
        self._plugin_dir = plugin_dir
        self._max_peers = max_peers
        self._pace = throttle_bytes_per_s or 0.0
        self._live = LiveCount()
        self._submit_lock = threading.Lock()
        self._is_stopping = False
        self._thread: AgentThread | None = None
        self._memory: tuple[Arena, LeaseTable, ScratchWords] | None = None
        self._offer: FabricOffer | None = None

    @property
    def name(self) -> str:
        return "nixl"

    @property
    def num_peers(self) -> int:
        """Sources whose metadata is loaded now."""
        return self._thread.num_peers if self._thread is not None else 0

    def start(self, arena: Arena, leases: LeaseTable, scratch: ScratchWords) -> None:
        self._memory = arena, leases, scratch
        thread = AgentThread(
            self._open,
            self._agent_name,
            max_peers=self._max_peers,
            read_word=scratch.read,
        )
        thread.start()
        self._thread = thread

    def offer(self) -> Offer:
        if self._offer is None:
            raise LocalError("nixl is not started")
        return self._offer

    def refuse(self, offer: Offer) -> str:
        if not isinstance(offer, FabricOffer) or not offer.backend.startswith("nixl"):
            return "not an offer of nixl"
        if self._thread is None or self._offer is None:
            return "nixl is not started"
        if self._thread.failure:
            return self._thread.failure
        if offer.backend != self._offer.backend:
            return f"the source runs {offer.backend}, we run {self._offer.backend}"
        if not offer.agent or not offer.metadata:
            return "an offer of nobody"
        if offer.kind not in ("host", "cuda"):
            return f"memory of an unknown kind {offer.kind!r}"
        return wrong_memory(offer)

    def pull(self, spec: PullSpec, on_end: OnEnd) -> Operation:
        return self._submit(spec, on_end, None)

    def read_word(self, spec: PullSpec, scratch_slot: int, on_end: OnEnd) -> None:
        self._submit(spec, on_end, scratch_slot)

    def num_live(self) -> int:
        return self._live.value

    def stop(self) -> bool:
        """What is not posted ends with `stopped`; what is posted is waited for, two seconds. After
        False the agent still stands, for its end would kill the sources that are being read:
        leave by `os._exit`."""
        with self._submit_lock:
            self._is_stopping = True
        has_ended = self._thread is None or self._thread.stop(_STOP_S)
        return has_ended and self._live.value == 0

    def _open(self) -> OpenAgent:
        """In the agent's thread. Raises ConfigError."""
        opened = open_agent(
            self._agent_name, self._backend, host=self._host, plugin_dir=self._plugin_dir
        )
        arena, leases, scratch = self._parts
        agent = opened.agent
        table = [
            (leases.address, leases.nbytes, 0, ""),
            (scratch.address, scratch.nbytes, 0, ""),
        ]
        blocks = [(arena.address, arena.nbytes, arena.device, "")]
        try:
            agent.register_memory(blocks, memory_kind(arena.kind), [opened.backend])
            agent.register_memory(table, "DRAM", [opened.backend])
            metadata = agent.get_agent_metadata()
        except opened.errors as error:
            where = "GPU" if arena.kind == "cuda" else "host"
            raise ConfigError(
                f"transfer nixl: {opened.backend} cannot register {arena.nbytes} bytes of {where} "
                f"memory: {error}"
            ) from error
        self._offer = FabricOffer(
            backend=f"nixl/{opened.backend}",
            agent=self._agent_name,
            metadata=metadata,
            arena_address=arena.address,
            lease_address=leases.address,
            device=arena.device,
            host=self._host,
            host_id=host_id(),
            pid=os.getpid(),
            arena_bytes=arena.nbytes,
            lease_bytes=leases.nbytes,
            kind=arena.kind,
        )
        return opened

    def _submit(self, spec: PullSpec, on_end: OnEnd, scratch_slot: int | None) -> Operation:
        with self._submit_lock:
            thread = self._thread
            if thread is None or self._is_stopping or not thread.is_alive:
                raise LocalError("nixl is not running")

            def abort(_: Operation) -> None:
                thread.wake()

            operation = Operation(
                spec, on_end, self._live, scratch_slot=scratch_slot, on_abort=abort
            )
            thread.submit(self._flight(operation))
        return operation

    def _flight(self, operation: Operation) -> Flight:
        """What is wrong with the operation is said by the thread, as every end is."""
        wrong = self._wrong(operation)
        flight = Flight(operation, iter(()) if wrong else self._pieces(operation), pace=self._pace)
        if wrong:
            flight.fail(f"bad_request: {wrong.removeprefix('bad_request: ')}")
        return flight

    def _wrong(self, operation: Operation) -> str:
        """Why it would read what is not the source's, or write what is not ours."""
        spec, offer = operation.spec, operation.spec.offer
        refusal = self.refuse(offer)
        if refusal or not isinstance(offer, FabricOffer):
            return refusal
        arena, _, scratch = self._parts
        if operation.scratch_slot is None:
            local = wrong_local(spec, arena.num_blocks, arena.block_bytes)
            return local or wrong_remote(spec, offer)
        if not 0 <= operation.scratch_slot < scratch.num_slots:
            return f"no scratch slot {operation.scratch_slot}"
        return wrong_slot(spec, offer)

    def _pieces(self, operation: Operation) -> Iterator[Piece]:
        spec, offer = operation.spec, operation.spec.offer
        assert isinstance(offer, FabricOffer)
        arena, _, scratch = self._parts
        if operation.scratch_slot is None:
            return block_pieces(spec, offer, arena, pace=self._pace)
        return iter([word_piece(spec.slot, offer, scratch, operation.scratch_slot)])

    @property
    def _parts(self) -> tuple[Arena, LeaseTable, ScratchWords]:
        if self._memory is None:
            raise LocalError("nixl is not started")
        return self._memory
