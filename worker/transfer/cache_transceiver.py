"""TensorRT-LLM's settings of the KV transfer, in its names: `cache_transceiver_config`, variables.

The section is as strict as TensorRT-LLM's own model: an unknown key or a wrong type is an error.
What has a meaning here becomes Baton's own flat settings; what has none is accepted and named, so
that the log can say so once. Environment and values are arguments; nothing is read or set here.

    backend                               transfer: DEFAULT and NIXL nixl, UCX ucx, SHM shm, TCP tcp
    max_tokens_in_buffer                  the same: tokens being pulled at once, never a limit of a
                                          request: a longer prompt is pulled alone; 0: no bound
    kv_transfer_timeout_ms                the same; null keeps Baton's default: no pull is endless
    kv_transfer_sender_future_timeout_ms  none: sending never holds up an engine step here
"""

import difflib
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from protocol.errors import ConfigError

SECTION: Final = "cache_transceiver_config"

_TRANSFERS: Final = {"NIXL": "nixl", "UCX": "ucx", "SHM": "shm", "TCP": "tcp"}
_NOT_HERE: Final = ("MPI", "MOONCAKE")
_SWITCHES: Final = {
    "TRTLLM_USE_NIXL_KVCACHE": "NIXL",
    "TRTLLM_USE_UCX_KVCACHE": "UCX",
    "TRTLLM_USE_MPI_KVCACHE": "MPI",
    "TRTLLM_USE_MOONCAKE_KVCACHE": "MOONCAKE",
}
NIXL_BACKEND: Final = "TRTLLM_NIXL_KVCACHE_BACKEND"
_NIXL_BACKENDS: Final = ("UCX", "LIBFABRIC")
_PLUGIN_DIRS: Final = ("NIXL_PLUGINS_DIR", "NIXL_PLUGIN_DIR")
"""TensorRT-LLM's documented name; NIXL's own."""
MEANINGLESS: Final = (
    "TRTLLM_DISABLE_KV_CACHE_TRANSFER_OVERLAP",
    "TRTLLM_ENABLE_KVCACHE_RECEIVE_PARALLEL",
    "TRTLLM_REQUEST_KV_CACHE_CONCURRENT",
    "TRTLLM_PARALLEL_CACHE_SEND",
    "TRTLLM_KVCACHE_SEND_MAX_CONCURRENCY_NUM",
    "TRTLLM_TRY_ZCOPY_FOR_KVCACHE_TRANSFER",
    "TRTLLM_KVCACHE_TRANSFER_BUFFER_SIZE",
    "TRTLLM_KVCACHE_TRANSFER_USE_ASYNC_BUFFER",
    "TRTLLM_DISAGG_LAYERWISE",
    "TRTLLM_DISAGG_BENCHMARK_GEN_ONLY",
    "TRTLLM_DISAGG_NO_RETRY",
    "TRTLLM_DISAGG_COORDINATOR_RESERVATION_TIMEOUT",
    "TRTLLM_DISAGG_WORKER_PROCESS_ID",
    "TRTLLM_KVCACHE_AWARE_ROUTER_HASH_TOKENS_PER_BLOCK",
    "NCCL_GRAPH_MIXING_SUPPORT",
)
"""Variables of TensorRT-LLM that change nothing here."""

_LONGEST: Final = (1 << 31) - 1


@dataclass(slots=True)
class Transceiver:
    """What was asked for, in Baton's names, and what is to be said about the rest."""

    settings: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def read_section(section: object, environ: Mapping[str, str]) -> Transceiver:
    """`section` is what stands under `cache_transceiver_config`; None where there is none. Raises
    ConfigError with one line."""
    given = {} if section is None else section
    if not isinstance(given, dict):
        raise ConfigError(f"{SECTION} must be a mapping of names to values")
    for key in given:
        if key not in _READERS:
            raise ConfigError(f"{SECTION}: unknown key `{key}`{nearest(str(key), _READERS)}")
    found = Transceiver()
    for key, value in given.items():
        _READERS[key](key, value, found)
    _read_switches(given.get("backend"), environ, found)
    unused = sorted(key for key in given if key in _UNUSED)
    if unused:
        found.notes.append(f"{SECTION}: without effect here: {', '.join(unused)}")
    return found


