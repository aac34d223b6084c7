"""Rotary position embedding: how fast each pair of dimensions turns, and the tables of it.

One class for each kind of scaling that a `config.json` may name; kinds and keys that are not
understood are refused by name. All of it is computed in float32, as `transformers` does, whatever
the model computes in. It knows no weights and no KV.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from protocol.errors import ConfigError
from worker.engine.torch_fields import number, positive

_THETA: Final = 10_000.0
_COMMON_KEYS: Final = frozenset({"rope_type", "type", "rope_theta", "partial_rotary_factor"})
_HARMLESS_KEYS: Final = frozenset({"finetuned"})
"""Written by some training scripts, read by nobody."""


@dataclass(frozen=True, slots=True)
class PlainRope:
    """Pair `i` of `n` turns by `theta ** (-i / n)` radians a position."""

    theta: float

    @property
    def magnitude(self) -> float:
        """Factor of both tables."""
        return 1.0

    def frequencies(self, head_dim: int) -> Tensor:
        """Radians a position, one for each pair of dimensions."""
        return 1.0 / _wavelengths(self.theta, head_dim)


@dataclass(frozen=True, slots=True)
class LinearRope:
    """Positions closer together by `factor`."""

    theta: float
    factor: float

    @property
    def magnitude(self) -> float:
        return 1.0

    def frequencies(self, head_dim: int) -> Tensor:
        return (1.0 / _wavelengths(self.theta, head_dim)) / self.factor


@dataclass(frozen=True, slots=True)
class Llama3Rope:
    """Slow turns are stretched by `factor`, fast ones are kept, and those between are blended.

    How fast is counted in whole turns over the `trained_positions`.
    """

    theta: float
    factor: float
    slow_turns: float
    fast_turns: float
    trained_positions: int

    @property
    def magnitude(self) -> float:
        return 1.0

    def frequencies(self, head_dim: int) -> Tensor:
        kept = 1.0 / _wavelengths(self.theta, head_dim)
        stretched = kept / self.factor
        turns = self.trained_positions / (2 * math.pi / kept)
        share = (turns - self.slow_turns) / (self.fast_turns - self.slow_turns)
        blended = (1 - share) * stretched + share * kept
        slow_or_blended = torch.where(turns < self.slow_turns, stretched, blended)
        return torch.where(turns > self.fast_turns, kept, slow_or_blended)


@dataclass(frozen=True, slots=True)
class YarnRope:
    """As `Llama3Rope`, with the share of each pair rising evenly between two dimensions, and
    attention scores sharpened by the square of `magnitude`."""

    theta: float
    factor: float
    slow_turns: float
    fast_turns: float
    trained_positions: int
    magnitude: float
    whole_dimensions: bool
    """The two dimensions are rounded outwards."""

    def frequencies(self, head_dim: int) -> Tensor:
        wavelengths = _wavelengths(self.theta, head_dim)
        first = self._dimension(self.fast_turns, head_dim)
        last = self._dimension(self.slow_turns, head_dim)
        if self.whole_dimensions:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, head_dim - 1)
        pairs = torch.arange(head_dim // 2, dtype=torch.float32)
        # One step where both fall together: a share must not be 0 / 0.
        stretched = ((pairs - first) / ((last - first) or 1e-3)).clamp(0, 1)
        kept = 1 - stretched
        return 1.0 / (self.factor * wavelengths) * (1 - kept) + 1.0 / wavelengths * kept

    def _dimension(self, turns: float, head_dim: int) -> float:
        """The pair that makes so many turns over the trained positions, between the whole ones."""
        positions = self.trained_positions / (turns * 2 * math.pi)
        return head_dim * math.log(positions) / (2 * math.log(self.theta))


Rope = PlainRope | LinearRope | Llama3Rope | YarnRope


def rotary_tables(
    rope: Rope, head_dim: int, max_context: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Cosine and signed sine of each position and dimension: `[max_context, head_dim]` each."""
    angles = torch.outer(torch.arange(max_context).float(), rope.frequencies(head_dim))
    cos, sin = angles.cos() * rope.magnitude, angles.sin() * rope.magnitude
    return (
        torch.cat([cos, cos], dim=-1).to(device, dtype),
        torch.cat([-sin, sin], dim=-1).to(device, dtype),
    )


