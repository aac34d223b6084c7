"""One example of every message of the wire, and a strategy for any of them."""

import types
import typing
from typing import Any, Union, get_args, get_origin

import msgspec
from hypothesis import strategies as st

from protocol.events import (
    Beat,
    EventEnvelope,
    KvCleared,
    KvEvents,
    KvRemoved,
    KvSnapshot,
    KvStored,
    Leaving,
    LoadReport,
    WorkerEvent,
)
from protocol.handoff import FabricOffer, KvHandle, RankKv, ShmOffer, TcpOffer
from protocol.jobs import (
    Body,
    Cancel,
    Decode,
    Done,
    GetAssets,
    GetKvSnapshot,
    Job,
    JobEnvelope,
    Ping,
    Pong,
    Prefill,
    Release,
    Renew,
    Replay,
    Tokens,
)
from protocol.out import (
    Accepted,
    Decoding,
    Delta,
    Failed,
    Out,
    OutEnvelope,
    Prefilled,
    Progress,
    Refused,
    StepFrame,
    TokenLogprob,
)
from protocol.sampling import Sampling
from protocol.worker_info import Capacity, EngineTraits, KvLayout, WorkerInfo

ENVELOPES = (JobEnvelope, OutEnvelope, EventEnvelope, Beat, Pong, KvSnapshot, WorkerInfo)

_HASH = bytes(range(16))
_SAMPLING = Sampling(64, 0.5, 0.9, 40, 7, ["END"], [2], 1, True, True, False)
_CAREFUL = Sampling(
    64, 0.5, 0.9, 40, 7, ["END"], [2], 1, True, True, False,
    0.125, 1.5, 0.5, 0.25, {7: -100.0, 70_000: 2.5}, 5, 0, '{"type":"object"}',
)  # fmt: skip
_RANK = RankKv(
    b"\1\0\0\0\2\0\0\0",
    3,
    2**63 + 5,
    [
        ShmOffer("boot:ns", 4242, 7, 8, 1 << 30, 4096, "token", "aarch64"),
        TcpOffer("10.0.0.1", 7001),
        FabricOffer("nixl", "w1-i1", b"meta", 2**47, 2**46, 1, 5555, "10.0.0.1"),
    ],
)
_HANDLE = KvHandle("h1", "w1", "i1", 130, 64, _HASH, 30.0, [_RANK], msgspec.Raw(b"\x81\xa1a\x01"))
_FABRIC = FabricOffer(
    "nixl/UCX", "w1.i1", b"meta", 2**47, 2**46, 1, 5555, "10.0.0.1",
    "boot:ns", 4242, 1 << 30, 4096, "cuda", "token", True,
)  # fmt: skip
_NIXL_HANDLE = KvHandle("h2", "w1", "i1", 64, 64, _HASH, 30.0, [RankKv(b"", 0, 1, [_FABRIC])])
_DELTA = Delta(5, 17, [128, 2], " caf\u00e9", "stop", "END")
_LOGPROBS = [TokenLogprob(-0.5, [(128, -0.5), (3, -1.25)]), TokenLogprob(-2.0)]
_JUDGED = Delta(5, 17, [128, 2], " caf\u00e9", "", None, _LOGPROBS)

