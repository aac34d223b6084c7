"""What vLLM's own words about itself mean, and what a broken or foreign one is told."""

import asyncio
import errno
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import aiohttp
import msgspec
import pytest

from protocol.errors import ConfigError
from protocol.handoff import KvHandle
from worker.engine.vllm.client import VllmError, _translated
from worker.engine.vllm.facts import (
    Metrics,
    ServedModel,
    model_digest,
    read_metrics,
    read_models,
)
from worker.engine.vllm.handles import MAX_LENT, LentHandles
from worker.engine.vllm.watch import Verdict, Watch

METRICS = """# HELP vllm:num_requests_running Number of requests
vllm:num_requests_running{engine="0",model_name="m"} 3.0
vllm:num_requests_running{engine="1",model_name="m"} 2.0
vllm:num_requests_running_created{engine="0",model_name="m"} 9.0
vllm:num_requests_waiting{engine="0",model_name="m"} 4.0
vllm:kv_cache_usage_perc{engine="0",model_name="m"} 0.5
vllm:iteration_tokens_total_count{engine="0",model_name="m"} 10.0
vllm:iteration_tokens_total_count{engine="1",model_name="m"} 7.0
vllm:cache_config_info{block_size="16",cache_dtype="fp8",engine="0",num_gpu_blocks="50"} 1.0
vllm:cache_config_info{block_size="16",cache_dtype="fp8",engine="1",num_gpu_blocks="50"} 1.0
process_start_time_seconds 1.5e9
"""


def test_metrics_of_two_engines_are_summed() -> None:
    found = read_metrics(METRICS)
    assert (found.running, found.waiting, found.iterations) == (5, 4, 17)
    assert (found.block_size, found.cache_dtype, found.num_blocks) == (16, "fp8", 50)
    assert (found.kv_usage, found.started_at, found.has_connector) == (0.5, 1.5e9, False)


