"""Which transports run, which offer is taken, and how a long list becomes few copies."""

from array import array

import pytest

from protocol.errors import ConfigError
from protocol.handoff import FabricOffer, Offer, ShmOffer, TcpOffer
from worker.transfer.operations import runs
from worker.transfer.select import (
    Chosen,
    NoTransfer,
    Preference,
    Requested,
    build_transfers,
    choose,
    preferences,
)
from worker.transfer.shm import host_id

EVERYTHING = {"shm": "", "tcp": ""}


def test_auto_prefers_shm_and_keeps_tcp_for_other_hosts() -> None:
    chosen = preferences("auto", EVERYTHING)
    assert chosen == [Preference("shm", "auto"), Preference("tcp", "auto")]


def test_auto_says_what_it_passed_over() -> None:
    chosen = preferences("auto", {"shm": "no memfd", "tcp": ""})
    assert chosen == [Preference("tcp", "auto; shm: no memfd")]


def test_auto_with_nothing_left() -> None:
    with pytest.raises(ConfigError, match=r"shm: no memfd; tcp: not in this version"):
        preferences("auto", {"shm": "no memfd"})


@pytest.mark.parametrize("name", ["shm", "tcp"])
def test_an_explicit_choice_runs_alone(name: Requested) -> None:
    assert [p.name for p in preferences(name, EVERYTHING)] == [name]
    assert [t.name for t in build_transfers(name)] == [name]


def test_an_explicit_choice_that_cannot_run_is_an_error_and_no_fallback() -> None:
    with pytest.raises(ConfigError, match="shm does not work here: no memfd"):
        preferences("shm", {"shm": "no memfd", "tcp": ""})


@pytest.mark.parametrize("name", ["nixl", "ucx"])
def test_what_is_not_in_this_version_is_named(name: Requested) -> None:
    with pytest.raises(ConfigError, match=f"{name} is not in this version"):
        build_transfers(name)


def test_built_in_order_of_preference() -> None:
    assert [t.name for t in build_transfers("auto")] == ["shm", "tcp"]


ELSEWHERE = ShmOffer("another-boot/1", 1, 3, 4, 4096, 64, "0" * 32)
TCP = TcpOffer("192.0.2.7", 7001)


def test_first_of_our_transports_with_an_offer_it_takes() -> None:
    transfers = build_transfers("auto")
    chosen = choose(transfers, [TCP, ELSEWHERE])
    assert isinstance(chosen, Chosen)
    assert (chosen.transfer.name, chosen.offer) == ("tcp", TCP)
    assert chosen.reason == "shm: the source is on another host or in another pid namespace"


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
    found = choose(build_transfers("tcp"), offers)
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
