"""Llama and its relatives: token ids in, logits out, KV into the blocks that the batch names.

One decoder whose options the config sets. Written to agree with the reference implementation in
`transformers` to float noise. All tokens of a step go through the linear layers together; attention
is by parts. It knows no jobs and no arena.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor
from torch.nn import functional

from worker.engine.torch_attention import Batch, PagedKv
from worker.engine.torch_config import LlamaConfig
from worker.engine.torch_rope import rotary_tables
from worker.engine.torch_weights import Weights

_EMBEDDING: Final = "model.embed_tokens.weight"
_HEAD: Final = "lm_head.weight"
_NORM: Final = "model.norm.weight"
_QUERY_NORM: Final = "self_attn.q_norm.weight"
_KEY_NORM: Final = "self_attn.k_norm.weight"
_IGNORED: Final = (".rotary_emb.inv_freq",)
"""Computed, and stored by old versions only."""


@dataclass(frozen=True, slots=True)
class _Linear:
    """Projections of one input, joined into one."""

    weight: Tensor
    bias: Tensor | None

    def __call__(self, rows: Tensor) -> Tensor:
        return functional.linear(rows, self.weight, self.bias)


@dataclass(frozen=True, slots=True)
class _Layer:
    attention_norm: Tensor
    qkv: _Linear
    qk_norm: Tensor | None
    """`[head, dim]`, of the queries' and then the keys' heads."""
    output: _Linear
    mlp_norm: Tensor
    gate: _Linear
    up: _Linear
    down: _Linear


class LlamaModel:
    """The weights, and the computation of one step. Call it under `torch.inference_mode`."""

    def __init__(
        self, config: LlamaConfig, weights: Weights, *, dtype: torch.dtype, max_context: int,
        device: torch.device,
    ) -> None:  # fmt: skip
        """Positions are below `max_context`. Raises ConfigError if the weights do not fit."""
        weights.check(expected_tensors(config), optional=_ignored(config))

        def read(name: str) -> Tensor:
            return weights.read(name, dtype, device)

        self._config = config
        self._embedding = read(_EMBEDDING)
        self._layers = [
            _read_layer(read, f"model.layers.{index}.", config)
            for index in range(config.num_layers)
        ]
        self._norm = read(_NORM)
        self._head = _by_columns(self._embedding if config.tied_embeddings else read(_HEAD))
        if config.tied_embeddings:
            self._embedding = self._head
        self._cos, self._sin = rotary_tables(
            config.rope, config.head_dim, max_context, dtype, device
        )

    def hidden(self, batch: Batch, kv: PagedKv) -> Tensor:
        """Write the KV of all rows; `[wanted row, hidden_size]` after the last layer."""
        kv.clear_fresh(batch)
        rows = functional.embedding(batch.ids, self._embedding)
        cos = self._cos.index_select(0, batch.positions).unsqueeze(1)
        sin = self._sin.index_select(0, batch.positions).unsqueeze(1)
        for index, layer in enumerate(self._layers):
            attended = self._attend(index, layer, rows, batch, kv, cos, sin)
            if batch.wanted is not None and index == len(self._layers) - 1:
                # What is left of the last layer concerns no KV.
                rows, attended = rows[batch.wanted], attended[batch.wanted]
            rows += layer.output(attended)
            normed = self._normed(rows, layer.mlp_norm)
            # Two products: joined into one they are slower on a CPU, and silu reads with gaps.
            rows += layer.down(functional.silu(layer.gate(normed)).mul_(layer.up(normed)))
        return rows

    def logits(self, hidden: Tensor) -> Tensor:
        """`[row, vocab_size]` in float32 and in host memory, of the rows given."""
        return functional.linear(self._normed(hidden, self._norm), self._head).cpu().float()

    def _attend(
        self, index: int, layer: _Layer, rows: Tensor, batch: Batch, kv: PagedKv,
        cos: Tensor, sin: Tensor,
    ) -> Tensor:  # fmt: skip
        config = self._config
        heads, dim = config.num_heads, config.head_dim
        qkv = layer.qkv(self._normed(rows, layer.attention_norm)).view(rows.shape[0], -1, dim)
        rotated = qkv[:, : heads + config.num_kv_heads]
        if layer.qk_norm is not None:
            rotated.copy_(self._normed(rotated, layer.qk_norm))
        # The table's sine has the sign of the half that is moved.
        moved = torch.cat((rotated[..., dim // 2 :], rotated[..., : dim // 2]), dim=-1)
        rotated.mul_(cos).addcmul_(moved, sin)
        own = qkv[:, heads:].view(-1, 2, config.num_kv_heads, dim)
        kv.write(index, batch, own)
        return kv.attend(index, batch, qkv[:, :heads], own)

    def _normed(self, rows: Tensor, weight: Tensor) -> Tensor:
        """RMS norm; the mean square in float32 whatever the rows are."""
        normed = functional.rms_norm(rows.float(), rows.shape[-1:], None, self._config.norm_eps)
        return normed.to(rows.dtype).mul_(weight)


def _by_columns(weight: Tensor) -> Tensor:
    """The same matrix, laid out as a CPU multiplies it with few rows in 0.6 of the time."""
    return weight.t().contiguous().t() if weight.device.type == "cpu" else weight


def expected_tensors(config: LlamaConfig) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor that the model is made of, by its name in the files."""
    hidden, vocab = config.hidden_size, config.vocab_size
    shapes: dict[str, tuple[int, ...]] = {_EMBEDDING: (vocab, hidden), _NORM: (hidden,)}
    if not config.tied_embeddings:
        shapes[_HEAD] = (vocab, hidden)
    for index in range(config.num_layers):
        prefix = f"model.layers.{index}."
        shapes[f"{prefix}input_layernorm.weight"] = (hidden,)
        shapes[f"{prefix}post_attention_layernorm.weight"] = (hidden,)
        if config.qk_norm:
            shapes[f"{prefix}{_QUERY_NORM}"] = shapes[f"{prefix}{_KEY_NORM}"] = (config.head_dim,)
        for name, (rows, columns, has_bias) in _projections(config).items():
            shapes[f"{prefix}{name}.weight"] = (rows, columns)
            if has_bias:
                shapes[f"{prefix}{name}.bias"] = (rows,)
    return shapes


