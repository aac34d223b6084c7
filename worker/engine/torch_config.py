"""The shape of a Llama model, from the `config.json` of a Hugging Face folder.

What would change the numbers and is not understood here is refused by name: a model that almost
loads gives fluent nonsense. It knows no tensors.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, TypeVar

from protocol.errors import ConfigError

_ARCHITECTURE: Final = "LlamaForCausalLM"
_Value = TypeVar("_Value", int, float, bool)


@dataclass(frozen=True, slots=True)
class LlamaConfig:
    """Everything that shapes weights, KV and logits."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_positions: int
    norm_eps: float
    rope_theta: float
    attention_bias: bool
    mlp_bias: bool
    tied_embeddings: bool

    @property
    def num_groups(self) -> int:
        """Query heads for each KV head."""
        return self.num_heads // self.num_kv_heads

    def kv_bytes_per_token(self, item_bytes: int) -> int:
        return self.num_layers * 2 * self.num_kv_heads * self.head_dim * item_bytes


def read_llama_config(config: Mapping[str, Any], where: str) -> LlamaConfig:
    """`config` is the parsed file. Raises ConfigError with one line that begins with `where`."""
    try:
        _check_supported(config)
        return _checked(_read(config))
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None


def _read(config: Mapping[str, Any]) -> LlamaConfig:
    hidden_size = _number(config, "hidden_size", int)
    num_heads = _number(config, "num_attention_heads", int)
    return LlamaConfig(
        vocab_size=_number(config, "vocab_size", int),
        hidden_size=hidden_size,
        intermediate_size=_number(config, "intermediate_size", int),
        num_layers=_number(config, "num_hidden_layers", int),
        num_heads=num_heads,
        num_kv_heads=_number(config, "num_key_value_heads", int, num_heads),
        head_dim=_number(config, "head_dim", int, hidden_size // max(num_heads, 1)),
        max_positions=_number(config, "max_position_embeddings", int, 2048),
        norm_eps=_number(config, "rms_norm_eps", float, 1e-6),
        rope_theta=_rope_theta(config),
        attention_bias=_number(config, "attention_bias", bool, False),
        mlp_bias=_number(config, "mlp_bias", bool, False),
        tied_embeddings=_number(config, "tie_word_embeddings", bool, False),
    )


def _check_supported(config: Mapping[str, Any]) -> None:
    architectures = config.get("architectures") or []
    if architectures != [_ARCHITECTURE] and (architectures or config.get("model_type") != "llama"):
        named = ", ".join(map(str, architectures)) if isinstance(architectures, list) else ""
        named = named or str(config.get("model_type", "unknown"))
        raise ConfigError(f"architecture {named} is not supported, only {_ARCHITECTURE}")
    if config.get("hidden_act", "silu") != "silu":
        raise ConfigError(f"hidden_act {config['hidden_act']!r} is not supported, only 'silu'")
    if config.get("quantization_config"):
        raise ConfigError("quantized weights (quantization_config) are not supported")


def _rope_theta(config: Mapping[str, Any]) -> float:
    """The base of the rotary embedding, which must be the plain one."""
    theta = _number(config, "rope_theta", float, 10_000.0)
    for key in ("rope_scaling", "rope_parameters"):
        rope = config.get(key)
        if rope is None:
            continue
        if not isinstance(rope, dict):
            raise ConfigError(f"{key} must be an object")
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind != "default":
            raise ConfigError(f"rope scaling {kind!r} is not supported, only 'default'")
        if rope.get("partial_rotary_factor", 1.0) != 1.0:
            raise ConfigError("partial_rotary_factor is not supported")
        theta = _number(rope, "rope_theta", float, theta)
    return theta


def _number(
    config: Mapping[str, Any], key: str, kind: type[_Value], default: _Value | None = None
) -> _Value:
    value = config.get(key)
    if value is None:
        value = default
    if value is None:
        raise ConfigError(f"{key} is missing")
    # JSON writes 1e4 as 10000; a bool is an int to Python and a mistake to us
    accepted = (int, float) if kind is float else (kind,)
    if not isinstance(value, accepted) or (kind is not bool and isinstance(value, bool)):
        raise ConfigError(f"{key} must be {kind.__name__}, not {value!r}")
    return kind(value)


def _checked(config: LlamaConfig) -> LlamaConfig:
    for field in config.__slots__:
        value = getattr(config, field)
        if not isinstance(value, bool) and not value > 0:
            raise ConfigError(f"{field} must be above 0, not {value}")
    if config.num_heads % config.num_kv_heads:
        raise ConfigError(
            f"{config.num_heads} attention heads cannot share {config.num_kv_heads} KV heads"
        )
    if config.head_dim % 2:
        raise ConfigError(f"head_dim {config.head_dim} is odd: rotary embeddings need pairs")
    return config
