"""Feed mutated inputs to decoders and judge what comes of it.

An input is bad if the decoder raises anything but its typed errors (a Rust panic too, which is no
`Exception`), if what it accepts breaks its own rules, or if it takes memory out of all proportion.
Time is shown, not judged: inputs are bounded, and a slow machine is no defect.
"""

import random
import time
import tracemalloc
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from tests.fuzz.decoders import DECODERS, Decoder
from tests.fuzz.mutations import blind, bombs, structured

MAX_EXAMPLES = 3
MEMORY_BASE = 1 << 20
MEMORY_PER_BYTE = 1024
"""Python's own objects take tens of bytes for one of input; a length that is believed, millions."""


@dataclass
class Result:
    name: str
    inputs: int = 0
    accepted: int = 0
    refused: int = 0
    seconds: float = 0.0
    slowest_s: float = 0.0
    kinds: Counter[str] = field(default_factory=Counter)
    bad: list[tuple[str, bytes]] = field(default_factory=list)
    """Why, and the first few inputs of each kind."""

    def judge(self, decoder: Decoder, data: bytes) -> None:
        self.inputs += 1
        began = time.perf_counter()
        problem = self._try(decoder, data)
        took = time.perf_counter() - began
        self.seconds += took
        self.slowest_s = max(self.slowest_s, took)
        if problem:
            self.spoil(problem, data)

    def spoil(self, problem: str, data: bytes) -> None:
        kind = problem.partition(":")[0]
        self.kinds[kind] += 1
        if self.kinds[kind] <= MAX_EXAMPLES:
            self.bad.append((problem, data))

    def _try(self, decoder: Decoder, data: bytes) -> str:
        try:
            value = decoder.decode(data)
        except decoder.allowed:
            self.refused += 1
            return ""
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # noqa: BLE001  a Rust panic is no Exception
            return f"{type(error).__name__}: {error}"
        self.accepted += 1
        try:
            decoder.check(value)
        except Exception as error:  # noqa: BLE001
            return f"accepted {type(error).__name__}: {error}"
        return ""


def inputs_of(decoder: Decoder, rng: random.Random) -> Iterator[bytes]:
    """Without end: half of them keep the structure, where there is one."""
    corpus = decoder.corpus()
    while True:
        data = rng.choice(corpus)
        made = structured(data, decoder.form, rng) if rng.random() < 0.5 else None
        yield blind(data, rng, corpus) if made is None else made


def fuzz(decoder: Decoder, *, seed: int, count: int = 0, seconds: float = 0.0) -> Result:
    """So many inputs, or for so long. The corpus itself comes first and must be accepted."""
    result = Result(decoder.name)
    for data in decoder.corpus():
        refused = result.refused
        result.judge(decoder, data)
        if result.refused > refused:
            result.spoil("refused: what our own encoders made", data)
    rng = random.Random(f"{decoder.name}/{seed}")
    until = time.monotonic() + seconds
    for data in inputs_of(decoder, rng):
        if result.inputs >= count if count else time.monotonic() >= until:
            return result
        result.judge(decoder, data)
    return result


def hungry(decoder: Decoder) -> list[str]:
    """Bombs that made the decoder take more than their size can explain."""
    found = []
    tracemalloc.start()
    try:
        for data in (bomb for valid in decoder.corpus()[:4] for bomb in bombs(valid)):
            tracemalloc.reset_peak()
            before = tracemalloc.get_traced_memory()[0]
            Result(decoder.name).judge(decoder, data)
            took = tracemalloc.get_traced_memory()[1] - before
            if took > MEMORY_BASE + MEMORY_PER_BYTE * len(data):
                found.append(f"{took} bytes for {len(data)}: {data[:40]!r}")
    finally:
        tracemalloc.stop()
    return found


def select(only: str) -> list[Decoder]:
    """Those whose name contains one of the words; all without any."""
    words = [word for word in only.replace(",", " ").split() if word]
    return [d for d in DECODERS if not words or any(word in d.name for word in words)]