@pytest.mark.parametrize(
    ("line", "instead"),
    [
        ('num_gpu_blocks="50"', 'num_gpu_blocks="None"'),
        ('block_size="16"', 'block_size="0"'),
        ("} 3.0", "} NaN"),
        ("} 10.0", "} +Inf"),
        ("} 4.0", "} four"),
        ("vllm:cache_config_info", "vllm:other"),
    ],
)
def test_metrics_that_make_no_sense_are_a_value_error(line: str, instead: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        read_metrics(METRICS.replace(line, instead))


def models(*entries: dict[str, Any]) -> bytes:
    return msgspec.json.encode({"object": "list", "data": list(entries)})


BASE = {"id": "base", "root": "/m", "max_model_len": 100, "parent": None}
ADAPTER = {"id": "lora", "root": "/l", "max_model_len": 100, "parent": "base"}


def test_the_first_model_that_is_no_adapter_is_driven() -> None:
    assert read_models(models(ADAPTER, BASE), "lora", "http://v").id == "base"
    other = {**BASE, "id": "second"}
    assert read_models(models(BASE, other), "second", "http://v").id == "second"
    assert read_models(models(BASE, other), "unknown", "http://v").id == "base"


@pytest.mark.parametrize(
    "body",
    [
        b"<html>",
        b"{}",
        models(),
        models(ADAPTER),
        models({"id": "gpt"}),
        models({**BASE, "max_model_len": None}),
    ],
)
def test_another_server_is_named_as_such(body: bytes) -> None:
    with pytest.raises(ConfigError, match="http://v/v1/models"):
        read_models(body, "", "http://v")


@pytest.mark.parametrize(
    ("number", "fault"),
    [
        (errno.ECONNREFUSED, "gone"),
        (None, "gone"),
        (errno.EMFILE, "silent"),
        (errno.EHOSTUNREACH, "silent"),
    ],
)
def test_only_who_refuses_is_gone(number: int | None, fault: str) -> None:
    """Our own trouble and the network's is no word about the server."""
    where = SimpleNamespace(host="h", port=1, ssl=False)
    error = OSError(number, "why") if number else OSError("several errors")
    with pytest.raises(VllmError) as caught, _translated("http://v"):
        raise aiohttp.ClientConnectorError(where, error)  # type: ignore[arg-type]
    assert caught.value.fault == fault


def test_a_name_that_is_not_found_is_no_death() -> None:
    where = SimpleNamespace(host="h", port=1, ssl=False)
    with pytest.raises(VllmError) as caught, _translated("http://v"):
        raise aiohttp.ClientConnectorDNSError(where, OSError(-3, "later"))  # type: ignore[arg-type]
    assert caught.value.fault == "silent"


def test_the_digest_is_of_all_that_vllm_says_and_of_the_weights(tmp_path: Path) -> None:
    model = ServedModel("base", "somebody/model", 100)
    metrics = read_metrics(METRICS)

    def digest(
        model: ServedModel = model,
        metrics: Metrics = metrics,
        version: str = "0.32.0",
        config: bytes = b"{}",
    ) -> str:
        return model_digest(model, metrics, version, tmp_path, config)

    plain = digest()
    renamed = msgspec.structs.replace(model, id="a name is no difference")
    assert digest(renamed) == plain
    others = {
        digest(msgspec.structs.replace(model, root="somebody/else")),
        digest(metrics=replace(metrics, block_size=32)),
        digest(metrics=replace(metrics, cache_dtype="auto")),
        digest(version="0.33.0"),
        digest(config=b"{ }"),
    }
    for content in (b"weights", b"w3ights"):
        (tmp_path / "model.safetensors").write_bytes(content)
        others.add(digest())
    assert len(others - {plain}) == 7
    moved = msgspec.structs.replace(model, root="/another/path")
    assert digest(moved) == digest(), "equal weights are one model wherever they lie"


async def test_our_own_standstill_is_no_silence_of_the_server() -> None:
    now = [0.0]

    class Broken:
        async def get(self, path: str, *, timeout_s: float) -> bytes:
            await asyncio.sleep(0)
            raise VllmError("silent", "no answer in time")

    broken: Any = Broken()
    metrics = read_metrics(METRICS)
    watch = Watch(broken, metrics, clock=lambda: now[0], is_busy=lambda: False)
    now[0] = 60.0  # we did not run: one look's time is all that counts
    assert (await watch.look()).silent == ""
    assert not watch.is_silent
    for _ in range(2):
        now[0] += 2.5
        assert (await watch.look()).silent == ""
    assert watch.is_silent
    now[0] += 2.5
    assert "silent for 10.0 s" in (await watch.look()).silent
    watch.moved()
    assert not watch.is_silent


async def test_who_answers_and_computes_nothing_is_given_up_in_the_end() -> None:
    now, owes, body = [0.0], [True], [METRICS]

    class Lively:
        async def get(self, path: str, *, timeout_s: float) -> bytes:
            await asyncio.sleep(0)
            return body[0].encode()

    lively: Any = Lively()
    watch = Watch(lively, read_metrics(METRICS), clock=lambda: now[0], is_busy=lambda: owes[0])

    async def look(seconds: float) -> Verdict:
        verdict = Verdict()
        until = now[0] + seconds
        while now[0] < until and not verdict.silent:
            now[0] += 0.5
            verdict = await watch.look()
        return verdict

    assert (await look(59.0)).silent == ""
    body[0] = METRICS.replace("} 10.0", "} 11.0")
    assert (await look(0.5)).moved
    assert (await look(59.0)).silent == "", "an iteration begins the count anew"
    watch.moved()
    assert (await look(59.0)).silent == "", "and so does a token"
    owes[0] = False
    assert (await look(90.0)).silent == "", "nothing is owed"
    owes[0] = True
    assert "computed nothing for 60.0 s" in (await look(61.0)).silent
    assert watch.steps > 0


def handle(number: int) -> KvHandle:
    return KvHandle(f"h{number}", "w", "i", 33, 16, b"", 30.0, [])


def test_lent_handles_end_with_their_lease_and_never_pile_up() -> None:
    lent = LentHandles(lease_s=10.0, block_size=16)
    for number in range(MAX_LENT + 5):
        lent.lend(handle(number), now=number / MAX_LENT)
    assert len(lent) == MAX_LENT
    lent.release(["h0", "h9", "unknown"])
    assert (lent.num_released, lent.num_blocks) == (1, 3 * (MAX_LENT - 1))
    lent.expire(9.9)
    assert lent.num_expired == 0
    lent.expire(12.0)
    assert (len(lent), lent.num_expired) == (0, MAX_LENT - 1)
