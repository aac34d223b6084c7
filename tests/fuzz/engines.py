"""What vLLM, other workers' jobs and model folders say: decoders and valid examples."""

import contextlib
import json
from functools import cache
from pathlib import Path
from typing import Any, Final

import msgspec

from protocol.blocks import seed_of
from protocol.codec import decode_jobs
from protocol.handoff import KvHandle
from protocol.ids import JobKey
from protocol.jobs import Decode, Prefill
from protocol.sampling import Sampling
from tests.fuzz.scratch import scratch_folder
from text.assets import byte_assets
from text.tokenizer import Tokenizer
from worker.engine.base import DecodeJob, PrefillJob
from worker.engine.grammar import GrammarCompiler, GrammarError
from worker.engine.sequences import (
    ActiveSequence,
    ModelLimits,
    SequenceRefused,
    build_sequence,
)
from worker.engine.torch_weights import _listed
from worker.engine.vllm.client import VllmError
from worker.engine.vllm.facts import Metrics, ServedModel, read_metrics, read_models
from worker.engine.vllm.handles import VllmHandle, check_handle
from worker.engine.vllm.kv_index import (
    KvIndex,
    Sequencer,
    decode_batch,
    read_frames,
    replay_closes_gap,
)
from worker.engine.vllm.legs import _read_scores, _take
from worker.engine.vllm.watch import read_version
from worker.engine.vllm.wire import Answer, EventLines, decode_answer
from worker.service import _engine_job

SIZE: Final = 4
SEED: Final = seed_of("digest")
PROMPT: Final = list(range(60, 76))
MAX_BLOCKS: Final = 64


@cache
def _tokenizer() -> Tokenizer:
    return Tokenizer.from_assets(byte_assets())


@cache
def _limits() -> ModelLimits:
    tokenizer = _tokenizer()
    return ModelLimits(
        block_size=SIZE, max_context=4096, vocab_size=tokenizer.vocab_size, model_digest="digest",
        eos_ids=tokenizer.eos_ids,
    )  # fmt: skip


def _sequence(sampling: Sampling) -> ActiveSequence:
    job = DecodeJob(JobKey("r", 1), "q/0", PROMPT, sampling)
    return build_sequence(job, _limits(), _tokenizer(), serial=1, now=0.0)


# -- jobs


def job(data: bytes) -> list[ActiveSequence]:
    """Everything of an envelope that an engine would begin."""
    found = []
    for one in decode_jobs(data).jobs:
        if isinstance(one, Prefill | Decode):
            made: PrefillJob | DecodeJob = _engine_job(JobKey("r", one.attempt), one)
            with contextlib.suppress(SequenceRefused):
                found.append(build_sequence(made, _limits(), _tokenizer(), serial=1, now=0.0))
    return found


# -- vLLM's answers


@cache
def answers() -> list[bytes]:
    chunk = {
        "id": "x", "object": "text_completion",
        "choices": [{"index": 0, "text": "a", "token_ids": [97, 98], "finish_reason": None,
                     "logprobs": {"tokens": ["token_id:97", "token_id:98"],
                                  "token_logprobs": [-0.5, -1.5],
                                  "top_logprobs": [{"token_id:97": -0.5, "token_id:5": -2.0},
                                                   {"token_id:98": -1.5}]}}],
    }  # fmt: skip
    last = {"choices": [{"token_ids": [99], "finish_reason": "length", "stop_reason": 3}]}
    scores = [None, *({str(t): {"logprob": -1.0, "rank": 1}, "7": {"logprob": -2.0, "rank": 2}}
                      for t in PROMPT[1:])]  # fmt: skip
    whole = {
        "choices": [{"token_ids": [97], "finish_reason": "length", "prompt_logprobs": scores}],
        "kv_transfer_params": {"remote_block_ids": [1, 2], "remote_host": "h"},
    }
    error = {"error": {"message": "no", "code": 400, "param": "x"}}
    return [json.dumps(one).encode() for one in (chunk, last, whole, error)]


def answer(data: bytes) -> Answer:
    """As a leg takes it: the tokens, and the prompt's numbers."""
    read = decode_answer(data)
    sequence = _sequence(Sampling(64, logprobs=2, prompt_logprobs=2))
    for choice in read.choices:
        with contextlib.suppress(VllmError, SequenceRefused):
            _take(sequence, choice)
        with contextlib.suppress(VllmError):
            _read_scores([choice], sequence)
    return read


@cache
def streams() -> list[bytes]:
    lines = b"".join(b"data: " + one + b"\n\n" for one in answers())
    return [lines + b"data: [DONE]\n\n", b": comment\r\n\r\n" + lines]


def sse(data: bytes) -> list[Answer]:
    """Cut anywhere, the events are the same."""
    whole = list(EventLines().feed(data + b"\n"))
    lines = EventLines()
    cut: list[bytes] = []
    for piece in [*(data[at : at + 97] for at in range(0, len(data), 97)), b"\n"]:
        if not lines.is_done:  # a client stops there
            cut += lines.feed(piece)
    if cut != whole:
        raise AssertionError(f"{cut} is not {whole}")
    return [decode_answer(event) for event in whole]


@cache
def model_lists() -> list[bytes]:
    entry = {"id": "m", "root": "/models/m", "max_model_len": 4096, "parent": None}
    return [json.dumps({"object": "list", "data": [entry, {**entry, "id": "a"}]}).encode()]


