"""The thread that owns a NIXL agent: operations come in through a queue, ends go out by `on_end`.

NIXL has no descriptor to wait on, so what is live is polled, from 50 us up to 2 ms apart (20 ms
where nothing has moved for a second); without live operations the thread sleeps on its queue. Under
CMA the library copies inside the call that posts, so a pull goes in pieces: between two of them
other operations have their turn, progress is seen, and an abort is heard.

The library cannot cancel. A posted piece is done with only when NIXL says DONE or raises; its
handle is not released before, and the agent is not destroyed before: destroying it with a read in
flight kills the *source* process. A frozen source is never reported: its pieces stay live until it
goes on or dies.
"""

import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator
from typing import Final

from protocol.errors import ConfigError, LocalError
from protocol.handoff import FabricOffer
from worker.transfer.nixl_library import Agent, Handle, OpenAgent
from worker.transfer.nixl_peers import BadOffer, Peer, Peers, Unreachable
from worker.transfer.nixl_places import Piece
from worker.transfer.operations import Operation

_logger = logging.getLogger(__name__)

_FIRST_PAUSE_S: Final = 50e-6
_LONGEST_PAUSE_S: Final = 2e-3
_STUCK_PAUSE_S: Final = 20e-3
_STUCK_AFTER_S: Final = 1.0
"""Where nothing has moved for so long (a frozen source), nobody is in a hurry any more."""
_OPEN_S: Final = 60.0
_NUM_POSTED: Final = 2
"""Pieces of one pull in flight: the next one is there when the first ends."""


class Flight:
    """An operation and what of it NIXL has in its hands."""

    def __init__(self, operation: Operation, pieces: Iterator[Piece], *, pace: float) -> None:
        """`pace`: bytes per second at most; 0: no bound."""
        self.operation = operation
        self.pace = pace
        self.peer: Peer | None = None
        self.posted: list[tuple[Handle, int]] = []
        self.next_piece = next(pieces, None)
        self._pieces = pieces
        self.post_at = 0.0
        self.failure = ""
        self.peer_gone = False

    def fail(self, reason: str, *, peer_gone: bool = False) -> None:
        """Nothing more is posted; the first reason stays."""
        self.failure = self.failure or reason
        self.peer_gone = self.peer_gone or peer_gone
        self.next_piece = None

    def step(self) -> Piece:
        """The piece to post now."""
        assert self.next_piece is not None
        piece, self.next_piece = self.next_piece, next(self._pieces, None)
        return piece

    @property
    def may_post(self) -> bool:
        depth = 1 if self.pace else _NUM_POSTED
        return self.next_piece is not None and len(self.posted) < depth


