"""Where torch computes, and a KV arena in the memory of a GPU.

On a GPU work is queued: a call returns before its kernels have run. Transports and the lease words
know nothing of that queue, so whoever hands blocks to them has to `settle` it first. It knows no
model.
"""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Final

import torch
from torch import Tensor

from protocol.errors import ConfigError, LocalError
from worker.kv.arena import Arena

_NAME: Final = re.compile(r"cpu|cuda(:\d{1,4})?", re.ASCII)
_REACHES_GPU: Final = frozenset({"nixl"})
"""Transports that move what is in a GPU's memory."""


def open_device(name: str) -> torch.device:
    """`cpu`, `cuda` (the first GPU) or `cuda:N`. Raises ConfigError if it is not there."""
    if not _NAME.fullmatch(name):
        raise ConfigError(f"device {name!r} is none of cpu, cuda and cuda:N")
    device = torch.device(name)
    if device.type == "cpu":
        return device
    if torch.version.cuda is None:
        raise ConfigError(f"device {name}: this build of torch ({torch.__version__}) has no CUDA")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count == 0:
        raise ConfigError(f"device {name}: torch finds no usable GPU")
    index = device.index or 0
    if index >= count:
        raise ConfigError(f"device {name}: the highest of the {count} GPUs is cuda:{count - 1}")
    return torch.device("cuda", index)


def settle(device: torch.device) -> None:
    """Return when all that this thread has queued is complete: what was to be read from the arena
    has been read, and what was to be written can be seen by everybody."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()


def check_transports(device: torch.device, names: Sequence[str]) -> None:
    """Raises ConfigError if one of these cannot reach the device's memory."""
    unfit = sorted(set(names) - _REACHES_GPU)
    if device.type == "cuda" and unfit:
        raise ConfigError(
            f"device {device}: the {unfit[0]} transfer moves host memory only, KV in a GPU's "
            f"memory needs nixl"
        )


@contextmanager
def allocating(device: torch.device) -> Iterator[None]:
    """A device with too little memory is the operator's business: ConfigError, in one line."""
    try:
        yield
    except torch.cuda.OutOfMemoryError as error:
        reason = str(error).split(". ")[0]
        raise ConfigError(f"device {device} has not enough memory: {reason}") from None


class DeviceArena(Arena):
    """An arena in a GPU's memory: processes on this host cannot map it, transports get its address.

    Needs memory from `cudaMalloc`, not `expandable_segments`: other processes open it by handle.
    """

    kind = "cuda"

    def __init__(self, num_blocks: int, block_bytes: int, device: torch.device) -> None:
        """Zeroed. Raises ConfigError if the device has not so much."""
        if num_blocks < 1 or block_bytes < 1:
            raise LocalError(f"an arena of {num_blocks} blocks of {block_bytes} bytes")
        self.num_blocks = num_blocks
        self.block_bytes = block_bytes
        self.nbytes = num_blocks * block_bytes
        self.device = device.index or 0
        self.fd = -1
        self.memory = memoryview(b"")
        with allocating(device):
            self.bytes: Tensor | None = torch.zeros(self.nbytes, dtype=torch.uint8, device=device)
        self.address = self.bytes.data_ptr()
        settle(device)

    def block(self, index: int) -> memoryview:
        raise LocalError(f"block {index} is in a GPU's memory")

    def close(self) -> None:
        """Let go of the memory, which lives as long as any tensor over it. Repeats do nothing."""
        self.bytes = None


def bytes_of(arena: Arena) -> Tensor:
    """All of the arena as one tensor of bytes, which keeps the memory alive."""
    if not isinstance(arena, DeviceArena):
        return torch.frombuffer(arena.memory[:], dtype=torch.uint8)
    if arena.bytes is None:
        raise LocalError("the arena is closed")
    return arena.bytes
