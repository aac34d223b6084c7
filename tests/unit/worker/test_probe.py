"""What one process may do to another's memory, tried for real: with leave, denied, and filtered."""

import ctypes
import errno
import os
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from worker.transfer import probe
from worker.transfer.probe import (
    allows_cma,
    allows_rdma,
    cma_unavailable,
    rdma_port,
    read_foreign,
)

ROOT = Path(__file__).parents[3]
X86_64_READV, AARCH64_READV = 310, 270
FILTERED = """
import ctypes, os, struct, sys
number = int(sys.argv[1])
program = b"".join(struct.pack("<HBBI", *one) for one in [
    (0x20, 0, 0, 0),            # the system call's number
    (0x15, 0, 1, number),       # equal: the next line, else the one behind it
    (0x06, 0, 0, 0x50000 | 1),  # EPERM
    (0x06, 0, 0, 0x7FFF0000),   # allowed
])
text = ctypes.create_string_buffer(program, len(program))
class Program(ctypes.Structure):
    _fields_ = (("count", ctypes.c_ushort), ("text", ctypes.c_void_p))
libc = ctypes.CDLL(None, use_errno=True)
none = ctypes.c_ulong(0)
assert libc.prctl(38, ctypes.c_ulong(1), none, none, none) == 0
made = Program(4, ctypes.addressof(text))
assert libc.prctl(22, ctypes.c_ulong(2), ctypes.byref(made), none, none) == 0
from worker.transfer.probe import cma_unavailable
print(cma_unavailable({}))
"""


def test_cma_works_here_or_says_why() -> None:
    """Both answers are right ones; that the word was really read shows in the tests below."""
    answer = cma_unavailable({})
    assert answer == "" or "process_vm_readv" in answer


def test_a_seccomp_filter_is_found_by_trying() -> None:
    """As in containers whose profile denies it."""
    number = X86_64_READV if os.uname().machine == "x86_64" else AARCH64_READV
    done = subprocess.run(
        [sys.executable, "-c", FILTERED, str(number)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "process_vm_readv: Operation not permitted"


def test_what_is_read_is_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    """A child that reads something else, or dies, is no proof."""
    monkeypatch.setattr(probe, "_ask_child", lambda address: "something else")
    assert cma_unavailable({}) == "something else"
    monkeypatch.setattr(probe, "_ask_child", lambda address: "")
    assert cma_unavailable({}) == "the process that tried it died"


def test_a_child_that_cannot_be_started_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    assert cma_unavailable({}).startswith("could not be tried: ")


def test_ucx_tls_without_it_is_said_and_nothing_is_tried() -> None:
    assert cma_unavailable({"UCX_TLS": "tcp"}) == "UCX_TLS=tcp leaves it out"


@pytest.mark.parametrize(
    ("text", "cma", "rdma"),
    [
        ("", True, True),
        ("all", True, True),
        ("tcp", False, False),
        ("tcp,cma", True, False),
        ("sm,tcp", True, False),
        ("tcp, rc", False, True),
        ("^cma", False, True),
        ("^tcp", True, True),
        ("^ib,tcp", True, False),
        ("^rc,ud,dc", True, False),
        ("^rc", True, True),
        ("^shm", False, True),
    ],
)
def test_what_ucx_tls_leaves(text: str, cma: bool, rdma: bool) -> None:
    environ = {"UCX_TLS": text}
    assert (allows_cma(environ), allows_rdma(environ)) == (cma, rdma)


def test_memory_of_another_process_is_read() -> None:
    word = b"a word of our own"
    memory = ctypes.create_string_buffer(word, len(word))
    address = ctypes.addressof(memory)
    assert read_foreign(os.getpid(), address, len(word)) == word
    with pytest.raises(OSError, match="Bad address") as caught:
        read_foreign(os.getpid(), 16, 8)
    assert caught.value.errno == errno.EFAULT
    with pytest.raises(OSError, match="No such process"):
        read_foreign(2**22 + 1, address, 8)


def port(root: Path, device: str, number: str, state: str | bytes) -> None:
    folder = root / device / "ports" / number
    folder.mkdir(parents=True)
    (folder / "state").write_bytes(state.encode() if isinstance(state, str) else state)


def test_an_active_port_is_rdma(tmp_path: Path) -> None:
    assert rdma_port(str(tmp_path / "nothing")) == ""
    port(tmp_path, "mlx5_0", "1", "1: DOWN\n")
    (tmp_path / "mlx5_0" / "ports" / "2").mkdir()
    port(tmp_path, "mlx5_1", "1", struct.pack("B", 0xFF))
    assert rdma_port(str(tmp_path)) == ""
    port(tmp_path, "mlx5_2", "1", "2: INIT\n")
    port(tmp_path, "mlx5_2", "2", "4: ACTIVE\n")
    assert rdma_port(str(tmp_path)) == "mlx5_2/2"
