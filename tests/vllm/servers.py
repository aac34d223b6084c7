"""One prefill and one decode vLLM on the demo model, as process groups of their own.

They compute on the CPU in float32 and hand KV over with NIXL. An idle one spins (NIXL's progress
thread), so they are nice, and there are never more than two.
"""

import json
import os
import re
import signal
import subprocess
import time
import urllib.request
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from baton.demo import demo_model_folder
from tests.contract.nats_server import free_port

READY_S = 240.0
BLOCK_SIZE = 32
_ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
    "VLLM_HOST_IP": "127.0.0.1",
    "GLOO_SOCKET_IFNAME": "lo",
    "UCX_TLS": "tcp,sm,self,cma",
    "UCX_NET_DEVICES": "lo",
    "VLLM_NIXL_SIDE_CHANNEL_HOST": "127.0.0.1",
}


@dataclass
class VllmServer:
    """`stop` leaves none of its processes behind, also after a test has killed some."""

    role: Literal["prefill", "decode"]
    folder: Path
    port: int = field(default_factory=free_port)
    side_port: int = field(default_factory=free_port)
    events_port: int = field(default_factory=free_port)
    replay_port: int = field(default_factory=free_port)
    process: "subprocess.Popen[bytes] | None" = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def flags(self) -> list[str]:
        """For the Baton worker beside it."""
        return [
            "--engine=vllm",
            f"--url={self.url}",
            # it shares the cores with everything else here
            "--engine-silence-ms=20000",
            f"--kv-events-url=tcp://127.0.0.1:{self.events_port}",
            f"--kv-replay-url=tcp://127.0.0.1:{self.replay_port}",
        ]

    def start(self) -> None:
        transfer = {
            "kv_connector": "NixlConnector",
            "kv_role": "kv_producer" if self.role == "prefill" else "kv_consumer",
            "kv_buffer_device": "cpu",
        }
        if self.role == "decode":
            transfer["kv_load_failure_policy"] = "fail"
        events = {
            "enable_kv_cache_events": True,
            "publisher": "zmq",
            "endpoint": f"tcp://*:{self.events_port}",
            "replay_endpoint": f"tcp://127.0.0.1:{self.replay_port}",
        }
        command = [
            *("nice", "-n", "5", os.environ["BATON_VLLM_PYTHON"], "-m"),
            "vllm.entrypoints.openai.api_server",
            *("--model", str(demo_model_folder()), "--served-model-name", "demo"),
            *("--host", "127.0.0.1", "--port", str(self.port), "--dtype", "float32"),
            *("--enforce-eager", "--max-model-len", "4096", "--max-num-seqs", "16"),
            *("--block-size", str(BLOCK_SIZE), "--disable-uvicorn-access-log"),
            *("--kv-transfer-config", json.dumps(transfer)),
            *("--kv-events-config", json.dumps(events)),
        ]
        environment = {**os.environ, **_ENVIRONMENT}
        environment["VLLM_NIXL_SIDE_CHANNEL_PORT"] = str(self.side_port)
        with (self.folder / f"vllm-{self.role}.log").open("ab") as log:
            self.process = subprocess.Popen(
                command, env=environment, stdout=log, stderr=log, start_new_session=True
            )

    def until_ready(self) -> None:
        deadline = time.monotonic() + READY_S
        while time.monotonic() < deadline:
            assert self.process is not None
            assert self.process.poll() is None, self.log()
            if self._is_healthy():
                return
            time.sleep(0.5)
        raise AssertionError(f"vLLM {self.role} is not ready after {READY_S} s\n{self.log()}")

    def warm_up(self) -> None:
        """The first requests of a fresh server compile for up to minutes."""
        for extra in ({}, {"logprobs": 2}, {"prompt_logprobs": 1}):
            body = {"model": "demo", "prompt": [5, 6, 7], "max_tokens": 2, **extra}
            request = urllib.request.Request(
                f"{self.url}/v1/completions",
                json.dumps(body).encode(),
                {"content-type": "application/json"},
            )
            with urllib.request.urlopen(request, timeout=READY_S) as response:
                assert response.status == 200

    def _is_healthy(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=2.0) as response:
                return bool(response.status == 200)
        except OSError:
            return False

    def signal(self, number: signal.Signals) -> None:
        """To all of its processes: front, engine core, worker."""
        assert self.process is not None
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)

    def stop(self) -> None:
        if self.process is not None:
            self.signal(signal.SIGKILL)
            self.process.wait()
            self.process = None

    def metric(self, name: str, **labels: str) -> float:
        """Sum over the samples that have these labels."""
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=10.0) as response:
            text = response.read().decode()
        total = 0.0
        for found, value in re.findall(rf"^{re.escape(name)}(?:{{(.*)}})? (\S+)$", text, re.M):
            if all(f'{key}="{wanted}"' in found for key, wanted in labels.items()):
                total += float(value)
        return total

    def log(self) -> str:
        return (self.folder / f"vllm-{self.role}.log").read_text(errors="replace")[-6000:]
