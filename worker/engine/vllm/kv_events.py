"""vLLM's KV events over ZeroMQ: subscribed, numbered, replayed after a gap. Only here is zmq.

Nothing runs while nothing happens: the sockets wake the event loop. What the events mean is in
`kv_index`.
"""

import asyncio
import logging
from collections.abc import Callable
from typing import Any, Final

import zmq
import zmq.asyncio

from protocol.errors import ConfigError
from protocol.events import KvEvent
from worker.engine.vllm.kv_index import (
    KvIndex,
    Sequencer,
    decode_batch,
    read_frames,
    replay_closes_gap,
)

_log = logging.getLogger("baton.engine")

REPLAY_S: Final = 2.0
"""Without a word for so long, a replay is over, and what it did not bring is lost."""
GRUMBLE_EVERY: Final = 1000


class KvEventStream:
    """Feeds an index from one publisher. `said` hears what changed, on the loop."""

    def __init__(
        self,
        index: KvIndex,
        *,
        url: str,
        replay_url: str,
        said: Callable[[list[KvEvent]], None],
    ) -> None:
        """Raises ConfigError for a bad address."""
        self._index = index
        self._said = said
        self._replay_url = replay_url
        self._sequencer = Sequencer()
        self._num_bad = 0
        self.num_gaps = 0
        self._context = zmq.asyncio.Context()
        try:
            if replay_url:  # a bad address is told now, not at the first gap
                self._open(zmq.DEALER, replay_url, may_bind=False).close()
            self._socket = self._open(zmq.SUB, url, may_bind=True)
        except ConfigError:
            self._context.destroy(linger=0)
            raise
        self._socket.subscribe(b"")

    def _open(self, kind: int, url: str, *, may_bind: bool) -> "zmq.asyncio.Socket":
        socket = self._context.socket(kind)
        socket.linger = 0
        try:
            # as vLLM has it: a star is an address to listen on
            if may_bind and ("*" in url or "//0.0.0.0" in url or "//[::]" in url):
                socket.bind(url)
            else:
                socket.connect(url)
        except zmq.ZMQError as error:
            socket.close()
            raise ConfigError(f"KV events: {url}: {error.strerror}") from None
        return socket

    async def run(self) -> None:
        """Until it is cancelled. What was said before we listened is asked for first."""
        try:
            await self._fill(0, before=0)
            await self._listen()
        finally:
            self._socket.close()
            self._context.destroy(linger=0)

    async def _listen(self) -> None:
        while True:
            frames: list[bytes] = await self._socket.recv_multipart()
            read = read_frames(frames[1:]) if len(frames) == 3 else None
            if read is None:
                self._bad("not three frames, or no number of a message")
                continue
            seq, payload = read
            if self._sequencer.missing(seq):
                await self._fill(self._sequencer.expected, before=seq)
            self._apply(seq, payload)

    def _apply(self, seq: int, payload: bytes) -> None:
        if not self._sequencer.take(seq):
            return
        try:
            events = self._index.apply(decode_batch(payload))
        except (ValueError, OverflowError) as error:  # the latter: ids of more than 32 bits
            self._bad(str(error))
            events = self._index.clear()  # it may have said that something is gone
        if events:
            self._said(events)

    async def _fill(self, expected: int, *, before: int) -> None:
        """Ask for everything from `expected` on; if not all `before` comes, begin anew."""
        replayed = await self._replay(expected) if self._replay_url else []
        if expected and not replay_closes_gap(replayed, expected, before):
            self.num_gaps += 1
            _log.warning("KV events lost from number %d on: the index begins anew", expected)
            self._said(self._index.clear())
        for seq, payload in replayed:
            self._apply(seq, payload)

    async def _replay(self, start: int) -> list[tuple[int, bytes]]:
        socket = self._open(zmq.DEALER, self._replay_url, may_bind=False)
        found: list[tuple[int, bytes]] = []
        try:
            await socket.send_multipart([b"", start.to_bytes(8, "big")])
            while True:
                async with asyncio.timeout(REPLAY_S):
                    frames: list[Any] = await socket.recv_multipart()
                read = read_frames(frames[-2:]) if len(frames) >= 3 else None
                if read is None:
                    return found
                found.append(read)
        except (TimeoutError, zmq.ZMQError) as error:
            why = "no answer in time" if isinstance(error, TimeoutError) else str(error)
            _log.warning("KV events: replay from %s: %s", self._replay_url, why)
            return found
        finally:
            socket.close()

    def _bad(self, why: str) -> None:
        self._num_bad += 1
        if self._num_bad % GRUMBLE_EVERY == 1:
            _log.warning("ignored bad KV events count=%d last: %s", self._num_bad, why)
