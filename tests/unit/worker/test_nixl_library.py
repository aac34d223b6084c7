"""Opening NIXL, as far as it needs no library: the environment, the interface, the block lists."""

import os
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from protocol.handoff import FabricOffer
from worker.kv.arena import Arena, ScratchWords
from worker.transfer import nixl_interfaces, nixl_library
from worker.transfer.base import PullSpec
from worker.transfer.nixl_library import nixl_unavailable, overrides
from worker.transfer.nixl_places import (
    block_pieces,
    memory_kind,
    word_piece,
    wrong_remote,
    wrong_slot,
)

SIZE = 1 << 20


@pytest.fixture
def no_rdma(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nixl_interfaces, "_has_rdma", lambda: False)


def offer(**changes: object) -> FabricOffer:
    fields = {"arena_bytes": 64 * SIZE, "lease_bytes": 8 * 8 + 32, **changes}
    return FabricOffer("nixl/UCX", "w.1", b"m", 1 << 40, 1 << 41, **fields)  # type: ignore[arg-type]


def spec(remote: list[int], local: list[int], source: FabricOffer, slot: int = 1) -> PullSpec:
    return PullSpec(source, array("I", remote), array("I", local), SIZE, slot, 77)


@pytest.fixture
def arena() -> Iterator[Arena]:
    made = Arena(64, SIZE)
    yield made
    made.close()


def test_pieces_hold_every_block_once_in_order_and_no_more_than_8_mib(arena: Arena) -> None:
    remote = [3, 4, 5, 9, *range(20, 36)]
    local = [0, 1, 2, 8, *range(40, 56)]
    pieces = list(block_pieces(spec(remote, local, offer()), offer(), arena, pace=0.0))
    assert [piece.num_bytes // SIZE for piece in pieces] == [8, 8, 4]
    copied = []
    for piece in pieces:
        for theirs, ours in zip(piece.remote, piece.local, strict=True):
            assert theirs[1:] == ours[1:]
            first = (theirs[0] - (1 << 40)) // SIZE, (ours[0] - arena.address) // SIZE
            copied += [(first[0] + n, first[1] + n) for n in range(theirs[1] // SIZE)]
    assert copied == list(zip(remote, local, strict=True))
    assert len(pieces[0].remote) == 3, "neighbours on both sides are one copy"


def test_a_throttled_pull_goes_in_pieces_of_50_ms(arena: Arena) -> None:
    some = spec(list(range(8)), list(range(8)), offer())
    pieces = block_pieces(some, offer(), arena, pace=40.0 * SIZE)
    assert [piece.num_bytes // SIZE for piece in pieces] == [2, 2, 2, 2]
    slow = block_pieces(some, offer(), arena, pace=1.0)
    assert [piece.num_bytes // SIZE for piece in slow] == [1] * 8


def test_memory_of_a_gpu_is_named_as_such(arena: Arena) -> None:
    source = offer(kind="cuda", device=3)
    [piece] = block_pieces(spec([1], [2], source), source, arena, pace=0.0)
    assert (piece.remote_kind, piece.local_kind) == ("VRAM", "DRAM")
    assert piece.remote[0][2] == 3
    assert word_piece(1, source, ScratchWords(2), 1).remote_kind == "DRAM", "leases are on the host"
    assert (memory_kind("host"), memory_kind("cuda")) == ("DRAM", "VRAM")


def test_word_is_eight_bytes_of_its_slot() -> None:
    scratch = ScratchWords(4)
    piece = word_piece(3, offer(), scratch, 2)
    assert piece.remote == [((1 << 41) + 24, 8, 0)]
    assert piece.local == [(scratch.address + 16, 8, 0)]
    assert piece.num_bytes == 0


def test_what_lies_outside_of_the_source_is_refused() -> None:
    assert wrong_remote(spec([63], [0], offer()), offer()) == ""
    assert wrong_remote(spec([64], [0], offer()), offer()) != ""
    assert wrong_remote(spec([0], [0], offer()), offer(arena_bytes=0)) != ""
    assert [wrong_slot(spec([], [], offer(), slot), offer()) == "" for slot in (-1, 0, 7, 8)] == [
        False,
        True,
        True,
        False,
    ]


def test_why_it_is_unavailable(monkeypatch: pytest.MonkeyPatch) -> None:
    def without(*missing: str) -> Callable[[str], object]:
        return lambda name: None if name in missing else object()

    finder = nixl_library.importlib.util
    monkeypatch.setattr(nixl_library.sys, "platform", "darwin")
    assert nixl_unavailable() == "NIXL is for Linux"
    monkeypatch.setattr(nixl_library.sys, "platform", "linux")
    monkeypatch.setattr(finder, "find_spec", without("nixl_cu13", "nixl_cu12"))
    assert "neither nixl-cu13 nor nixl-cu12" in nixl_unavailable()
    monkeypatch.setattr(finder, "find_spec", without("nixl_cu13", "numpy"))
    assert "numpy" in nixl_unavailable()
    monkeypatch.setattr(finder, "find_spec", without("nixl_cu13"))
    assert nixl_unavailable() == ""
    assert nixl_library._package() == "nixl_cu12"
    monkeypatch.setattr(finder, "find_spec", without())
    assert nixl_library._package() == "nixl_cu13", "never both"


def test_the_operators_environment_wins(no_rdma: None, tmp_path: Path) -> None:
    home = {"HOME": str(tmp_path)}
    assert overrides(home, host="", plugin_dir="") == {"UCX_LOG_FILE": "stderr"}
    changes = overrides(home, host="127.0.0.1", plugin_dir="/plugins")
    assert changes == {
        "UCX_LOG_FILE": "stderr",
        "UCX_NET_DEVICES": "lo",
        "NIXL_PLUGIN_DIR": "/plugins",
        "NIXL_PLUGINS_DIR": "/plugins",
    }
    told = {**home, "UCX_LOG_FILE": "x", "UCX_NET_DEVICES": "mlx5_0:1"}
    assert overrides(told, host="127.0.0.1", plugin_dir="") == {}


def test_a_closed_home_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    def closed(path: str) -> None:
        raise PermissionError(path)

    monkeypatch.setattr(nixl_library.os, "stat", closed)
    assert overrides({"HOME": "/root"}, host="", plugin_dir="")["NIXL_CONFIG_FILE"] == os.devnull


def test_environment_is_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BATON_TEST_A", "before")
    with nixl_library._environment({"BATON_TEST_A": "now", "BATON_TEST_B": "new"}):
        assert (os.environ["BATON_TEST_A"], os.environ["BATON_TEST_B"]) == ("now", "new")
    assert os.environ["BATON_TEST_A"] == "before"
    assert "BATON_TEST_B" not in os.environ


def test_interfaces(no_rdma: None) -> None:
    for host in ("127.0.0.1", "localhost", "127.1.2.3"):
        assert nixl_interfaces.interface_of(host) == "lo"
    for host in ("", "0.0.0.0", "::", "203.0.113.9", "no-such-host.invalid"):
        assert nixl_interfaces.interface_of(host) == ""
    names = set(nixl_interfaces._names())
    for address, name in nixl_interfaces._addresses().items():
        assert name in names
        if not address.is_loopback:
            assert nixl_interfaces.interface_of(str(address)) == name


def test_rdma_devices_are_not_shut_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert not nixl_interfaces._has_rdma(str(tmp_path))
    (tmp_path / "mlx5_0").mkdir()
    assert nixl_interfaces._has_rdma(str(tmp_path))
    monkeypatch.setattr(nixl_interfaces, "_has_rdma", lambda: True)
    assert nixl_interfaces.interface_of("127.0.0.1") == ""
