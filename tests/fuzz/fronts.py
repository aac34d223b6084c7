"""What clients, operators, the registry and models' files say: decoders and valid examples."""

import argparse
import asyncio
import json
import random
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any, Final

import msgspec

import baton
from baton.settings import load_settings
from baton.up import open_processes
from discovery.changes import decode_worker
from protocol.blocks import unpack_ids
from protocol.errors import ConfigError
from protocol.events import KvRemoved, KvStored
from protocol.jobs import Tokens
from protocol.subjects import Subjects
from protocol.worker_info import Capacity, KvLayout, WorkerInfo
from router.catalog import Catalog, text_of
from router.config import RouterConfig
from router.requests import Front, Prepared
from router.sampling_options import read_defaults
from router.scheduling.prefix_index import PrefixIndex
from tests.fuzz.scratch import scratch_folder
from text.assets import ModelAssets, byte_assets, encode, load_assets, make_assets
from text.assets import decode as decode_assets
from text.chat import template_messages
from text.template import ChatTemplate
from worker.config import WorkerConfig
from worker.trtllm_config import TrtllmKeys

CONTEXT: Final = 200
DEMO: Final = Path(baton.__file__).parent / "demo_model"


class Unreadable(Exception):
    """Stands for a decoder's `None`."""


# -- the registry


def registry_value(data: bytes) -> WorkerInfo:
    info = decode_worker(data)
    if info is None:
        raise Unreadable
    return info


# -- workers


def block_hashes(data: bytes) -> PrefixIndex:
    """Of a KV event, by their lengths anything; as if stored, told again in a snapshot and half of
    them removed."""
    index = PrefixIndex(100)
    slot = index.join(20)
    index.change(slot, 1, [KvStored(data)])
    slot, _ = index.replace(slot, 1, [data[at : at + 16] for at in range(0, len(data), 16)])
    index.change(slot, 2, [KvRemoved(data[: len(data) // 2])])
    index.match([data[:16], data[16:]])
    return index


@cache
def many_hashes() -> list[bytes]:
    return [bytes(range(256)), bytes(15), b""]


# -- clients' bodies

_MESSAGES: Final = [
    {"role": "system", "content": "be short"},
    {"role": "user", "content": [{"type": "text", "text": "hi"}]},
    {"role": "assistant", "content": None,
     "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": '{"a": [1, {}]}'}}]},
    {"role": "user", "content": "go on"},
]  # fmt: skip
_OPTIONS: Final[dict[str, Any]] = {
    "model": "m", "stream": True, "stream_options": {"include_usage": True}, "max_tokens": 5,
    "temperature": 0.5, "top_p": 0.9, "top_k": 4, "n": 2, "stop": ["END"], "stop_token_ids": [3],
    "seed": 7, "min_tokens": 1, "ignore_eos": True, "cache_salt": "s", "presence_penalty": 0.5,
    "frequency_penalty": 0.5, "repetition_penalty": 1.1, "min_p": 0.1, "logit_bias": {"7": -1.5},
}  # fmt: skip
_SCHEMA: Final = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}


@cache
def chat_bodies() -> list[bytes]:
    formed = {"type": "json_schema", "json_schema": {"name": "x", "schema": _SCHEMA}}
    bodies: list[dict[str, Any]] = [
        {"model": "m", "messages": _MESSAGES},
        {**_OPTIONS, "messages": _MESSAGES[:2], "logprobs": True, "top_logprobs": 2},
        {"model": "m", "messages": _MESSAGES[1:2], "response_format": formed},
        {"model": "m", "messages": _MESSAGES[1:2], "guided_json": json.dumps(_SCHEMA)},
        {"model": "m", "messages": _MESSAGES[1:2], "structured_outputs": {"json": _SCHEMA},
         "chat_template_kwargs": {"a": [1]}, "tools": [], "tool_choice": "none"},
    ]  # fmt: skip
    return [json.dumps(body).encode() for body in bodies]