class AgentThread:
    """`open_agent` runs in the thread, as everything does that touches the agent."""

    def __init__(
        self,
        open_agent: Callable[[], OpenAgent],
        own_name: str,
        *,
        max_peers: int,
        read_word: Callable[[int], int],
    ) -> None:
        """`read_word` gives what a scratch slot holds."""
        self._open_agent = open_agent
        self._own_name = own_name
        self._max_peers = max_peers
        self._read_word = read_word
        # Bounded by its callers: an operation has blocks of the arena or a scratch word.
        self._commands: queue.SimpleQueue[Flight | None] = queue.SimpleQueue()
        self._flights: list[Flight] = []
        self._lost: list[Flight] = []
        """Posted, and NIXL cannot be asked about them: live until the process ends."""
        self._opened: OpenAgent | None = None
        self._peers: Peers | None = None
        self._ready = threading.Event()
        self._open_error: Exception | None = None
        self._stopping = False
        self.failure = ""
        """Why this thread takes no more work; empty while it does."""
        self._thread = threading.Thread(target=self._run, name="nixl-agent", daemon=True)

    @property
    def num_peers(self) -> int:
        """Sources whose metadata is loaded."""
        return len(self._peers) if self._peers is not None else 0

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive()

    def start(self) -> None:
        """Returns when the agent is there. Raises what `open_agent` raised."""
        self._thread.start()
        if not self._ready.wait(_OPEN_S):
            self._stopping = True  # an agent that comes yet is wanted by nobody
            raise ConfigError(f"transfer nixl: no agent after {_OPEN_S:.0f} s")
        if self._open_error is not None:
            raise self._open_error

    def submit(self, flight: Flight) -> None:
        self._commands.put(flight)

    def wake(self) -> None:
        """Have a look now: an operation was aborted."""
        self._commands.put(None)

    def stop(self, timeout_s: float) -> bool:
        """Post nothing more, wait for what is posted, then destroy the agent. False if that takes
        longer: then the thread goes on, and the process must end by `os._exit`."""
        self._stopping = True
        self.wake()
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        try:
            self._opened = self._open_agent()
            self._peers = Peers(self._opened, self._own_name, max_peers=self._max_peers)
        except Exception as error:
            _logger.debug("nixl: no agent", exc_info=True)
            self._open_error = error
            return
        finally:
            self._ready.set()
        while not self._has_served():
            time.sleep(_STUCK_PAUSE_S)
        if not self._lost:
            self._peers = None
            self._opened = None  # the last reference to the agent: it is destroyed here

    def _has_served(self) -> bool:
        """False after an error that no operation is to blame for: even then the thread goes on, so
        that whatever comes later hears its end, and what is posted is asked for."""
        try:
            self._serve()
        except Exception as error:
            if not self.failure:
                _logger.exception("nixl: the agent's thread takes no more work")
            self._break(error)
            return False
        return True

    def _serve(self) -> None:
        pause_s = 0.0
        moved_at = time.monotonic()
        while self._flights or not self._stopping or not self._commands.empty():
            self._take(pause_s if self._flights else None)
            now = time.monotonic()
            if self._turn(now):
                moved_at, pause_s = now, 0.0
            else:
                is_stuck = now - moved_at > _STUCK_AFTER_S
                longest_s = _STUCK_PAUSE_S if is_stuck else _LONGEST_PAUSE_S
                pause_s = min(max(2 * pause_s, _FIRST_PAUSE_S), longest_s)

    def _take(self, timeout_s: float | None) -> None:
        """Everything that waits in the queue; for the first of it, wait (None: for ever)."""
        try:
            flight = self._commands.get(timeout=timeout_s) if timeout_s != 0.0 else None
            while True:
                if flight is not None:
                    self._flights.append(flight)
                flight = self._commands.get_nowait()
        except queue.Empty:
            pass

    def _turn(self, now: float) -> bool:
        """Whether anything happened."""
        has_moved = False
        for flight in list(self._flights):
            try:
                has_moved |= self._advance(flight, now)
            except Exception as error:
                if not self.failure:
                    _logger.exception("nixl: the agent's thread takes no more work")
                self._break(error)
                flight.fail(self.failure)
                if flight.posted and flight in self._flights:
                    self._flights.remove(flight)
                    self._lost.append(flight)
        return has_moved

    def _break(self, error: Exception) -> None:
        """Something we did not foresee: no new work; what runs ends as soon as nothing can land."""
        self.failure = self.failure or f"internal: {type(error).__name__} in the nixl thread"

    def _advance(self, flight: Flight, now: float) -> bool:
        has_moved = self._reap(flight)
        if not flight.failure:
            self._look_for_a_reason_to_end(flight)
        if flight.may_post and now >= flight.post_at:
            has_moved |= self._post(flight, now)
        if not flight.posted and flight.next_piece is None:
            self._end(flight)
            return True
        return has_moved

    def _look_for_a_reason_to_end(self, flight: Flight) -> None:
        if flight.operation.aborted:
            flight.fail("aborted: given up by the caller")
        elif self._stopping:
            flight.fail("stopped: the worker leaves")
        elif self.failure:
            flight.fail(self.failure)

    def _reap(self, flight: Flight) -> bool:
        """Take back the pieces that are terminal."""
        has_moved = False
        for posted in list(flight.posted):
            handle, num_bytes = posted
            state = self._asked(flight, self._agent.check_xfer_state, handle)
            if state == "PROC":
                continue
            flight.posted.remove(posted)
            self._settle(flight, handle, num_bytes, state)
            has_moved = True
        return has_moved

    def _post(self, flight: Flight, now: float) -> bool:
        """One piece; with CMA it is here when this returns."""
        if flight.peer is None and not self._find_peer(flight):
            return bool(flight.failure)
        handle = self._prepared(flight, piece := flight.step())
        if handle is None:
            return True
        if flight.pace:
            flight.post_at = now + piece.num_bytes / flight.pace
        # Known as posted before it is: whatever happens in the call, it may have begun.
        flight.posted.append((handle, piece.num_bytes))
        state = self._asked(flight, self._agent.transfer, handle)
        if state != "PROC":
            flight.posted.pop()
            self._settle(flight, handle, piece.num_bytes, state)
        return True

    def _find_peer(self, flight: Flight) -> bool:
        offer = flight.operation.spec.offer
        assert self._peers is not None
        assert isinstance(offer, FabricOffer)
        try:
            flight.peer = self._peers.acquire(offer)
        except Unreachable as error:
            flight.fail(f"gone: {error}", peer_gone=True)
        except BadOffer as error:
            flight.fail(f"bad_request: {error}")
        return flight.peer is not None

    def _prepared(self, flight: Flight, piece: Piece) -> Handle | None:
        """None if NIXL does not know such memory; nothing has begun then, the others go on."""
        agent, peer = self._agent, flight.peer
        assert peer is not None
        try:
            local = agent.get_xfer_descs(piece.local, piece.local_kind)
            remote = agent.get_xfer_descs(piece.remote, piece.remote_kind)
            backend = self._open.backend
            return agent.initialize_xfer("READ", local, remote, peer.name, b"", [backend])
        except self._open.not_begun as error:
            flight.fail(f"bad_request: not memory of that source: {error}")
            peer.failed = peer.failed or peer.num_users == 1
            return None

    def _asked(self, flight: Flight, ask: Callable[[Handle], str], handle: Handle) -> str:
        """What NIXL answers: "DONE", "PROC" or "ERR"; an error of its own is terminal."""
        try:
            return ask(handle)
        except self._open.disconnected as error:
            flight.fail(f"gone: {error}", peer_gone=True)
        except self._open.errors as error:
            flight.fail(f"failed: {error}")
        return "ERR"

    def _settle(self, flight: Flight, handle: Handle, num_bytes: int, state: str) -> None:
        """After a terminal state, and only then: releasing a live one cancels nothing."""
        if state == "DONE":
            flight.operation.num_bytes_done += num_bytes
        else:
            flight.fail(f"failed: NIXL says {state}")
            assert flight.peer is not None
            flight.peer.failed = True
        try:
            self._agent.release_xfer_handle(handle)
        except self._open.errors as error:
            _logger.warning("nixl: a finished transfer cannot be released: %s", error)

    def _end(self, flight: Flight) -> None:
        self._flights.remove(flight)
        try:
            if flight.peer is not None and self._peers is not None:
                self._peers.release(flight.peer)
        finally:
            slot = flight.operation.scratch_slot
            has_word = slot is not None and not flight.failure
            flight.operation.end(
                not flight.failure,
                flight.failure,
                word=self._read_word(slot) if has_word and slot is not None else None,
                peer_gone=flight.peer_gone,
            )

    @property
    def _open(self) -> OpenAgent:
        if self._opened is None:
            raise LocalError("the agent is not there")
        return self._opened

    @property
    def _agent(self) -> Agent:
        return self._open.agent
