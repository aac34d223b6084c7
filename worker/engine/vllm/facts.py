"""What a vLLM server says about itself (`/v1/models`, `/metrics`), and what follows for us.

Plain functions over text and files: no sockets, no clock.
"""

import hashlib
import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import msgspec

from protocol.errors import ConfigError
from text.assets import CONFIG_FILE, AssetsError, ModelAssets, load_assets

_WHOLE_BYTES: Final = 256 << 20
_PIECE_BYTES: Final = 1 << 20
_NUM_PIECES: Final = 64
_WEIGHTS: Final = "*.safetensors"


class ServedModel(msgspec.Struct):
    """One entry of `/v1/models`."""

    id: str
    root: str | None = ""
    max_model_len: int = 0
    parent: str | None = None
    """Of an adapter."""


class _Models(msgspec.Struct):
    data: list[ServedModel]


@dataclass(frozen=True, slots=True)
class Metrics:
    """Numbers of one moment, summed over vLLM's engines."""

    running: int
    waiting: int
    kv_usage: float
    """0 to 1; what is cached and free to take is not in use."""
    iterations: int
    started_at: float
    """Unix time of vLLM's start: another number is another server."""
    num_blocks: int
    block_size: int
    cache_dtype: str
    has_connector: bool
    """Counters of NIXL are there: blocks can be handed over."""


def read_models(body: bytes, wanted: str, url: str) -> ServedModel:
    """The model to drive: `wanted`, or the first that is no adapter. Raises ConfigError."""
    try:
        models = msgspec.json.decode(body, type=_Models).data
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        raise ConfigError(f"{url}/v1/models does not answer as vLLM does") from None
    bases = [model for model in models if not model.parent]
    named = [model for model in bases if model.id == wanted]
    found = [model for model in named or bases if model.max_model_len > 0]
    if not found:
        raise ConfigError(f"{url}/v1/models names no model with a max_model_len: is it vLLM?")
    return found[0]


_NAMES: Final = (
    "vllm:num_requests_running",
    "vllm:num_requests_waiting",
    "vllm:kv_cache_usage_perc",
    "vllm:iteration_tokens_total_count",
    "vllm:nixl_num_kv_expired_reqs_total",
    "vllm:cache_config_info",
    "process_start_time_seconds",
)
# A whole parser costs ten times as much, twice a second.
_SAMPLE: Final = re.compile(rf"^({'|'.join(_NAMES)})(?:{{(.*)}})? (\S+)", re.MULTILINE)
_LABEL: Final = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')


def read_metrics(body: str) -> Metrics:
    """Raises ValueError for what is no exposition of vLLM's metrics."""
    sums: dict[str, float] = {}
    cache: Mapping[str, str] = {}
    for name, labels, value in _SAMPLE.findall(body):
        number = float(value)
        if not math.isfinite(number):
            raise ValueError(f"{name} is {value}")
        sums[name] = sums.get(name, 0.0) + number
        if name == "vllm:cache_config_info":
            cache = cache or dict(_LABEL.findall(labels))
    if not cache or "vllm:num_requests_running" not in sums:
        raise ValueError("no vllm:cache_config_info and vllm:num_requests_running")
    return Metrics(
        running=int(sums["vllm:num_requests_running"]),
        waiting=int(sums.get("vllm:num_requests_waiting", 0)),
        kv_usage=min(1.0, max(0.0, sums.get("vllm:kv_cache_usage_perc", 0.0))),
        iterations=int(sums.get("vllm:iteration_tokens_total_count", 0)),
        started_at=sums.get("process_start_time_seconds", 0.0),
        num_blocks=_count(cache, "num_gpu_blocks"),
        block_size=_count(cache, "block_size"),
        cache_dtype=cache.get("cache_dtype", ""),
        has_connector="vllm:nixl_num_kv_expired_reqs_total" in sums,
    )


def _count(labels: Mapping[str, str], name: str) -> int:
    try:
        value = int(labels.get(name, ""))
    except ValueError:
        value = 0
    if value < 1:
        raise ValueError(f"vllm:cache_config_info says {name}={labels.get(name)!r}")
    return value


def model_folder(configured: str, root: str | None, url: str) -> Path:
    """Where tokenizer and template are read from. Raises ConfigError."""
    if configured:
        return Path(configured)
    if root and Path(root).is_dir():
        return Path(root)
    raise ConfigError(
        f"the vLLM at {url} serves {root or 'a model without a root'}, which is no folder here: "
        "give its tokenizer and config with --model DIR"
    )


def load_folder(folder: Path) -> ModelAssets:
    """Raises ConfigError."""
    try:
        return load_assets(folder)
    except AssetsError as error:
        raise ConfigError(str(error)) from None


def vocab_size(assets: ModelAssets, of_tokenizer: int) -> int:
    """Of the model, where its config says one: it may have more rows than the tokenizer names."""
    named = assets.json(CONFIG_FILE).get("vocab_size")
    return max(of_tokenizer, named) if isinstance(named, int) else of_tokenizer


def model_digest(
    model: ServedModel, metrics: Metrics, version: str, folder: Path, config: bytes
) -> str:
    """Two workers with one digest hand KV to each other. Raises ConfigError.

    In it: vLLM's version, model root, config.json, block size, KV dtype as configured, and the
    weight files where they are in the folder (large ones by 64 pieces of 1 MiB). Not in it, because
    vLLM does not say it: `--dtype`, quantisation at load, adapters. vLLM's own handshake compares
    dtype and shapes before a transfer.
    """
    facts = {
        "engine": "vllm",
        "version": version,
        "root": "" if any(folder.glob(_WEIGHTS)) else model.root,
        "block_size": metrics.block_size,
        "cache_dtype": metrics.cache_dtype,
    }
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    digest.update(config)
    for path in sorted(folder.glob(_WEIGHTS)):
        try:
            size = path.stat().st_size
            digest.update(f"\0{path.name}\0{size}\0".encode())
            _digest_file(path, size, digest.update)
        except OSError as error:
            reason = error.strerror or str(error)
            raise ConfigError(f"{path} cannot be read: {reason}") from None
    return digest.hexdigest()


def _digest_file(path: Path, size: int, update: Callable[[bytes], None]) -> None:
    with path.open("rb") as file:
        if size <= _WHOLE_BYTES:
            while piece := file.read(_PIECE_BYTES):
                update(piece)
            return
        for index in range(_NUM_PIECES):
            file.seek((size - _PIECE_BYTES) * index // (_NUM_PIECES - 1))
            update(file.read(_PIECE_BYTES))