def models(data: bytes) -> ServedModel:
    return read_models(data, "m", "http://vllm")


@cache
def expositions() -> list[bytes]:
    text = (
        '# HELP x y\nvllm:num_requests_running{engine="0"} 3.0\n'
        'vllm:num_requests_waiting{engine="0"} 4.0\nvllm:kv_cache_usage_perc{engine="0"} 0.5\n'
        'vllm:iteration_tokens_total_count{engine="0"} 10.0\nprocess_start_time_seconds 1.5e9\n'
        'vllm:cache_config_info{block_size="16",cache_dtype="fp8",num_gpu_blocks="50"} 1.0\n'
    )
    return [text.encode()]


def metrics(data: bytes) -> Metrics:
    return read_metrics(data.decode(errors="replace"))


@cache
def versions() -> list[bytes]:
    return [b'{"version":"0.32.0"}']


def version(data: bytes) -> str:
    return read_version(data)


# -- vLLM's KV events


def _stored(first: int, count: int) -> dict[str, Any]:
    return {
        "type": "BlockStored", "block_hashes": [1000 + n for n in range(first, first + count)],
        "parent_block_hash": 999 + first if first else None,
        "token_ids": list(range(100, 100 + count * SIZE)), "block_size": SIZE, "lora_id": None,
        "medium": "GPU", "extra_keys": [None] * count, "group_idx": 0,
    }  # fmt: skip


@cache
def kv_batches() -> list[bytes]:
    removed = {"type": "BlockRemoved", "block_hashes": [1000, b"\x01" * 32], "medium": "GPU"}
    events = [_stored(0, 2), _stored(2, 3), removed, {"type": "AllBlocksCleared"}]
    return [
        msgspec.msgpack.encode([1.5, events[:2], 0]),
        msgspec.msgpack.encode([1.5, events]),
        msgspec.msgpack.encode([1.5, [_stored(0, 5), removed], None]),
    ]


def kv_batch(data: bytes) -> KvIndex:
    """Twice: a repeat changes no more than counts."""
    index = KvIndex(block_size=SIZE, seed=SEED, max_blocks=MAX_BLOCKS)
    for _ in range(2):
        index.apply(decode_batch(data))
    return index


def check_index(index: KvIndex) -> None:
    cached = set(index.hashes)
    if len(index._ours) > MAX_BLOCKS or cached != {ours for ours, _ in index._ours.values()}:
        raise AssertionError(f"{len(index._ours)} blocks, {len(cached)} cached")


@cache
def frame_lists() -> list[bytes]:
    return [b"".join(n.to_bytes(8, "big") + b"ab" for n in range(5)), b"\xff" * 8 + b"zz"]


def frame_reader(data: bytes) -> list[tuple[int, bytes]]:
    pieces = [data[at : at + 10] for at in range(0, len(data), 10)]
    read = [read_frames([piece[:8], piece[8:]]) for piece in pieces]
    return [one for one in read if one is not None]


def kv_frames(data: bytes) -> int:
    """Numbers as they come: what is expected next can always be asked for."""
    sequencer = Sequencer()
    read = frame_reader(data)
    for seq, _ in read:
        if sequencer.missing(seq):
            replay_closes_gap(read, sequencer.expected, seq)
        sequencer.take(seq)
        sequencer.expected.to_bytes(8, "big")
    return sequencer.expected


# -- handles of vLLM


@cache
def vllm_handles() -> list[bytes]:
    params = {"do_remote_prefill": True, "remote_block_ids": [1, 2], "remote_port": 5600}
    return [msgspec.msgpack.encode(VllmHandle(params, 1000.0))]


def vllm_handle(data: bytes) -> dict[str, Any]:
    sequence = _sequence(Sampling(8))
    content = sequence.content_hash(len(PROMPT))
    handle = KvHandle("h", "w", "i", len(PROMPT), SIZE, content, 30.0, [], msgspec.Raw(data))
    return check_handle(handle, sequence, wall=1005.0)


# -- grammars, weights


@cache
def schemas() -> list[bytes]:
    person = {"type": "object", "properties": {"a": {"type": "integer", "minimum": 0},
              "b": {"enum": ["x", 1]}, "c": {"$ref": "#/$defs/d"}}, "required": ["a"],
              "$defs": {"d": {"type": "array", "items": {"type": "string", "pattern": "^a+$"}}},
              "additionalProperties": False}  # fmt: skip
    return [b'{"type":"object"}', json.dumps(person).encode()]


@cache
def _grammars() -> GrammarCompiler:
    return GrammarCompiler(_tokenizer())


def grammar(data: bytes) -> object:
    try:
        text = data.decode()
    except UnicodeDecodeError:
        raise GrammarError("not text") from None
    return _grammars().state(text)


@cache
def weights_indexes() -> list[bytes]:
    files = {"model.a": "x.safetensors", "model.b": "y.safetensors"}
    return [json.dumps({"metadata": {}, "weight_map": files}).encode()]


@cache
def _folder() -> Path:
    folder = scratch_folder()
    for name in ("x.safetensors", "y.safetensors"):
        (folder / name).write_bytes(b"")
    return folder


def weights_index(data: bytes) -> dict[str, str]:
    (_folder() / "model.safetensors.index.json").write_bytes(data)
    return _listed(_folder())
