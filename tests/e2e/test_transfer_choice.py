"""Which transport a pair of workers uses and why: what `auto` finds, what a TensorRT-LLM file asks
for, and where an operator reads it."""

import re
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.fleet import Fleet
from tests.e2e.streams import asks, check_exact, start_streams
from worker.transfer.nixl import nixl_unavailable

pytestmark = [pytest.mark.xdist_group("transfer choice"), pytest.mark.timeout(90)]

BACKEND = "SHM" if nixl_unavailable() else "NIXL"
FILE = f"""
tensor_parallel_size: 1
kv_cache_config: {{free_gpu_memory_fraction: 0.5}}
max_batch_size: 64
cache_transceiver_config:
  backend: {BACKEND}
  max_tokens_in_buffer: 64
  kv_transfer_timeout_ms: 20000
  kv_transfer_sender_future_timeout_ms: 1000
"""


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    folder = tmp_path_factory.mktemp("chosen")
    settings = ("worker.metrics_port=-1", "worker.sim_step_ms=1")
    with Fleet(folder, settings=settings) as fleet:
        file = folder / "trtllm.yaml"
        file.write_text(FILE)
        fleet.add_worker("by-file", "decode", f"--config={file}", "--sim-step-ms=1")
        yield fleet


def pairs(fleet: Fleet) -> dict[str, dict[str, Any]]:
    """By sink."""
    return {pair["to"]: pair for pair in fleet.cluster_info()["kv_transfers"]}


def test_every_pair_says_what_it_uses_and_long_prompts_are_never_refused(fleet: Fleet) -> None:
    """Each prompt is many times `max_tokens_in_buffer`: pulled alone, one after the other."""
    for number in range(5):
        wanted = asks(8, 40, kind=f"round {number}", prompt=1_000)
        check_exact(start_streams(fleet, wanted))
        if len(pairs(fleet)) == 2:
            break
    found = pairs(fleet)
    assert found["by-file"]["transport"] == BACKEND.lower()
    assert found["by-file"]["reason"] == "asked for"
    assert found["decode-0"]["transport"] in ("shm", "nixl")
    assert found["decode-0"]["reason"].startswith("auto")
    assert all(pair["from"] == "prefill-0" and pair["bytes"] > 0 for pair in found.values())


def test_the_reasons_are_in_cluster_info_logs_and_metrics(fleet: Fleet) -> None:
    check_exact(start_streams(fleet, asks(8, 5, kind="again", prompt=1_000)))
    reasons = fleet.worker("decode-0")["transport_reasons"]
    assert set(reasons) == {"nixl", "shm", "tcp", "ucx"}
    assert reasons["tcp"] == "auto"
    assert fleet.worker("by-file")["transports"] == [BACKEND.lower()]
    log = fleet.process("decode-0").log.read_text()
    assert log.count("kv from=prefill-0 transport=") == 1
    said = fleet.process("by-file").log.read_text()
    assert said.count("without effect here: kv_cache_config, tensor_parallel_size") == 1
    assert said.count("without effect here: kv_transfer_sender_future_timeout_ms") == 1
    scraped = metrics(fleet.process("decode-0").log)
    assert re.search(
        r'baton_kv_transfer_available{.*reason="auto",.*transport="tcp",.*} 1.0', scraped
    )
    assert re.search(
        r'baton_kv_transfer_pairs{.*source="prefill-0",transport="\w+".*} 1.0', scraped
    )


def metrics(log: Path) -> str:
    """Of the worker that writes this log."""
    url = re.findall(r"metrics url=(\S+)", log.read_text())[-1]
    with urllib.request.urlopen(url, timeout=5.0) as answer:
        return str(answer.read().decode())