@cache
def completion_bodies() -> list[bytes]:
    bodies: list[dict[str, Any]] = [
        {"model": "m", "prompt": "hello"},
        {**_OPTIONS, "prompt": ["a", "b"], "logprobs": 3, "echo": True},
        {"model": "m", "prompt": [1, 2, 3], "max_tokens": 0, "echo": True, "logprobs": 0},
        {"model": "m", "prompt": [[1, 2], [3]], "best_of": 1},
    ]
    return [json.dumps(body).encode() for body in bodies]


@cache
def _front() -> tuple[asyncio.AbstractEventLoop, Front]:
    """A front whose catalog has one model's text: nothing is fetched and nothing waits."""
    loop = asyncio.new_event_loop()
    assets = byte_assets(max_context=CONTEXT)
    catalog = Catalog(
        bus=None, subjects=Subjects("fuzz"), router_id="r", tasks=None,  # type: ignore[arg-type]
        wall_clock=lambda: 1.5e9,
    )  # fmt: skip
    catalog.listing_came = True
    catalog._texts[assets.digest] = text_of(encode(assets), assets.digest)
    layout, capacity = KvLayout(32, 64), Capacity(10, 10, CONTEXT)
    catalog.listed(
        WorkerInfo(
            "w", "i", "both", "m", "d", layout, capacity, "simulated", assets_digest=assets.digest
        )
    )
    front = Front(catalog, max_choices=8, rng=random.Random(1), wall_clock=lambda: 1.5e9)
    return loop, front


def front_chat(data: bytes) -> Prepared:
    loop, front = _front()
    return loop.run_until_complete(front.chat(data, "id"))


def front_completion(data: bytes) -> Prepared:
    loop, front = _front()
    return loop.run_until_complete(front.completion(data, "id"))


def check_prepared(prepared: Prepared) -> None:
    """Whatever came, no more is asked of workers than what is allowed and fits."""
    assert 1 <= len(prepared.specs) <= 8
    for spec in prepared.specs:
        sampling = spec.sampling
        assert isinstance(spec.prompt, Tokens)
        ids = unpack_ids(spec.prompt.packed)
        assert 0 < len(ids) == spec.num_prompt_tokens < CONTEXT
        assert 0 < sampling.max_tokens <= CONTEXT - len(ids)
        assert 0.0 <= sampling.temperature <= 2.0
        assert 0.0 < sampling.top_p <= 1.0
        assert 0.0 <= sampling.min_p <= 1.0
        assert 0.0 < sampling.repetition_penalty <= 2.0
        assert 0 <= sampling.seed < 2**64
        assert len(sampling.stop) <= 16
        assert -1 <= sampling.logprobs <= 20


# -- messages, assets, templates


@cache
def message_lists() -> list[bytes]:
    return [json.dumps(_MESSAGES).encode()]


def messages(data: bytes) -> list[dict[str, Any]]:
    try:
        value = msgspec.json.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        raise Unreadable from None
    return template_messages(value)


@cache
def asset_bytes() -> list[bytes]:
    return [encode(byte_assets())]


def assets(data: bytes) -> ModelAssets:
    return decode_assets(data)


@cache
def _small_tokenizer() -> dict[str, Any]:
    """Every kind of part that ours has, with a vocabulary that a mutation can hit."""
    whole: dict[str, Any] = json.loads((DEMO / "tokenizer.json").read_bytes())
    model = whole["model"]
    kept = {token: index for token, index in model["vocab"].items() if index < 300}
    merges = [
        m for m in model["merges"] if "".join(m if isinstance(m, list) else m.split()) in kept
    ]
    return {**whole, "model": {**model, "vocab": kept, "merges": merges[:20]}}


@cache
def tokenizer_files() -> list[bytes]:
    return [json.dumps(_small_tokenizer()).encode()]


@cache
def tokenizer_config_files() -> list[bytes]:
    return [(DEMO / "tokenizer_config.json").read_bytes()]


@cache
def generation_config_files() -> list[bytes]:
    full = {"temperature": 0.6, "top_p": 0.9, "top_k": 40, "min_p": 0.1, "do_sample": True,
            "repetition_penalty": 1.1, "max_new_tokens": 64, "eos_token_id": [1, 2]}  # fmt: skip
    return [(DEMO / "generation_config.json").read_bytes(), json.dumps(full).encode()]


