"""Which transports a worker runs, and which of a handle's offers a pull uses; each with a reason.

Knows the transports' names and constructors, nothing of how they move bytes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal, NamedTuple

from protocol.errors import ConfigError
from protocol.handoff import Offer
from worker.transfer.base import Transfer
from worker.transfer.shm import ShmTransfer, shm_unavailable
from worker.transfer.tcp import TcpTransfer

Requested = Literal["auto", "nixl", "ucx", "shm", "tcp"]

_AUTO_ORDER: Final = ("shm", "tcp")
"""Fastest first; what needs another host comes last because it works everywhere."""


class Preference(NamedTuple):
    """A transport to run, and why, for the log."""

    name: str
    reason: str


class Chosen(NamedTuple):
    """How one pull goes."""

    transfer: Transfer
    offer: Offer
    reason: str


@dataclass(frozen=True, slots=True)
class NoTransfer:
    """No transport of ours can pull from any of the offers."""

    reasons: tuple[str, ...]

    def __str__(self) -> str:
        return "; ".join(self.reasons) or "the handle offers no transport"


def preferences(requested: Requested, available: Mapping[str, str]) -> list[Preference]:
    """The transports to run, best first. `available` says for each known transport why it cannot
    run here, empty if it can. Raises ConfigError if nothing is left."""
    if requested != "auto":
        if requested not in available:
            raise ConfigError(f"transfer: {requested} is not in this version")
        if available[requested]:
            raise ConfigError(f"transfer: {requested} does not work here: {available[requested]}")
        return [Preference(requested, "asked for")]
    chosen = []
    passed = []
    for name in _AUTO_ORDER:
        missing = available.get(name, "not in this version")
        if missing:
            passed.append(f"{name}: {missing}")
        else:
            chosen.append(Preference(name, "; ".join(["auto", *passed])))
    if not chosen:
        raise ConfigError("transfer: nothing works here: " + "; ".join(passed))
    return chosen


def available_here() -> dict[str, str]:
    """The built-in transports, and why one cannot run on this machine."""
    return {"shm": shm_unavailable(), "tcp": ""}


def build_transfers(
    requested: Requested,
    *,
    host: str = "127.0.0.1",
    tcp_port: int = 0,
    advertise_host: str = "",
    throttle_bytes_per_s: float | None = None,
) -> list[Transfer]:
    """Best first, not started. Raises ConfigError. The throttle bounds the pace of one pull."""
    throttle = throttle_bytes_per_s
    transfers: list[Transfer] = []
    for name, _ in preferences(requested, available_here()):
        if name == "shm":
            transfers.append(ShmTransfer(throttle_bytes_per_s=throttle))
        else:
            tcp = TcpTransfer(
                host=host,
                port=tcp_port,
                advertise_host=advertise_host,
                throttle_bytes_per_s=throttle,
            )
            transfers.append(tcp)
    return transfers


def choose(transfers: Sequence[Transfer], offers: Sequence[Offer]) -> Chosen | NoTransfer:
    """The first of our transports, in our order, that takes one of the offers."""
    refusals: list[str] = []
    for transfer in transfers:
        reasons = []
        for offer in offers:
            reason = transfer.refuse(offer)
            if not reason:
                return Chosen(transfer, offer, "; ".join(refusals) or "preferred")
            reasons.append(f"{transfer.name}: {reason}")
        # That an offer is of another kind says nothing beside a refusal of one of its own.
        own = [r for r in reasons if "not an offer of" not in r]
        refusals.extend(own or reasons[:1])
    return NoTransfer(tuple(refusals))
