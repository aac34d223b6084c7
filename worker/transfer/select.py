"""Which transports a worker runs, and which of a handle's offers a pull uses; each with a reason.

`auto` runs all that work here and offers them all; who pulls picks, knowing both hosts:
nixl where it has RDMA or KV is on a GPU; else shm on one host; else nixl where CMA works, tried and
not assumed; else tcp. Shm comes before CMA because it was measured to cost a half to two thirds
of it (ADR 8). `ucx` is never chosen by itself: it is slower than tcp wherever tcp was measured.

Knows the transports' names and constructors, nothing of how they move bytes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, Literal, NamedTuple

from protocol.errors import ConfigError
from protocol.handoff import Offer
from worker.transfer import probe
from worker.transfer.base import Transfer
from worker.transfer.fabric_pairs import FabricPairs
from worker.transfer.shm import ShmTransfer, host_id, shm_unavailable
from worker.transfer.tcp import TcpTransfer

Requested = Literal["auto", "nixl", "ucx", "shm", "tcp"]
NixlBackend = Literal["UCX", "LIBFABRIC"]

FABRIC_FIRST: Final = ("nixl", "shm", "tcp", "ucx")
"""Best first, where NIXL has RDMA or is the one that reaches a GPU's memory."""
SHM_FIRST: Final = ("shm", "nixl", "tcp", "ucx")
"""Where it has CMA at best."""


@dataclass(frozen=True, slots=True)
class Machine:
    """What was found here."""

    unavailable: Mapping[str, str]
    """For each transport why it cannot run at all; empty if it can."""
    rdma: str = ""
    """An active RDMA port."""
    lacks_cma: str = ""
    """Why CMA does not work; empty if it does."""
    on_gpu: bool = False
    """Our KV is in a GPU's memory."""


class Verdict(NamedTuple):
    """Whether a transport runs, and why, for the log and `/metrics`."""

    name: str
    runs: bool
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


@dataclass(frozen=True, slots=True)
class TransferOptions:
    """What the operator decides, and this process's name in its fleet."""

    requested: Requested = "auto"
    agent_name: str = "baton"
    """Unique for each process start."""
    host: str = "127.0.0.1"
    port: int = 0
    """Of tcp, or of ucx; 0: any free one."""
    nixl_backend: NixlBackend = "UCX"
    nixl_plugin_dir: str = ""
    on_gpu: bool = False
    throttle_bytes_per_s: float | None = None
    """Bounds the pace of one pull."""


@dataclass(frozen=True, slots=True)
class TransferSet:
    """What a worker runs, best first, not started."""

    transfers: list[Transfer]
    verdicts: list[Verdict] = field(default_factory=list)
    """Of every known transport."""


def judge(requested: Requested, machine: Machine) -> list[Verdict]:
    """Of every known transport, best first. Raises ConfigError if none is to run."""
    if requested != "auto":
        return _asked_for(requested, machine)
    order = FABRIC_FIRST if machine.on_gpu or machine.rdma else SHM_FIRST
    verdicts = [_auto(name, machine) for name in order]
    if not any(verdict.runs for verdict in verdicts):
        passed = "; ".join(f"{verdict.name}: {verdict.reason}" for verdict in verdicts)
        raise ConfigError(f"transfer: nothing works here: {passed}")
    return verdicts


def _asked_for(requested: str, machine: Machine) -> list[Verdict]:
    missing = _missing(requested, machine)
    if missing:
        raise ConfigError(f"transfer: {requested} does not work here: {missing}")
    others = [Verdict(name, False, "not asked for") for name in FABRIC_FIRST if name != requested]
    return [Verdict(requested, True, "asked for"), *others]


def _missing(name: str, machine: Machine) -> str:
    if machine.on_gpu and name in ("shm", "tcp"):
        return "it cannot read KV in a GPU's memory"
    return machine.unavailable.get(name, "not in this version")