@cache
def _demo() -> dict[str, bytes]:
    return {**load_assets(DEMO).files, "tokenizer.json": tokenizer_files()[0]}


def _with(name: str, data: bytes) -> object:
    """As a router takes a worker's assets with this file exchanged, and uses them once."""
    given = make_assets({**_demo(), name: data})
    text = text_of(encode(given), given.digest)
    ids = text.tokenizer.encode("one <|two|> é", add_special_tokens=True)
    text.tokenizer.decode(ids[:8])
    return text


def tokenizer(data: bytes) -> object:
    return _with("tokenizer.json", data)


def tokenizer_config(data: bytes) -> object:
    return _with("tokenizer_config.json", data)


def generation_config(data: bytes) -> object:
    read_defaults(make_assets({"generation_config.json": data}).json("generation_config.json"))
    return _with("generation_config.json", data)


@cache
def templates() -> list[bytes]:
    config = json.loads((DEMO / "tokenizer_config.json").read_bytes())
    given = str(config.get("chat_template", ""))
    loop = (
        "{% for m in messages %}{{ m['role'] | upper }}: {{ m.content[:9] ~ '\\n' }}"
        "{% if loop.last %}{{ namespace(x=loop.index).x }}{% endif %}{% endfor %}"
        "{% macro f(a) %}{{ a | tojson }}{% endmacro %}{{ f([1, 'b']) }}"
    )
    return [loop.encode(), given.encode()] if given else [loop.encode()]


def template(data: bytes) -> str:
    made = ChatTemplate({"default": data.decode("utf-8", "replace")}, {"bos_token": "<s>"})
    return made.render([{"role": "user", "content": "hi"}], now=datetime.fromtimestamp(1.5e9, UTC))


# -- configuration


@cache
def _folder() -> Path:
    return scratch_folder()


def _file(name: str, data: bytes) -> Path:
    path = _folder() / name
    path.write_bytes(data)
    return path


def router_file(data: bytes) -> RouterConfig:
    args = argparse.Namespace(config=str(_file("router.yaml", data)))
    return load_settings(RouterConfig, args, {})


def worker_file(data: bytes) -> WorkerConfig:
    args = argparse.Namespace(
        config=str(_file("worker.yaml", data)), role="decode", engine="simulated"
    )
    names = {field.name for field in msgspec.structs.fields(WorkerConfig)}
    return load_settings(WorkerConfig, args, {}, TrtllmKeys(names))


@cache
def router_files() -> list[bytes]:
    return [
        b"port: 8001\nhost: 127.0.0.1\nqueue_timeout_ms: 5000\n",
        b"# nothing\n",
        b"api_keys: [a, b]\nmax_body_bytes: 1000000\nnats: nats://h:4222,nats://i:4222\n",
    ]


@cache
def worker_files() -> list[bytes]:
    return [
        b"transfer: tcp\nnum_blocks: 100\nblock_size: 16\n",
        b"cache_transceiver_config:\n  backend: UCX\n  max_tokens_in_buffer: 2048\n"
        b"max_batch_size: 8\nkv_cache_config:\n  dtype: auto\n",
    ]


@cache
def environments() -> list[bytes]:
    given = {"BATON_PORT": "8001", "BATON_API_KEYS": "a,b", "BATON_QUEUE_TIMEOUT_MS": "1e3",
             "BATON_NO_SUCH": "1"}  # fmt: skip
    return [json.dumps(given).encode()]


def environment(data: bytes) -> RouterConfig:
    """Strings by name; what else a mutation made of it is left out."""
    try:
        loaded = json.loads(data)
    except (ValueError, RecursionError):
        raise ConfigError("not an environment") from None
    given = loaded if isinstance(loaded, dict) else {}
    environ = {str(key): value for key, value in given.items() if isinstance(value, str)}
    return load_settings(RouterConfig, argparse.Namespace(), environ)


@cache
def processes_files() -> list[bytes]:
    entry = {"name": "nats", "role": "nats", "pid": 1 << 22, "port": 4222, "log": "x"}
    return [json.dumps([entry, {**entry, "name": "etcd"}]).encode()]


def processes_file(data: bytes) -> object:
    return open_processes(_file("processes.json", data))
