"""KV pulled from another process's arena into ours, both on the device of `BATON_TEST_DEVICE`."""

import asyncio
import os
import sys
from array import array
from pathlib import Path
from typing import NamedTuple

import msgspec
import pytest
import torch

from protocol.handoff import KvHandle
from tests.unit.worker.engine_world import new_key
from tests.unit.worker.model_families import FAMILIES, LENGTHS, NUM_TOKENS, check_greedy
from tests.unit.worker.tiny_llama import TorchWorld, make_model, prompt_of, running, sampling_of
from worker.engine.base import DecodeJob
from worker.transfer.nixl import NixlTransfer

DEVICE = os.environ["BATON_TEST_DEVICE"]


class Prefilled(NamedTuple):
    first: int
    handle: KvHandle


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3"])
async def test_a_pull_between_two_processes(tmp_path: Path, family: str, dtype: str) -> None:
    folder = make_model(tmp_path, **FAMILIES[family])
    peer = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "tests.gpu.prefill_peer", str(folder), DEVICE, dtype,
        stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
    )  # fmt: skip
    assert peer.stdin is not None
    assert peer.stdout is not None
    try:
        prefilled = await _read(peer.stdout)
        transfer = NixlTransfer(agent_name=f"decode.{os.getpid()}.{family}.{dtype}")
        async with running(
            folder, transfers=[transfer], worker="d", device=DEVICE, dtype=dtype
        ) as world:
            found = await _decode(world, prefilled)
            assert world.stepper.stats().prefilled_tokens <= len(LENGTHS)
        for length, answer in zip(LENGTHS, found, strict=True):
            check_greedy(folder, getattr(torch, dtype), prompt_of(length, salt=4), answer)
        peer.stdin.close()
        assert await asyncio.wait_for(peer.wait(), 60) == 0
    finally:
        if peer.returncode is None:
            peer.kill()
            await peer.wait()


async def _read(lines: asyncio.StreamReader) -> list[Prefilled]:
    """One for each length. Other lines are the libraries' chatter."""
    found: list[Prefilled] = []
    async with asyncio.timeout(120):
        while len(found) < len(LENGTHS):
            line = await lines.readline()
            assert line, "the peer ended"
            first, _, handle = line.decode().strip().partition(" ")
            if first.isdigit():
                decoded = msgspec.msgpack.decode(bytes.fromhex(handle), type=KvHandle)
                found.append(Prefilled(int(first), decoded))
    return found


async def _decode(world: TorchWorld, prefilled: list[Prefilled]) -> list[list[int]]:
    keys = []
    for length, (first, handle) in zip(LENGTHS, prefilled, strict=True):
        prompt = array("I", prompt_of(length, salt=4))
        keys.append(new_key())
        world.stepper.submit(
            DecodeJob(keys[-1], "c/0", prompt, sampling_of(NUM_TOKENS), handle, [first])
        )
    answers = []
    for key, (first, _) in zip(keys, prefilled, strict=True):
        attempt = await world.recorder.over(key)
        assert attempt.failed is None
        assert attempt.decoding is not None
        assert attempt.decoding.transport == "nixl"
        answers.append([first, *attempt.ids])
    return answers