JOBS: list[Job] = [
    Prefill(1, "q/0", Tokens(b"\1\0\0\0"), _SAMPLING, b"\2\0\0\0", 3, "salt"),
    Prefill(2, "q/1", Body("chat.completions", b"{}"), Sampling(1)),
    Decode(3, "q/0", Tokens(b"\1\0\0\0"), _SAMPLING, _HANDLE, b"\2\0\0\0", 3, "salt"),
    Decode(4, "q/0", Tokens(b""), Sampling(1)),
    Cancel(5),
    Renew(["h1", "h2"]),
    Release(["h1"]),
    Replay(6, 7),
    Done([8, 9]),
    Ping(),
    GetAssets("digest"),
    GetKvSnapshot(),
    Decode(13, "q/0", Tokens(b"\1\0\0\0"), _CAREFUL),
]
OUTS: list[Out] = [
    Accepted(1, _HANDLE),
    Accepted(1),
    Refused(2, "draining"),
    Progress(3, "transfer", 10, 20),
    Prefilled(4, 130, 64, _DELTA, _HANDLE, 0.25, 0.5),
    Prefilled(4, 130, 64),
    Decoding(5, 64, "nixl", 1 << 20, 0.125),
    StepFrame([_DELTA, Delta(6, 0, [1], "", "length"), Delta(7, 1, [9], "x", "stop", 2)]),
    Failed(8, "decode", "lease_lost", "gone"),
    Prefilled(9, 2, 0, _JUDGED, None, 0.25, 0.5, [None, *_LOGPROBS]),
    Decoding(10, 64, "", 0, 0.0, [None, *_LOGPROBS]),
    StepFrame([_DELTA, _JUDGED]),
    Decoding(11, 0, "tcp", 1 << 20, 0.125, None, "p1", "nixl: failed before"),
    Accepted(12, _NIXL_HANDLE),
]
EVENTS: list[WorkerEvent] = [
    LoadReport(1, 2, 100, 50, 3, 4, 1000, 77, {"r1": 5}, True),
    KvEvents(70, [KvStored(_HASH), KvRemoved(_HASH * 2), KvCleared()]),
    Leaving(),
]
INFO = WorkerInfo(
    "w1",
    "i1",
    "both",
    "demo",
    "md",
    KvLayout(64, 8192, "float16", 2, 4, 32),
    Capacity(1000, 64, 4096),
    "torch",
    EngineTraits("recomputed", "none", "timeout", "accepted", "body"),
    "ad",
    ["shm", "tcp"],
    "host",
    1_700_000_000_000,
    {"zone": "a"},
    True,
)
REASONED = msgspec.structs.replace(INFO, transport_reasons={"shm": "auto", "nixl": "no RDMA"})


def examples() -> dict[str, msgspec.Struct]:
    """By name: every message that may be on the wire, alone in its envelope."""
    named: dict[str, msgspec.Struct] = {}
    for number, job in enumerate(JOBS):
        named[f"jobs/{number}/{type(job).__name__}"] = JobEnvelope("r1", [job])
    for number, out in enumerate(OUTS):
        named[f"out/{number}/{type(out).__name__}"] = OutEnvelope("w1", "i1", number, [out])
    for event in EVENTS:
        named[f"events/{type(event).__name__}"] = EventEnvelope("w1", "i1", [event])
    named["beat"] = Beat("r1", True)
    named["pong"] = Pong("w1", "i1")
    named["snapshot"] = KvSnapshot("w1", "i1", 77, _HASH)
    named["info"] = INFO
    named["info/reasoned"] = REASONED
    return named


def any_of(kind: Any) -> st.SearchStrategy[Any]:
    """A strategy for a msgspec type, made from its annotations."""
    plain = {
        int: st.integers(-(2**63), 2**64 - 1),
        float: st.floats(allow_nan=False),
        str: st.text(max_size=20),
        bytes: st.binary(max_size=20),
        bool: st.booleans(),
        type(None): st.none(),
        msgspec.Raw: st.sampled_from([b"\xc0", b"\x93\x01\x02\x03", b"\x81\xa1a\xc3"]).map(
            msgspec.Raw
        ),
    }
    if kind in plain:
        return plain[kind]
    origin, args = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return st.one_of([any_of(arg) for arg in args])
    if origin is typing.Literal:
        return st.sampled_from(args)
    if origin is list:
        return st.lists(any_of(args[0]), max_size=3)
    if origin is tuple:
        return st.tuples(*map(any_of, args))
    if origin is dict:
        return st.dictionaries(any_of(args[0]), any_of(args[1]), max_size=3)
    hints = typing.get_type_hints(kind)
    return st.builds(kind, **{name: any_of(hints[name]) for name in kind.__struct_fields__})
