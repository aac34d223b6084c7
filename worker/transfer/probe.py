"""What this machine lets one process do to another's memory, tried and not assumed.

`process_vm_readv` (CMA) may be missing, filtered (seccomp), or denied (Yama's ptrace scope, another
user, another pid namespace). Who may read whom is a matter of the pair, so there are two questions:
can a process of ours that is not an ancestor read us at all (`cma_unavailable`, asked once), and
can we read that source (`read_foreign`, asked by `fabric_pairs`). Also: is there an RDMA port.

Standard library only, and runnable by its path: a child of `cma_unavailable` runs this very file.
Knows no transport.
"""

import ctypes
import errno
import os
import subprocess
import sys
from collections.abc import Mapping
from typing import Final

_KNOWN: Final = b"baton tries to read this memory."
_PR_SET_PTRACER: Final = 0x59616D61
_TRY_S: Final = 10.0
_CMA_NAMES: Final = frozenset({"cma", "sm", "shm"})
"""What UCX_TLS calls it: by name, or with all of shared memory."""
_RDMA_NAMES: Final = frozenset(
    (
        *("ib", "srd", "rc", "rc_v", "rc_x", "rc_verbs", "rc_mlx5", "ud", "ud_v", "ud_x"),
        *("ud_verbs", "ud_mlx5", "dc", "dc_x", "dc_mlx5"),
    )
)


class _IoVec(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("nbytes", ctypes.c_size_t))


def read_foreign(pid: int, address: int, nbytes: int) -> bytes:
    """`nbytes` of another process's memory, copied by the kernel; the process does nothing and may
    be frozen. Raises OSError: EPERM (not allowed), ESRCH (gone), EFAULT (nothing there), ENOSYS."""
    readv = getattr(ctypes.CDLL(None, use_errno=True), "process_vm_readv", None)
    if readv is None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    readv.restype = ctypes.c_ssize_t
    buffer = ctypes.create_string_buffer(nbytes)
    local = _IoVec(ctypes.addressof(buffer), nbytes)
    remote = _IoVec(address, nbytes)
    one, none = ctypes.c_ulong(1), ctypes.c_ulong(0)
    copied = readv(pid, ctypes.byref(local), one, ctypes.byref(remote), one, none)
    if copied < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return buffer.raw[:copied]


def cma_unavailable(environ: Mapping[str, str]) -> str:
    """Why NIXL could not copy between processes of one host by CMA; empty if it could.

    A child reads us: who reads an ancestor has no more rights than a stranger of the same user
    (reading a child, or oneself, proves nothing). Takes some 50 ms.
    """
    if not allows_cma(environ):
        return f"UCX_TLS={environ['UCX_TLS']} leaves it out"
    if not sys.platform.startswith("linux"):
        return "needs Linux"
    memory = ctypes.create_string_buffer(_KNOWN, len(_KNOWN))
    try:
        said = _ask_child(ctypes.addressof(memory))
    except (OSError, subprocess.SubprocessError) as error:
        return f"could not be tried: {error}"
    return "" if said == _KNOWN.decode() else said or "the process that tried it died"


def _ask_child(address: int) -> str:
    child = subprocess.Popen(
        [sys.executable, "-I", "-S", os.path.abspath(__file__)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    with child:
        # Where Yama allows descendants only, UCX lets everybody read it; so do we, for the try.
        _let_read(child.pid)
        try:
            said, _ = child.communicate(f"{os.getpid()} {address}\n", timeout=_TRY_S)
        except BaseException:
            child.kill()
            raise
        finally:
            _let_read(0)
    return said.strip()


def _let_read(pid: int) -> None:
    """Does nothing where there is no Yama."""
    prctl = getattr(ctypes.CDLL(None), "prctl", None)
    if prctl is not None:
        zero = ctypes.c_ulong(0)
        prctl(_PR_SET_PTRACER, ctypes.c_ulong(pid), zero, zero, zero)


def allows_cma(environ: Mapping[str, str]) -> bool:
    """UCX_TLS lets UCX use it."""
    return _allows(environ, _CMA_NAMES, all_of=frozenset())


def allows_rdma(environ: Mapping[str, str]) -> bool:
    return _allows(environ, _RDMA_NAMES, all_of=frozenset({"rc", "ud", "dc"}))


def _allows(environ: Mapping[str, str], names: frozenset[str], *, all_of: frozenset[str]) -> bool:
    """`^a,b` is all but these; otherwise only what is listed. `all_of` empty: one exclusion is
    enough; else `ib`, or all of them."""
    text = environ.get("UCX_TLS", "").strip().lower() or "all"
    listed = {name.strip() for name in text.removeprefix("^").split(",")}
    if not text.startswith("^"):
        return "all" in listed or bool(listed & names)
    if all_of:
        return "ib" not in listed and not all_of <= listed
    return not listed & names


def rdma_port(root: str = "/sys/class/infiniband") -> str:
    """The first active port, as `device/port`; empty if there is none."""
    for device in _listed(root):
        for port in _listed(f"{root}/{device}/ports"):
            try:
                with open(f"{root}/{device}/ports/{port}/state", encoding="ascii") as file:
                    if "ACTIVE" in file.read().split():
                        return f"{device}/{port}"
            except (OSError, UnicodeDecodeError):
                continue
    return ""


def _listed(path: str) -> list[str]:
    try:
        return sorted(os.listdir(path))
    except OSError:
        return []


def _answer_parent() -> None:
    """In the child: what stands at that address, or why it cannot be read."""
    pid, address = map(int, sys.stdin.readline().split())
    try:
        said = read_foreign(pid, address, len(_KNOWN)).decode("ascii", "replace")
    except OSError as error:
        said = f"process_vm_readv: {error.strerror}"
    sys.stdout.write(said + "\n")


if __name__ == "__main__":
    _answer_parent()
