"""Llama: token ids in, logits out, KV into the blocks that the batch names.

Written to agree with the reference implementation in `transformers` to float noise. All tokens of a
step go through the linear layers together; attention is by parts. It knows no jobs and no arena.
"""

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor
from torch.nn import functional

from worker.engine.torch_attention import Batch, PagedKv
from worker.engine.torch_config import LlamaConfig
from worker.engine.torch_weights import Weights

_EMBEDDING: Final = "model.embed_tokens.weight"
_HEAD: Final = "lm_head.weight"
_NORM: Final = "model.norm.weight"
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
    output: _Linear
    mlp_norm: Tensor
    gate_up: _Linear
    down: _Linear


class LlamaModel:
    """The weights, and the computation of one step. Call it under `torch.inference_mode`."""

    def __init__(
        self, config: LlamaConfig, weights: Weights, *, dtype: torch.dtype, max_context: int
    ) -> None:
        """Positions are below `max_context`. Raises ConfigError if the weights do not fit."""
        weights.check(expected_tensors(config), optional=_ignored(config))
        self._config = config
        self._embedding = weights.read(_EMBEDDING, dtype)
        self._layers = [
            _read_layer(weights, f"model.layers.{index}.", config, dtype)
            for index in range(config.num_layers)
        ]
        self._norm = weights.read(_NORM, dtype)
        self._head = self._embedding if config.tied_embeddings else weights.read(_HEAD, dtype)
        self._cos, self._sin = rotary_tables(config, max_context, dtype)

    def hidden(self, batch: Batch, kv: PagedKv) -> Tensor:
        """Write the KV of all rows; `[row, hidden_size]` after the last layer."""
        kv.clear_fresh(batch)
        rows = functional.embedding(batch.ids, self._embedding)
        cos = self._cos.index_select(0, batch.positions).unsqueeze(1)
        sin = self._sin.index_select(0, batch.positions).unsqueeze(1)
        for index, layer in enumerate(self._layers):
            attended = self._attend(index, layer, rows, batch, kv, cos, sin)
            rows = rows + layer.output(attended)
            gate, up = layer.gate_up(self._normed(rows, layer.mlp_norm)).chunk(2, dim=-1)
            rows = rows + layer.down(functional.silu(gate) * up)
        return rows

    def logits(self, hidden: Tensor) -> Tensor:
        """`[row, vocab_size]` in float32, of the rows given."""
        return functional.linear(self._normed(hidden, self._norm), self._head).float()

    def _attend(
        self, index: int, layer: _Layer, rows: Tensor, batch: Batch, kv: PagedKv,
        cos: Tensor, sin: Tensor,
    ) -> Tensor:  # fmt: skip
        config = self._config
        heads, dim = config.num_heads, config.head_dim
        qkv = layer.qkv(self._normed(rows, layer.attention_norm)).view(rows.shape[0], -1, dim)
        rotated = qkv[:, : heads + config.num_kv_heads]
        # The table's sine has the sign of the half that is moved.
        moved = torch.cat((rotated[..., dim // 2 :], rotated[..., : dim // 2]), dim=-1)
        rotated.mul_(cos).addcmul_(moved, sin)
        own = qkv[:, heads:].view(-1, 2, config.num_kv_heads, dim)
        kv.write(index, batch, own)
        return kv.attend(index, batch, qkv[:, :heads], own)

    def _normed(self, rows: Tensor, weight: Tensor) -> Tensor:
        """RMS norm; the mean square in float32 whatever the rows are."""
        normed = functional.rms_norm(rows.float(), rows.shape[-1:], None, self._config.norm_eps)
        return normed.to(rows.dtype) * weight


def rotary_tables(
    config: LlamaConfig, max_context: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Cosine and signed sine of each position and dimension: `[max_context, head_dim]` each."""
    steps = torch.arange(0, config.head_dim, 2, dtype=torch.int64).float() / config.head_dim
    frequencies = 1.0 / (config.rope_theta**steps)
    angles = torch.outer(torch.arange(max_context).float(), frequencies)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([cos, cos], dim=-1).to(dtype), torch.cat([-sin, sin], dim=-1).to(dtype)


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
        for name, (rows, columns, has_bias) in _projections(config).items():
            shapes[f"{prefix}{name}.weight"] = (rows, columns)
            if has_bias:
                shapes[f"{prefix}{name}.bias"] = (rows,)
    return shapes


def _projections(config: LlamaConfig) -> dict[str, tuple[int, int, bool]]:
    """Output size, input size and whether there is a bias."""
    hidden, inner = config.hidden_size, config.intermediate_size
    queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    attention, mlp = config.attention_bias, config.mlp_bias
    return {
        "self_attn.q_proj": (queries, hidden, attention),
        "self_attn.k_proj": (keys, hidden, attention),
        "self_attn.v_proj": (keys, hidden, attention),
        "self_attn.o_proj": (hidden, queries, attention),
        "mlp.gate_proj": (inner, hidden, mlp),
        "mlp.up_proj": (inner, hidden, mlp),
        "mlp.down_proj": (hidden, inner, mlp),
    }


def _ignored(config: LlamaConfig) -> tuple[str, ...]:
    return (*_IGNORED, _HEAD) if config.tied_embeddings else _IGNORED


def _read_layer(
    weights: Weights, prefix: str, config: LlamaConfig, dtype: torch.dtype
) -> _Layer:  # fmt: skip
    def joined(*names: str) -> _Linear:
        paths = [f"{prefix}{name}" for name in names]
        weight = torch.cat([weights.read(f"{path}.weight", dtype) for path in paths])
        if not _projections(config)[names[0]][2]:
            return _Linear(weight, None)
        return _Linear(weight, torch.cat([weights.read(f"{path}.bias", dtype) for path in paths]))

    return _Layer(
        attention_norm=weights.read(f"{prefix}input_layernorm.weight", dtype),
        qkv=joined("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        output=joined("self_attn.o_proj"),
        mlp_norm=weights.read(f"{prefix}post_attention_layernorm.weight", dtype),
        gate_up=joined("mlp.gate_proj", "mlp.up_proj"),
        down=joined("mlp.down_proj"),
    )
