"""`baton bench paths`: what the router's own code costs per token and per request, beside what
nobody could save; in one process, without sockets, quick enough to be a test.

Absolute times say little: machines differ, and one machine changes its pace within seconds. So each
piece of work is measured beside its floor, a few milliseconds apart, and the figure to look at is
the median of the pieces' ratios. CPU is this thread's, so a busy machine does not count either. The
garbage collector runs as it does in a router: without it the ratios are no steadier.

A token: from an envelope of bytes with a step of all streams to bytes in each stream's transport.
Its floor writes ready-made bytes of the same size to the same transports.

A request: from the body's JSON to the answer's, with both legs, all that are in flight together.
Its floor decodes the same bodies, tokenizes the same texts with the bare library, and encodes and
decodes the same messages to and from workers.
"""

import argparse
import asyncio
import json
import statistics
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import count
from typing import Final, NamedTuple

import msgspec
import tokenizers

from baton.bench.client import chat
from baton.bench.pretend_workers import PretendWorkers, packed_prompts
from baton.bench.report import Row, progress
from baton.bench.router_alone import CountingTransport, RouterAlone, router_alone
from baton.demo import demo_model_folder
from protocol.blocks import pack_ids
from protocol.bus import Message
from protocol.codec import decode_out, encode
from protocol.errors import LocalError
from protocol.jobs import JobEnvelope
from protocol.openai import ChatRequest
from text.assets import TOKENIZER_FILE, load_assets
from text.template import ChatTemplate

TITLE = (
    "CPU-µs of the router alone, without sockets; medians. floor: the same bytes, texts and "
    "messages without a router"
)
COLUMNS = {
    "router_us": "router",
    "floor_us": "floor",
    "over_us": "router - floor",
    "ratio": "router / floor",
}
STREAMS: Final = 64
INFLIGHT: Final = 32
_STEPS: Final = 20
"""Of the decode worker in a piece: two milliseconds or so."""
_WORDS: Final = "the quick brown fox jumps over the lazy dog " * 2


class Piece(NamedTuple):
    """What one piece of work cost, and its floor."""

    router_us: float
    floor_us: float


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--pieces", type=int, default=40, help="of each path in a round")


async def measure(args: argparse.Namespace, stop: asyncio.Event, rows: list[Row]) -> None:
    rows.extend(Row(case) for case in PATHS)
    for number in range(args.rounds):
        for row in rows:
            if stop.is_set():
                return
            progress(f"round {number + 1} of {args.rounds}: {row.case}")
            row.add(**figures(await PATHS[row.case](args.pieces)))


def figures(pieces: Sequence[Piece]) -> dict[str, float]:
    """The medians. A piece's own ratio is of one moment; a ratio of medians would not be."""
    return {
        "router_us": statistics.median(piece.router_us for piece in pieces),
        "floor_us": statistics.median(piece.floor_us for piece in pieces),
        "over_us": statistics.median(piece.router_us - piece.floor_us for piece in pieces),
        "ratio": statistics.median(piece.router_us / piece.floor_us for piece in pieces),
    }


class _Cpu:
    """This thread's CPU time in its blocks."""

    def __init__(self) -> None:
        self._ns = 0
        self._began = 0

    def __enter__(self) -> None:
        self._began = time.thread_time_ns()

    def __exit__(self, *_exc: object) -> None:
        self._ns += time.thread_time_ns() - self._began

    def us_each(self, number: int) -> float:
        return self._ns / 1e3 / number


# --- a token ---


