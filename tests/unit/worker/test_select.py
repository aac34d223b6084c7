"""Which transports run, which offer is taken, and how a long list becomes few copies."""

from array import array

import pytest

from protocol.errors import ConfigError
from protocol.handoff import FabricOffer, Offer, ShmOffer, TcpOffer
from worker.transfer.operations import runs
from worker.transfer.select import (
    Chosen,
    Machine,
    NoTransfer,
    Requested,
    TransferOptions,
    Verdict,
    build_transfers,
    choose,
    judge,
)
from worker.transfer.shm import ShmTransfer, host_id
from worker.transfer.tcp import TcpTransfer

EVERYTHING = {"nixl": "", "ucx": "", "shm": "", "tcp": ""}


def running(machine: Machine) -> list[str]:
    return [verdict.name for verdict in judge("auto", machine) if verdict.runs]


@pytest.mark.parametrize(
    ("machine", "names", "reason"),
    [
        (Machine(EVERYTHING), ["shm", "nixl", "tcp"], "auto: CMA works"),
        (Machine(EVERYTHING, rdma="mlx5_0/1"), ["nixl", "shm", "tcp"], "auto: RDMA (mlx5_0/1)"),
        (
            Machine(EVERYTHING, rdma="mlx5_0/1", lacks_cma="denied"),
            ["nixl", "shm", "tcp"],
            "auto: RDMA (mlx5_0/1)",
        ),
        (
            Machine(EVERYTHING, lacks_cma="denied"),
            ["shm", "tcp"],
            "no RDMA, no GPU, no CMA: denied",
        ),
        (
            Machine(EVERYTHING, lacks_cma="denied", on_gpu=True),
            ["nixl"],
            "auto: KV is in a GPU's memory",
        ),
        (Machine({**EVERYTHING, "shm": "no memfd"}), ["nixl", "tcp"], "auto: CMA works"),
        (Machine({**EVERYTHING, "nixl": "not installed"}), ["shm", "tcp"], "not installed"),
    ],
)
def test_auto_runs_all_that_work_best_first(
    machine: Machine, names: list[str], reason: str
) -> None:
    assert running(machine) == names
    assert {v.name: v.reason for v in judge("auto", machine)}["nixl"] == reason


def test_auto_never_takes_ucx() -> None:
    only = Machine({"nixl": "no", "ucx": "", "shm": "no", "tcp": "no"})
    with pytest.raises(ConfigError, match="ucx: only when asked for"):
        judge("auto", only)


def test_auto_with_nothing_left_says_why_of_each() -> None:
    with pytest.raises(ConfigError, match=r"shm: no memfd; nixl: not in this version; tcp: not in"):
        judge("auto", Machine({"shm": "no memfd"}, lacks_cma="denied"))


@pytest.mark.parametrize("name", ["nixl", "ucx", "shm", "tcp"])
def test_an_explicit_choice_runs_alone(name: Requested) -> None:
    first, *others = judge(name, Machine(EVERYTHING))
    assert first == Verdict(name, True, "asked for")
    assert [verdict.runs for verdict in others] == [False] * 3


def test_an_explicit_choice_that_cannot_run_is_an_error_and_no_fallback() -> None:
    with pytest.raises(ConfigError, match="shm does not work here: no memfd"):
        judge("shm", Machine({"shm": "no memfd", "tcp": ""}))
    with pytest.raises(ConfigError, match="tcp does not work here: it cannot read KV in a GPU's"):
        judge("tcp", Machine(EVERYTHING, on_gpu=True))


@pytest.mark.parametrize("name", ["shm", "tcp"])
def test_what_was_asked_for_is_built(name: Requested) -> None:
    found = build_transfers(TransferOptions(requested=name), {})
    assert [transfer.name for transfer in found.transfers] == [name]


def test_what_auto_finds_here_is_built_in_its_order() -> None:
    """No CMA by decree: what else this machine has is the other tests' matter."""
    found = build_transfers(TransferOptions(), {"UCX_TLS": "tcp"})
    assert [t.name for t in found.transfers] == [v.name for v in found.verdicts if v.runs]
    assert {"shm", "tcp"} <= {transfer.name for transfer in found.transfers}
    assert {verdict.name for verdict in found.verdicts} == {"nixl", "shm", "tcp", "ucx"}


ELSEWHERE = ShmOffer("another-boot/1", 1, 3, 4, 4096, 64, "0" * 32)
TCP = TcpOffer("192.0.2.7", 7001)


def test_first_of_our_transports_with_an_offer_it_takes() -> None:
    transfers = [ShmTransfer(), TcpTransfer()]
    chosen = choose(transfers, [TCP, ELSEWHERE], why={"tcp": "auto"})
    assert isinstance(chosen, Chosen)
    assert (chosen.transfer.name, chosen.offer) == ("tcp", TCP)
    assert chosen.reason == "shm: the source is on another host or in another pid namespace"


def test_what_failed_before_is_left_out_and_said() -> None:
    transfers = [ShmTransfer(), TcpTransfer()]
    chosen = choose(transfers, [TCP], without=frozenset({"shm"}))
    assert isinstance(chosen, Chosen)
    assert chosen.reason == "shm: failed before"
    found = choose(transfers, [TCP], without=frozenset({"shm", "tcp"}))
    assert found == NoTransfer(("shm: failed before", "tcp: failed before"))


def test_the_preferred_one_is_taken_for_the_reason_it_runs() -> None:
    chosen = choose([TcpTransfer()], [TCP], why={"tcp": "asked for"})
    assert isinstance(chosen, Chosen)
    assert chosen.reason == "asked for"


@pytest.mark.parametrize(
    ("offers", "reasons"),
    [
        ([], ()),
        ([FabricOffer("nixl", "a", b"", 0, 0)], ("tcp: not an offer of tcp",)),
        ([ELSEWHERE], ("tcp: not an offer of tcp",)),
        ([TcpOffer("name", 1)], ("tcp: 'name' is no IP address",)),
    ],
)
def test_no_transport_says_why(offers: list[Offer], reasons: tuple[str, ...]) -> None:
    found = choose([TcpTransfer()], offers)
    assert found == NoTransfer(reasons)
    assert str(found) != ""


def test_host_id_names_boot_and_pid_namespace() -> None:
    boot, namespace = host_id().split("/")
    assert len(boot) == 36
    assert namespace.isdigit()


@pytest.mark.parametrize(
    ("remote", "local", "limit", "expected"),
    [
        ([], [], 8, []),
        ([5], [1], 8, [(5, 1, 1)]),
        ([5, 6, 7], [1, 2, 3], 8, [(5, 1, 3)]),
        ([5, 6, 7, 8], [1, 2, 3, 4], 3, [(5, 1, 3), (8, 4, 1)]),
        ([5, 6, 7], [1, 3, 4], 8, [(5, 1, 1), (6, 3, 2)]),
        ([7, 6, 5], [1, 2, 3], 8, [(7, 1, 1), (6, 2, 1), (5, 3, 1)]),
        ([5, 5, 6], [1, 1, 2], 8, [(5, 1, 1), (5, 1, 2)]),
        ([0, 1], [0, 1], 1, [(0, 0, 1), (1, 1, 1)]),
    ],
)
def test_neighbours_become_one_copy(
    remote: list[int], local: list[int], limit: int, expected: list[tuple[int, int, int]]
) -> None:
    assert list(runs(array("I", remote), array("I", local), limit)) == expected
