"""Which network interface has a host's address, from what Linux tells without any library.

Left to itself, UCX spreads one transfer over every interface that is up, the loopback included.
Knows nothing of UCX or NIXL.
"""

import array
import fcntl
import ipaddress
import os
import socket
import struct
from typing import Final

Address = ipaddress.IPv4Address | ipaddress.IPv6Address

_SIOCGIFCONF: Final = 0x8912
_ENTRY_BYTES: Final = 40
"""One `struct ifreq` on a 64-bit machine: a name of 16 bytes, then a `struct sockaddr`."""
_MAX_ENTRIES: Final = 1024


def interface_of(host: str) -> str:
    """The interface whose address `host` is; empty for a wildcard, for an address that is not ours,
    and on a machine with RDMA devices (the one name would shut them out)."""
    if not host or _has_rdma():
        return ""
    try:
        text = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0][4][0]
        address = ipaddress.ip_address(str(text).partition("%")[0])
    except (OSError, ValueError):
        return ""
    if address.is_unspecified:
        return ""
    if address.is_loopback:
        return "lo" if "lo" in _names() else ""
    return _addresses().get(address, "")


def _has_rdma(root: str = "/sys/class/infiniband") -> bool:
    try:
        return bool(os.listdir(root))
    except OSError:
        return False


def _names() -> list[str]:
    return [name for _, name in socket.if_nameindex()]


def _addresses() -> dict[Address, str]:
    return _v4_addresses() | _v6_addresses()


def _v4_addresses() -> dict[Address, str]:
    """Second addresses of one interface included, which have a name of their own ("eth0:1")."""
    buffer = array.array("B", bytes(_MAX_ENTRIES * _ENTRY_BYTES))
    request = struct.pack("iP", len(buffer), buffer.buffer_info()[0])
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        try:
            answer = fcntl.ioctl(sock, _SIOCGIFCONF, request)
        except OSError:
            return {}
    num_bytes = struct.unpack("iP", answer)[0]
    found: dict[Address, str] = {}
    for start in range(0, num_bytes, _ENTRY_BYTES):
        entry = buffer[start : start + _ENTRY_BYTES].tobytes()
        name = entry[:16].split(b"\0")[0].decode().partition(":")[0]
        found[ipaddress.IPv4Address(entry[20:24])] = name
    return found


def _v6_addresses() -> dict[Address, str]:
    try:
        with open("/proc/net/if_inet6", encoding="ascii") as file:
            lines = [line.split() for line in file]
    except OSError:
        return {}
    return {ipaddress.IPv6Address(bytes.fromhex(fields[0])): fields[-1] for fields in lines}