async def token_pieces(number: int) -> list[Piece]:
    async with router_alone() as (router, workers):
        texts = [f"stream {i}: go on" for i in range(STREAMS)]
        transports = await router.stream(texts, max_tokens=(number + 2) * _STEPS)
        router.hear(workers.frame())  # the first token that is spliced
        before = _written(transports)
        router.hear(workers.frame())
        chunk = bytes((_written(transports) - before) // STREAMS)
        if not chunk:
            raise LocalError("no token went to its stream")
        return [_token_piece(router, workers, transports, chunk) for _ in range(number)]


def _token_piece(
    router: RouterAlone,
    workers: PretendWorkers,
    transports: Sequence[CountingTransport],
    chunk: bytes,
) -> Piece:
    ours, floor = _Cpu(), _Cpu()
    router.hear_reports()
    messages = [workers.frame() for _ in range(_STEPS)]
    before = _written(transports)
    with ours:
        for message in messages:
            router.hear(message)
    if _written(transports) - before != len(chunk) * STREAMS * _STEPS:
        raise LocalError("not every token went to its stream")
    with floor:
        for _ in range(_STEPS):
            for transport in transports:
                transport.write(chunk)
    return Piece(ours.us_each(STREAMS * _STEPS), floor.us_each(STREAMS * _STEPS))


def _written(transports: Sequence[CountingTransport]) -> int:
    return sum(transport.num_bytes for transport in transports)


# --- a request ---


@dataclass(slots=True)
class _Asked:
    """What clients ask in one piece, and the messages that it led to."""

    bodies: list[bytes]
    texts: list[str]
    """As the chat template renders them."""
    jobs: list[JobEnvelope] = field(default_factory=list)
    answers: list[Message] = field(default_factory=list)


class _Asking:
    """Makes requests that no cache has seen."""

    def __init__(self) -> None:
        self._template = ChatTemplate.from_assets(load_assets(demo_model_folder()))
        self._serial = count()

    def asked(self) -> _Asked:
        contents = [f"request {next(self._serial)}: {_WORDS}" for _ in range(INFLIGHT)]
        return _Asked(
            [chat(content, 2, stream=False).partition(b"\r\n\r\n")[2] for content in contents],
            [self._rendered(content) for content in contents],
        )

    def _rendered(self, content: str) -> str:
        messages = [{"role": "user", "content": content}]
        return self._template.render(messages, now=datetime.now(UTC))


class _RequestFloor:
    """What remains of a request without a router."""

    def __init__(self) -> None:
        self._bodies = msgspec.json.Decoder(ChatRequest)
        path = demo_model_folder() / TOKENIZER_FILE
        self._tokenizer = tokenizers.Tokenizer.from_file(str(path))

    def run(self, asked: _Asked) -> list[list[int]]:
        """The prompts' ids."""
        for body in asked.bodies:
            self._bodies.decode(body)
        tokenize = self._tokenizer.encode_batch_fast  # also for one text the cheapest of its calls
        prompts = [tokenize([text], add_special_tokens=False)[0].ids for text in asked.texts]
        for envelope in asked.jobs:
            encode(envelope)
        for answer in asked.answers:
            decode_out(answer.payload)
        return prompts


async def request_pieces(number: int) -> list[Piece]:
    asking, floor = _Asking(), _RequestFloor()
    async with router_alone() as (router, workers):
        await _request_piece(router, workers, floor, asking.asked())  # binds metrics and the like
        return [await _request_piece(router, workers, floor, asking.asked()) for _ in range(number)]


async def _request_piece(
    router: RouterAlone, workers: PretendWorkers, floor: _RequestFloor, asked: _Asked
) -> Piece:
    ours, theirs = _Cpu(), _Cpu()
    router.hear_reports()
    bodies = await _answered(router, workers, asked, ours)
    if any(json.loads(body)["usage"]["completion_tokens"] != 2 for body in bodies):
        raise LocalError("not every request got its two tokens")
    with theirs:
        prompts = floor.run(asked)
    if [pack_ids(ids) for ids in prompts] != packed_prompts(asked.jobs):
        raise LocalError("the floor reads other prompts than the router")
    return Piece(ours.us_each(INFLIGHT), theirs.us_each(INFLIGHT))


async def _answered(
    router: RouterAlone, workers: PretendWorkers, asked: _Asked, cpu: _Cpu
) -> list[bytes]:
    """The answers to all of `asked`; only what the router does counts."""
    with cpu:
        waiting = [await router.begin(body) for body in asked.bodies]
        await router.turn()
    for _leg in ("prefill", "decode"):
        jobs = await router.sent()
        answers = workers.answers(jobs)
        asked.jobs += jobs
        asked.answers += answers
        with cpu:
            for answer in answers:
                router.hear(answer)
            await router.turn()
    with cpu:
        return [await router.end(request_id, sink) for request_id, sink in waiting]


PATHS: Final[dict[str, Callable[[int], Awaitable[list[Piece]]]]] = {
    f"a token of {STREAMS} streams": token_pieces,
    f"a request of {INFLIGHT} at once": request_pieces,
}
