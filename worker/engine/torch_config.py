"""The shape of a Llama-like model, from the `config.json` of a Hugging Face folder.

Llama, Mistral, Qwen2 and Qwen3 are one decoder with options: which projections have a bias, whether
queries and keys are normalised, how far back each layer looks. What would change the numbers and is
not understood here is refused by name: a model that almost loads gives fluent nonsense.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from protocol.errors import ConfigError
from worker.engine.torch_fields import number, positive
from worker.engine.torch_rope import Rope, read_rope

Windows = tuple[int | None, ...]
"""For each layer: a token sees itself and those before it, so many in all; None: all of them."""


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
    rope: Rope
    windows: Windows
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    qk_norm: bool
    """Queries and keys are normalised, head by head, before they are turned."""
    tied_embeddings: bool

    def kv_bytes_per_token(self, item_bytes: int) -> int:
        return self.num_layers * 2 * self.num_kv_heads * self.head_dim * item_bytes


@dataclass(frozen=True, slots=True)
class _Family:
    """What an architecture's name says, and what its config means where it is silent."""

    model_type: str
    max_positions: int
    read_windows: Callable[[Mapping[str, Any], int], Windows]
    num_kv_heads: int | None = None
    """None: as many as heads."""
    head_dim: int | None = None
    """None: the hidden size is shared among the heads."""
    has_attention_bias: bool = False
    """The config may ask for a bias of all four projections of attention."""
    has_mlp_bias: bool = False
    qkv_bias: bool = False
    qk_norm: bool = False


def read_llama_config(config: Mapping[str, Any], where: str) -> LlamaConfig:
    """`config` is the parsed file. Raises ConfigError with one line that begins with `where`."""
    try:
        family = _family(config)
        _check_supported(config)
        return _checked(_read(config, family))
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None


def read_dtype(config: Mapping[str, Any], where: str) -> str:
    """The type that the weights were made for, as the config names it; float32 if it does not."""
    name = config.get("dtype") or config.get("torch_dtype") or "float32"
    if name not in ("float32", "bfloat16", "float16"):
        raise ConfigError(f"{where}: dtype {name!r} is not supported: set dtype to another")
    return str(name)


def _read(config: Mapping[str, Any], family: _Family) -> LlamaConfig:
    hidden_size = positive(config, "hidden_size", int)
    num_heads = positive(config, "num_attention_heads", int)
    num_layers = positive(config, "num_hidden_layers", int)
    max_positions = positive(config, "max_position_embeddings", int, family.max_positions)
    attention_bias = family.has_attention_bias and number(config, "attention_bias", bool, False)
    return LlamaConfig(
        vocab_size=positive(config, "vocab_size", int),
        hidden_size=hidden_size,
        intermediate_size=positive(config, "intermediate_size", int),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=_num_kv_heads(config, family, num_heads),
        head_dim=positive(config, "head_dim", int, family.head_dim or hidden_size // num_heads),
        max_positions=max_positions,
        norm_eps=positive(config, "rms_norm_eps", float, 1e-6),
        rope=read_rope(config, max_positions),
        windows=family.read_windows(config, num_layers),
        qkv_bias=family.qkv_bias or attention_bias,
        output_bias=attention_bias,
        mlp_bias=family.has_mlp_bias and number(config, "mlp_bias", bool, False),
        qk_norm=family.qk_norm,
        tied_embeddings=number(config, "tie_word_embeddings", bool, False),
    )


def _family(config: Mapping[str, Any]) -> _Family:
    """The architecture named, or that of the model type if none is."""
    architectures = config.get("architectures") or []
    model_type = config.get("model_type")
    if isinstance(architectures, list) and len(architectures) < 2:
        for name, family in _FAMILIES.items():
            if architectures == [name] and model_type in (None, family.model_type):
                return family
            if not architectures and model_type == family.model_type:
                return family
        if architectures and str(architectures[0]) in _FAMILIES:
            raise ConfigError(f"model_type {model_type!r} is not that of {architectures[0]}")
    named = ", ".join(map(str, architectures)) if isinstance(architectures, list) else ""
    named = named or str(model_type or "unknown")
    raise ConfigError(f"architecture {named} is not supported, only {', '.join(_FAMILIES)}")


def _check_supported(config: Mapping[str, Any]) -> None:
    if config.get("hidden_act", "silu") != "silu":
        raise ConfigError(f"hidden_act {config['hidden_act']!r} is not supported, only 'silu'")
    if config.get("quantization_config"):
        raise ConfigError("quantized weights (quantization_config) are not supported")


def _num_kv_heads(config: Mapping[str, Any], family: _Family, num_heads: int) -> int:
    """Null means as many as heads; a missing key means what the family says."""
    if config.get("num_key_value_heads", family.num_kv_heads) is None:
        return num_heads
    return positive(config, "num_key_value_heads", int, family.num_kv_heads)


def _checked(config: LlamaConfig) -> LlamaConfig:
    if config.num_heads % config.num_kv_heads:
        raise ConfigError(
            f"{config.num_heads} attention heads cannot share {config.num_kv_heads} KV heads"
        )
    if config.head_dim < 1 or config.head_dim % 2:
        raise ConfigError(f"head_dim {config.head_dim} is odd: rotary embeddings need pairs")
    return config


# how far back the layers look


def _no_windows(config: Mapping[str, Any], num_layers: int) -> Windows:
    return (None,) * num_layers


def _mistral_windows(config: Mapping[str, Any], num_layers: int) -> Windows:
    """The same for every layer."""
    window = _window(config)
    kind = "full_attention" if window is None else "sliding_attention"
    if (config.get("layer_types") or [kind] * num_layers) != [kind] * num_layers:
        raise ConfigError(f"layer_types of a Mistral model that are not all {kind!r}")
    return (window,) * num_layers


def _qwen_windows(config: Mapping[str, Any], num_layers: int) -> Windows:
    """A switch, and the layers it is for: those named, or all from `max_window_layers` on."""
    window = _window(config) if number(config, "use_sliding_window", bool, False) else None
    kinds = config.get("layer_types")
    if kinds is None:
        first = number(config, "max_window_layers", int, 28)
        return tuple(None if layer < first else window for layer in range(num_layers))
    if not isinstance(kinds, list) or len(kinds) != num_layers:
        raise ConfigError(f"layer_types must be a list of {num_layers} names")
    for kind in kinds:
        if kind not in ("full_attention", "sliding_attention"):
            raise ConfigError(f"layer type {kind!r} is not supported")
        if kind == "sliding_attention" and window is None:
            raise ConfigError("layer_types name sliding_attention, and no sliding_window is in use")
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def _window(config: Mapping[str, Any]) -> int | None:
    """Null means none; a missing key means 4096."""
    if config.get("sliding_window", 4096) is None:
        return None
    return positive(config, "sliding_window", int, 4096)


_FAMILIES: Final = {
    "LlamaForCausalLM": _Family(
        "llama", 2048, _no_windows, has_attention_bias=True, has_mlp_bias=True
    ),
    "MistralForCausalLM": _Family("mistral", 131_072, _mistral_windows, num_kv_heads=8),
    "Qwen2ForCausalLM": _Family("qwen2", 32_768, _qwen_windows, num_kv_heads=32, qkv_bias=True),
    "Qwen3ForCausalLM": _Family(
        "qwen3",
        32_768,
        _qwen_windows,
        num_kv_heads=32,
        head_dim=128,
        has_attention_bias=True,
        qk_norm=True,
    ),
}