def _projections(config: LlamaConfig) -> dict[str, tuple[int, int, bool]]:
    """Output size, input size and whether there is a bias."""
    hidden, inner = config.hidden_size, config.intermediate_size
    queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    qkv, mlp = config.qkv_bias, config.mlp_bias
    return {
        "self_attn.q_proj": (queries, hidden, qkv),
        "self_attn.k_proj": (keys, hidden, qkv),
        "self_attn.v_proj": (keys, hidden, qkv),
        "self_attn.o_proj": (hidden, queries, config.output_bias),
        "mlp.gate_proj": (inner, hidden, mlp),
        "mlp.up_proj": (inner, hidden, mlp),
        "mlp.down_proj": (hidden, inner, mlp),
    }


def _ignored(config: LlamaConfig) -> tuple[str, ...]:
    return (*_IGNORED, _HEAD) if config.tied_embeddings else _IGNORED


def _read_layer(read: Callable[[str], Tensor], prefix: str, config: LlamaConfig) -> _Layer:
    def joined(*names: str) -> _Linear:
        paths = [f"{prefix}{name}" for name in names]
        weight = torch.cat([read(f"{path}.weight") for path in paths])
        if not _projections(config)[names[0]][2]:
            return _Linear(weight, None)
        return _Linear(weight, torch.cat([read(f"{path}.bias") for path in paths]))

    qk_norm = None
    if config.qk_norm:
        query, key = read(f"{prefix}{_QUERY_NORM}"), read(f"{prefix}{_KEY_NORM}")
        qk_norm = torch.stack([query] * config.num_heads + [key] * config.num_kv_heads)
    return _Layer(
        attention_norm=read(f"{prefix}input_layernorm.weight"),
        qkv=joined("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        qk_norm=qk_norm,
        output=joined("self_attn.o_proj"),
        mlp_norm=read(f"{prefix}post_attention_layernorm.weight"),
        gate=joined("mlp.gate_proj"),
        up=joined("mlp.up_proj"),
        down=joined("mlp.down_proj"),
    )
