"""The sources whose metadata an agent has loaded: one each, as many as wanted, none while in use.

A source that failed is dropped and loaded again from the next handle's offer; both only when no
transfer with it is live, for NIXL does not say what dropping does to those. Lives in the agent's
thread.
"""

import logging
from collections import OrderedDict

from protocol.handoff import FabricOffer
from worker.transfer.nixl_library import OpenAgent

_logger = logging.getLogger(__name__)


class BadOffer(Exception):
    """No source can be made of it."""


class Unreachable(Exception):
    """Nobody answers where the offer says."""


class Peer:
    """A source; `name` is its agent's, unique for each start of a worker."""

    __slots__ = ("failed", "name", "num_users")

    def __init__(self, name: str) -> None:
        self.name = name
        self.num_users = 0
        self.failed = False


class Peers:
    def __init__(self, opened: OpenAgent, own_name: str, *, max_peers: int) -> None:
        self._opened = opened
        self._own_name = own_name
        self._max_peers = max_peers
        self._peers: OrderedDict[str, Peer] = OrderedDict()

    def __len__(self) -> int:
        return len(self._peers)

    def acquire(self, offer: FabricOffer) -> Peer | None:
        """To be released again. None while a failure of this source is being cleared away: ask
        again later. Does not wait for the connection. Raises BadOffer, Unreachable."""
        peer = self._peers.get(offer.agent)
        if peer is None:
            peer = self._load(offer)
        elif peer.failed:
            return None
        peer.num_users += 1
        self._peers.move_to_end(offer.agent)
        self._trim()
        return peer

    def release(self, peer: Peer) -> None:
        peer.num_users -= 1
        if peer.failed and peer.num_users == 0:
            self._drop(peer)
        self._trim()

    def _load(self, offer: FabricOffer) -> Peer:
        if offer.agent != self._own_name:  # our own agent knows itself
            self._add(offer)
        peer = self._peers[offer.agent] = Peer(offer.agent)
        return peer

    def _add(self, offer: FabricOffer) -> None:
        if offer.agent.encode() not in offer.metadata:
            # Not even tried: a failed load also spoils the source whose name is really in there.
            raise BadOffer(f"its metadata is not of {offer.agent!r}")
        agent = self._opened.agent
        try:
            loaded = agent.add_remote_agent(offer.metadata)
        except self._opened.refused as error:  # connection refused, host unreachable
            self._forget(offer.agent)
            raise Unreachable(str(error)) from error
        except self._opened.not_begun as error:
            self._forget(offer.agent)
            raise BadOffer(f"its metadata: {error}") from error
        name = loaded.decode() if isinstance(loaded, bytes) else loaded
        if name != offer.agent:
            if name not in self._peers:
                self._forget(name)
            raise BadOffer(f"its metadata is of {name!r}, not of {offer.agent!r}")

    def _trim(self) -> None:
        """The ones in use stay, however many: live operations are bounded elsewhere."""
        if len(self._peers) <= self._max_peers:
            return
        idle = [peer for peer in self._peers.values() if peer.num_users == 0]
        for peer in idle[: len(self._peers) - self._max_peers]:
            self._drop(peer)

    def _drop(self, peer: Peer) -> None:
        del self._peers[peer.name]
        if peer.name != self._own_name:
            self._forget(peer.name)

    def _forget(self, name: str) -> None:
        try:
            self._opened.agent.remove_remote_agent(name)
        except self._opened.errors as error:
            _logger.warning("nixl: cannot drop the metadata of %s: %s", name, error)