def read_environment(environ: Mapping[str, str]) -> Transceiver:
    """The variables that count with or without the section."""
    found = Transceiver()
    backend = environ.get(NIXL_BACKEND, "").strip()
    if backend:
        known = backend.upper() in _NIXL_BACKENDS
        found.settings["nixl_backend"] = backend.upper() if known else "UCX"
        if not known:
            found.notes.append(f"{NIXL_BACKEND}={backend} is not known: UCX is used")
    for name in _PLUGIN_DIRS:
        if environ.get(name):
            found.settings["nixl_plugin_dir"] = environ[name]
            break
    unused = [name for name in MEANINGLESS if name in environ]
    if unused:
        found.notes.append(f"variables without effect here: {', '.join(unused)}")
    return found


def nearest(name: str, known: Collection[str]) -> str:
    """`; did you mean ...?`, or nothing."""
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"; did you mean `{near[0]}`?" if near else ""


def _read_switches(given: object, environ: Mapping[str, str], found: Transceiver) -> None:
    """They choose the backend where the section leaves it open (DEFAULT, null or not there)."""
    switched = [name for name in _SWITCHES if environ.get(name) == "1"]
    if given is not None and str(given).upper() != "DEFAULT":
        if switched:
            names = ", ".join(switched)
            found.notes.append(f"{SECTION}.backend is {given}: {names} is not looked at")
        return
    if len(switched) > 1:
        raise ConfigError(f"{' and '.join(switched)} are both 1: one backend only")
    if switched:
        found.settings["transfer"] = _transfer(_SWITCHES[switched[0]], switched[0])


def _read_backend(key: str, value: object, found: Transceiver) -> None:
    if value is None:
        return
    if not isinstance(value, str):
        raise ConfigError(f"{SECTION}.{key}: expected a name, got {value!r}")
    name = "NIXL" if value.upper() == "DEFAULT" else value.upper()
    found.settings["transfer"] = _transfer(name, f"{SECTION}.{key}")


def _transfer(name: str, where: str) -> str:
    if name in _NOT_HERE:
        raise ConfigError(f"{where}: {name} is not supported here; use NIXL, UCX, SHM or TCP")
    if name not in _TRANSFERS:
        known = ("DEFAULT", *_TRANSFERS)
        raise ConfigError(f"{where}: unknown backend {name!r}{nearest(name, known)}")
    return _TRANSFERS[name]


def _read_tokens(key: str, value: object, found: Transceiver) -> None:
    number = None if value is None else _whole(key, value, least=0)
    found.settings["max_tokens_in_buffer"] = number or None


def _read_timeout(key: str, value: object, found: Transceiver) -> None:
    if value is None:
        found.notes.append(f"{SECTION}.{key} is null: Baton's default holds, no pull is endless")
        return
    found.settings["kv_transfer_timeout_ms"] = _whole(key, value, least=1)


def _check_time(key: str, value: object, _found: Transceiver) -> None:
    if value is not None:
        _whole(key, value, least=1)


def _check_size(key: str, value: object, _found: Transceiver) -> None:
    _whole(key, value, least=0)


def _check_flag(key: str, value: object, _found: Transceiver) -> None:
    if not isinstance(value, bool):
        raise ConfigError(f"{SECTION}.{key}: expected true or false, got {value!r}")


def _check_runtime(key: str, value: object, _found: Transceiver) -> None:
    if value is not None and str(value).upper() not in ("CPP", "PYTHON", "AUTO"):
        raise ConfigError(f"{SECTION}.{key}: expected CPP, PYTHON or auto, got {value!r}")


def _whole(key: str, value: object, *, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ConfigError(f"{SECTION}.{key}: expected a whole number, got {value!r}")
    if not least <= value <= _LONGEST:
        raise ConfigError(f"{SECTION}.{key} must be {least} to {_LONGEST}, not {value}")
    return value


_UNUSED: Final = {
    "transceiver_runtime": _check_runtime,
    "kv_transfer_sender_future_timeout_ms": _check_time,
    "kv_transfer_poll_interval_ms": _check_time,
    "kv_cache_bounce_size_mb": _check_size,
    "enable_pipelined_transfer": _check_flag,
}
_READERS: Final = {
    "backend": _read_backend,
    "max_tokens_in_buffer": _read_tokens,
    "kv_transfer_timeout_ms": _read_timeout,
    **_UNUSED,
}