def read_rope(config: Mapping[str, Any], max_positions: int) -> Rope:
    """From a parsed `config.json`, in either spelling: `rope_theta` and `rope_scaling`, or
    `rope_parameters`. Raises ConfigError that names what is not supported."""
    rope = _spelled(config)
    theta = positive(rope, "rope_theta", float, positive(config, "rope_theta", float, _THETA))
    kind = rope.get("rope_type", rope.get("type", "default"))
    for where in (config, rope):
        if number(where, "partial_rotary_factor", float, 1.0) != 1.0:
            raise ConfigError("partial_rotary_factor is not supported")
    if not isinstance(kind, str) or kind not in _KINDS:
        known = ", ".join(repr(name) for name in _KINDS)
        raise ConfigError(f"rope scaling {kind!r} is not supported, only {known}")
    build, keys = _KINDS[kind]
    strange = sorted(set(rope) - _COMMON_KEYS - _HARMLESS_KEYS - keys)
    if strange:
        raise ConfigError(f"rope scaling {kind!r} with {strange[0]} is not supported")
    trained = positive(rope, "original_max_position_embeddings", int, max_positions)
    trained = positive(config, "original_max_position_embeddings", int, trained)
    return build(rope, theta, trained)


def _spelled(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The object that describes the embedding; empty if there is none."""
    found = {}
    for key in ("rope_scaling", "rope_parameters"):
        if config.get(key) is None:
            continue
        if not isinstance(config[key], dict):
            raise ConfigError(f"{key} must be an object")
        found[key] = config[key]
    if len(found) == 2 and found["rope_scaling"] != found["rope_parameters"]:
        raise ConfigError("rope_scaling and rope_parameters say different things")
    return next(iter(found.values()), {})


def _plain(rope: Mapping[str, Any], theta: float, trained_positions: int) -> PlainRope:
    return PlainRope(theta)


def _linear(rope: Mapping[str, Any], theta: float, trained_positions: int) -> LinearRope:
    return LinearRope(theta, positive(rope, "factor", float))


def _llama3(rope: Mapping[str, Any], theta: float, trained_positions: int) -> Llama3Rope:
    slow = positive(rope, "low_freq_factor", float)
    fast = positive(rope, "high_freq_factor", float)
    if fast <= slow:
        raise ConfigError(f"high_freq_factor {fast} must be above low_freq_factor {slow}")
    factor = positive(rope, "factor", float)
    return Llama3Rope(theta, factor, slow, fast, trained_positions)


def _yarn(rope: Mapping[str, Any], theta: float, trained_positions: int) -> YarnRope:
    if theta <= 1:
        raise ConfigError(f"rope_theta must be above 1 for yarn, not {theta}")
    factor = positive(rope, "factor", float)
    slow = positive(rope, "beta_slow", float, 1.0)
    fast = positive(rope, "beta_fast", float, 32.0)
    if fast < slow:
        raise ConfigError(f"beta_fast {fast} must not be below beta_slow {slow}")
    return YarnRope(
        theta=theta,
        factor=factor,
        slow_turns=slow,
        fast_turns=fast,
        trained_positions=trained_positions,
        magnitude=_yarn_magnitude(rope, factor),
        whole_dimensions=number(rope, "truncate", bool, True),
    )


def _yarn_magnitude(rope: Mapping[str, Any], factor: float) -> float:
    if rope.get("attention_factor") is not None:
        return positive(rope, "attention_factor", float)
    own = number(rope, "mscale", float, 0.0)
    all_dims = number(rope, "mscale_all_dim", float, 0.0)
    if own and all_dims:
        return _magnitude(factor, own) / _magnitude(factor, all_dims)
    return _magnitude(factor, 1.0)


def _magnitude(factor: float, scale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0


def _wavelengths(theta: float, head_dim: int) -> Tensor:
    """Positions that each pair of dimensions needs for one radian."""
    steps = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
    lengths: Tensor = theta**steps
    return lengths


_Build = Callable[[Mapping[str, Any], float, int], Rope]

_KINDS: Final[dict[str, tuple[_Build, frozenset[str]]]] = {
    "default": (_plain, frozenset({"factor", "original_max_position_embeddings"})),
    "linear": (_linear, frozenset({"factor", "original_max_position_embeddings"})),
    "llama3": (
        _llama3,
        frozenset(
            {
                "factor",
                "low_freq_factor",
                "high_freq_factor",
                "original_max_position_embeddings",
            }
        ),
    ),
    "yarn": (
        _yarn,
        frozenset(
            {
                "factor",
                "attention_factor",
                "beta_fast",
                "beta_slow",
                "mscale",
                "mscale_all_dim",
                "truncate",
                "original_max_position_embeddings",
            }
        ),
    ),
}
"""By the name in the config: how it is read, and the keys it may have besides the common ones."""
