"""What `baton up` refuses before it starts anything."""

import argparse
import asyncio
import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from baton.up import UpOptions, run_up
from protocol.errors import ConfigError


def options(state: Path, port: int, *settings: str) -> UpOptions:
    given = {"prefill": 1, "decode": 1, "both": 0, "engine": "simulated", "model": ""}
    more = {"state_dir": str(state), "port": port, "host": "127.0.0.1", "transfer": "auto"}
    logs = {"log_level": "info", "log_format": "text"}
    return UpOptions.of(argparse.Namespace(**given, **more, **logs, set=settings))


async def test_a_taken_port_is_said_before_anything_starts(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"cannot listen on 127.0.0.1:{port}"):
            await run_up(options(tmp_path, port), asyncio.Event(), asyncio.Event())
    assert not (tmp_path / "processes.json").exists()


def test_a_second_fleet_in_the_same_folder_is_refused(tmp_path: Path) -> None:
    wait = "import sys; print('up', flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", wait, f"--data-dir={tmp_path}/etcd"]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe) as living:
        assert living.stdout is not None
        assert living.stdout.readline() == b"up\n"  # before that /proc may not show its arguments
        entry = {"name": "etcd", "role": "etcd", "pid": living.pid, "port": 1, "log": ""}
        (tmp_path / "processes.json").write_text(json.dumps([entry]))
        with pytest.raises(ConfigError, match=f"etcd .pid {living.pid}. of another fleet"):
            asyncio.run(run_up(options(tmp_path, 0), asyncio.Event(), asyncio.Event()))
        assert living.stdin is not None
        living.stdin.close()


def test_settings_are_for_a_role_or_for_one_worker(tmp_path: Path) -> None:
    given = options(tmp_path, 1, "decode.lease_ms=1", "decode-0.url=http://x").settings
    assert given == (("decode", "lease_ms", "1"), ("decode-0", "url", "http://x"))
    for wrong in ("decode-1.url=x", "nats.url=x", "decode-0.url", "decode-0"):
        with pytest.raises(ConfigError, match=r"expected ROLE\.NAME=VALUE"):
            options(tmp_path, 1, wrong)