def _auto(name: str, machine: Machine) -> Verdict:
    missing = _missing(name, machine)
    if missing:
        return Verdict(name, False, missing)
    if name == "ucx":
        return Verdict(name, False, "only when asked for")
    if name != "nixl":
        return Verdict(name, True, "auto")
    if machine.on_gpu:
        return Verdict(name, True, "auto: KV is in a GPU's memory")
    if machine.rdma:
        return Verdict(name, True, f"auto: RDMA ({machine.rdma})")
    if not machine.lacks_cma:
        return Verdict(name, True, "auto: CMA works")
    return Verdict(name, False, f"no RDMA, no GPU, no CMA: {machine.lacks_cma}")


def look_around(options: TransferOptions, environ: Mapping[str, str]) -> Machine:
    """Try what this machine can do. Takes some 50 ms where nixl is installed; makes no agent."""
    from worker.transfer.nixl import nixl_unavailable
    from worker.transfer.ucx import ucx_unavailable

    unavailable = {
        "nixl": nixl_unavailable(),
        "ucx": ucx_unavailable(),
        "shm": shm_unavailable(),
        "tcp": "",
    }
    rdma, lacks_cma = "", "not tried"
    if not unavailable["nixl"] and options.requested in ("auto", "nixl"):
        rdma = probe.rdma_port() if probe.allows_rdma(environ) else ""
        is_ucx = options.nixl_backend == "UCX"
        lacks_cma = probe.cma_unavailable(environ) if is_ucx else "LIBFABRIC does not use it"
    return Machine(unavailable, rdma, lacks_cma, options.on_gpu)


def build_transfers(options: TransferOptions, environ: Mapping[str, str]) -> TransferSet:
    """What runs here. Raises ConfigError."""
    machine = look_around(options, environ)
    verdicts = judge(options.requested, machine)
    built = [_build(verdict.name, options, machine) for verdict in verdicts if verdict.runs]
    return TransferSet(built, verdicts)


def _build(name: str, options: TransferOptions, machine: Machine) -> Transfer:
    throttle = options.throttle_bytes_per_s
    if name == "shm":
        return ShmTransfer(throttle_bytes_per_s=throttle)
    if name == "tcp":
        return TcpTransfer(host=options.host, port=options.port, throttle_bytes_per_s=throttle)
    if name == "ucx":
        from worker.transfer.ucx import UcxTransfer

        return UcxTransfer(host=options.host, port=options.port, throttle_bytes_per_s=throttle)
    return _build_nixl(options, machine)


def _build_nixl(options: TransferOptions, machine: Machine) -> Transfer:
    from worker.transfer.nixl import NixlTransfer

    nixl = NixlTransfer(
        agent_name=options.agent_name,
        backend=options.nixl_backend,
        host=options.host,
        plugin_dir=options.nixl_plugin_dir,
        throttle_bytes_per_s=options.throttle_bytes_per_s,
    )
    return FabricPairs(
        nixl,
        picky=options.requested == "auto",
        has_rdma=bool(machine.rdma),
        lacks_cma=machine.lacks_cma,
        host_id=host_id(),
        read=probe.read_foreign,
    )


def choose(
    transfers: Sequence[Transfer],
    offers: Sequence[Offer],
    *,
    without: frozenset[str] = frozenset(),
    why: Mapping[str, str] | None = None,
) -> Chosen | NoTransfer:
    """The first of our transports, in our order, that takes one of the offers and is not one of
    `without` (they have failed). `why` says of each why it runs."""
    refusals: list[str] = []
    for transfer in transfers:
        if transfer.name in without:
            refusals.append(f"{transfer.name}: failed before")
            continue
        reasons = []
        for offer in offers:
            reason = transfer.refuse(offer)
            if not reason:
                ran = (why or {}).get(transfer.name, "preferred")
                return Chosen(transfer, offer, "; ".join(refusals) or ran)
            reasons.append(f"{transfer.name}: {reason}")
        # That an offer is of another kind says nothing beside a refusal of one of its own.
        own = [r for r in reasons if "not an offer of" not in r]
        refusals.extend(own or reasons[:1])
    return NoTransfer(tuple(refusals))
