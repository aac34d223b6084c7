"""What a worker says about itself in discovery: one JSON value under its key in the registry.

It must be readable by a router of another version: new fields have defaults, types never change,
unknown fields are ignored.
"""

from typing import Final, Literal

import msgspec

from protocol.ids import is_name

Role = Literal["prefill", "decode", "both"]


class KvLayout(msgspec.Struct, frozen=True):
    """The shape of the KV cache. Two workers hand over KV only if their layouts are equal."""

    block_size: int
    """Tokens per block."""
    block_bytes: int
    """Bytes of one block, all layers: `[layer, k/v, kv_head, token, dim]`."""
    dtype: str = ""
    num_layers: int = 0
    num_kv_heads: int = 0
    head_dim: int = 0


class Capacity(msgspec.Struct, frozen=True):
    """What a worker can hold at once."""

    num_blocks: int
    """KV blocks in the arena."""
    max_running: int
    """Sequences in one engine step."""
    max_context: int
    """Tokens of one sequence, prompt and output together."""


class EngineTraits(msgspec.Struct, frozen=True):
    """How an engine differs from the reference one, as far as the router must know."""

    first_token: Literal["carried", "recomputed"] = "carried"
    resume: Literal["exact", "none"] = "exact"
    release: Literal["explicit", "timeout"] = "explicit"
    handle: Literal["accepted", "prefilled"] = "prefilled"
    prompt: Literal["tokens", "body"] = "tokens"


class WorkerInfo(msgspec.Struct, frozen=True):
    """One worker process with one KV pool."""

    worker_id: str
    """The operator's name for it; a restart keeps it."""
    incarnation: str
    """Random per process start; what a dead incarnation said changes nothing."""
    role: Role
    model: str
    """The name clients ask for."""
    model_digest: str
    """Digest of weights, config, quantisation, RoPE, KV dtype: everything that shapes KV."""
    layout: KvLayout
    capacity: Capacity
    engine: str
    traits: EngineTraits = EngineTraits()
    assets_digest: str = ""
    """Digest of tokenizer, template and config; empty where the engine renders for itself."""
    transports: list[str] = []
    host: str = ""
    started_at_ms: int = 0
    labels: dict[str, str] = {}
    draining: bool = False
    transport_reasons: dict[str, str] = {}
    """Of every known transport: why it runs here, or why not; for people."""


MAX_TEXT: Final = 4096
MAX_SIZE: Final = 1 << 50
"""Above every size of a machine that is built."""


def problem(info: WorkerInfo) -> str:
    """Why this cannot be a worker, or empty. What others built their books on must hold: names
    become subjects, a block has tokens, a worker can hold something."""
    if not (is_name(info.worker_id) and is_name(info.incarnation)):
        return "its id or incarnation is no name"
    if not 0 < len(info.model) <= MAX_TEXT or len(info.model_digest) > MAX_TEXT:
        return "its model has no name, or one too long"
    layout, capacity = info.layout, info.capacity
    sizes = (
        layout.block_size, capacity.num_blocks, capacity.max_running, capacity.max_context,
    )  # fmt: skip
    if not all(0 < size <= MAX_SIZE for size in sizes) or not 0 <= layout.block_bytes <= MAX_SIZE:
        return "a size of its blocks or its capacity cannot be"
    return ""
