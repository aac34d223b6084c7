"""A prefill engine in a process of its own: `python -m tests.gpu.prefill_peer FOLDER DEVICE DTYPE`.

Prefills a prompt of each length, prints one line for each (the first token and the handle, in hex)
and keeps the blocks until its input ends.
"""

import asyncio
import os
import sys
from array import array
from pathlib import Path

import msgspec

from tests.unit.worker.engine_world import new_key
from tests.unit.worker.model_families import LENGTHS, NUM_TOKENS
from tests.unit.worker.tiny_llama import prompt_of, running, sampling_of
from worker.engine.base import PrefillJob
from worker.transfer.nixl import NixlTransfer


async def serve(folder: str, device: str, dtype: str) -> None:
    transfer = NixlTransfer(agent_name=f"prefill.{os.getpid()}")
    async with running(
        Path(folder), transfers=[transfer], worker="p", device=device, dtype=dtype
    ) as world:
        for length in LENGTHS:
            prompt = array("I", prompt_of(length, salt=4))
            key = new_key()
            world.stepper.submit(PrefillJob(key, "choice/0", prompt, sampling_of(NUM_TOKENS)))
            result = (await world.recorder.over(key)).prefilled
            assert result is not None
            assert result.first is not None
            print(result.first.ids[0], msgspec.msgpack.encode(result.handle).hex(), flush=True)
        await asyncio.to_thread(sys.stdin.read)


if __name__ == "__main__":
    asyncio.run(serve(*sys.argv[1:]))
