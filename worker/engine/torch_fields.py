"""Values of a model's `config.json`, checked for their type. It knows no model and no tensors."""

from collections.abc import Mapping
from typing import Any, TypeVar

from protocol.errors import ConfigError

_Value = TypeVar("_Value", int, float, bool)


def number(
    config: Mapping[str, Any], key: str, kind: type[_Value], default: _Value | None = None
) -> _Value:
    """`config[key]`; null counts as missing. Raises ConfigError that names the key."""
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


def positive(
    config: Mapping[str, Any], key: str, kind: type[_Value], default: _Value | None = None
) -> _Value:
    """The same, above 0."""
    value = number(config, key, kind, default)
    if not value > 0:
        raise ConfigError(f"{key} must be above 0, not {value}")
    return value
