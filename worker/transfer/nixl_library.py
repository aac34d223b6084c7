"""NIXL's wheel, opened: which one is there, and an agent that disturbs nobody.

Out of the box an agent burns a core (its progress thread polls without a pause), writes to stdout,
takes over the `nixl` logger and `logging.raiseExceptions`, and cannot be made where the home
directory is closed. Here is what prevents that. Knows nothing of blocks or transfers.
"""

import contextlib
import importlib
import importlib.util
import logging
import os
import sys
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal, Protocol

from protocol.errors import ConfigError
from worker.transfer.nixl_interfaces import interface_of

_logger = logging.getLogger(__name__)

Backend = Literal["UCX", "LIBFABRIC"]
Handle = object
"""A transfer of the library's: opaque."""
Descriptors = object
"""Places in memory, of the library's: opaque."""

_PACKAGES: Final = ("nixl_cu13", "nixl_cu12")
"""The first that is there; both in one process do not go together."""
_PROGRESS_DELAY_US: Final = 10_000
"""The longest sleep of the agent's progress thread. It wakes for whatever arrives; the length only
bounds its idle rounds (measured at idle: 0 us 100 % of a core, 1 ms 3 %, 10 ms 0.8 %)."""
_opening: Final = threading.Lock()
"""What is changed for the time of opening belongs to the whole process."""


class Agent(Protocol):
    """The part of `nixl_agent` that is used here; to be called from one thread only."""

    backends: dict[str, Any]

    def register_memory(self, regions: Any, mem_type: str, backends: list[str]) -> object: ...
    def get_agent_metadata(self) -> bytes: ...
    def add_remote_agent(self, metadata: bytes) -> str | bytes: ...
    def remove_remote_agent(self, agent: str) -> None: ...
    def get_xfer_descs(self, places: list[tuple[int, int, int]], mem_type: str) -> Descriptors: ...
    def initialize_xfer(
        self,
        operation: str,
        local: Descriptors,
        remote: Descriptors,
        agent: str,
        notif_msg: bytes,
        backends: list[str],
    ) -> Handle: ...
    def transfer(self, handle: Handle) -> str: ...
    def check_xfer_state(self, handle: Handle) -> str: ...
    def release_xfer_handle(self, handle: Handle) -> None: ...


@dataclass(frozen=True, slots=True)
class OpenAgent:
    """An agent, and what the library calls its errors."""

    agent: Agent
    backend: Backend
    """The one that was loaded, which need not be the one asked for."""
    errors: tuple[type[Exception], ...]
    refused: tuple[type[Exception], ...]
    """What loading a source's metadata raises where nobody answers."""
    disconnected: tuple[type[Exception], ...]
    """What a transfer raises when its source is not there any more."""
    not_begun: tuple[type[Exception], ...]
    """What loading metadata or preparing a transfer may raise, the bindings' own included: what
    they were given was wrong, and nothing has begun."""


def nixl_unavailable() -> str:
    """Why NIXL cannot run here; empty if it can. Loads nothing."""
    if not sys.platform.startswith("linux"):
        return "NIXL is for Linux"
    if _package() is None:
        return "neither nixl-cu13 nor nixl-cu12 is installed"
    if importlib.util.find_spec("numpy") is None:
        return "numpy is not installed, which NIXL needs"
    return ""


def open_agent(name: str, backend: Backend, *, host: str = "", plugin_dir: str = "") -> OpenAgent:
    """A new agent with one backend; takes half a second. LIBFABRIC that cannot be loaded becomes
    UCX, and the log says so. Raises ConfigError."""
    missing = nixl_unavailable()
    if missing:
        raise ConfigError(f"transfer nixl: {missing}")
    with _opening, _environment(overrides(os.environ, host=host, plugin_dir=plugin_dir)):
        package = _package()
        assert package is not None
        api, bindings = _load(package)
        if backend == "LIBFABRIC":
            try:
                return _opened(api, bindings, name, backend)
            except ConfigError as error:
                _logger.warning("%s; UCX is used instead", error)
        return _opened(api, bindings, name, "UCX")


def overrides(environ: Mapping[str, str], *, host: str, plugin_dir: str) -> dict[str, str]:
    """What NIXL and UCX must find in the environment when an agent is made. What the operator set
    stays, but for the plug-ins' folder, which is the operator's too."""
    wanted = {"UCX_LOG_FILE": "stderr"}  # by itself UCX writes to stdout
    if not _is_accessible(environ.get("HOME", "")):
        wanted["NIXL_CONFIG_FILE"] = os.devnull  # instead of $HOME/.nixl.cfg
    interface = interface_of(host)
    if interface:
        wanted["UCX_NET_DEVICES"] = interface  # by itself UCX spreads over all there are
    changes = {key: value for key, value in wanted.items() if key not in environ}
    if plugin_dir:
        changes |= {"NIXL_PLUGIN_DIR": plugin_dir, "NIXL_PLUGINS_DIR": plugin_dir}
    return changes


def _package() -> str | None:
    return next((name for name in _PACKAGES if importlib.util.find_spec(name)), None)


def _load(package: str) -> tuple[Any, Any]:
    """Raises ConfigError."""
    raises = logging.raiseExceptions
    try:
        api = importlib.import_module(f"{package}._api")
        bindings = importlib.import_module(f"{package}._bindings")
    except ImportError as error:
        raise ConfigError(f"transfer nixl: {package} cannot be loaded: {error}") from error
    finally:
        logging.raiseExceptions = raises
    logger = logging.getLogger("nixl")
    for handler in list(logger.handlers):  # its own writes to stdout
        logger.removeHandler(handler)
    logger.propagate = True
    if "NIXL_LOG_LEVEL" not in os.environ:
        logger.setLevel(logging.WARNING)
    return api, bindings


def _opened(api: Any, bindings: Any, name: str, backend: Backend) -> OpenAgent:
    """Raises ConfigError."""
    errors = _errors(bindings)
    expected: tuple[type[Exception], ...] = (*errors, RuntimeError, OSError)
    try:
        agent = _make(api, bindings, name, backend)
    except expected as error:
        tls = os.environ.get("UCX_TLS")
        hint = f" (UCX_TLS={tls}: it must leave tcp in)" if tls and backend == "UCX" else ""
        raise ConfigError(
            f"transfer nixl: backend {backend} cannot be loaded: {error}{hint}"
        ) from error
    if backend not in agent.backends:  # an unknown one is only warned of
        raise ConfigError(f"transfer nixl: there is no backend {backend} in this wheel")
    return OpenAgent(
        agent,
        backend,
        errors,
        refused=(bindings.nixlBackendError, bindings.nixlRemoteDisconnectError),
        disconnected=(bindings.nixlRemoteDisconnectError,),
        not_begun=(*errors, RuntimeError, TypeError, ValueError, MemoryError),
    )


def _make(api: Any, bindings: Any, name: str, backend: Backend) -> Agent:
    """The wheel has no setting for the progress thread's pause: while the agent is made, its
    configuration's class is replaced by one that knows better."""
    original = bindings.nixlAgentConfig
    was_set = False

    class Unhurried(original):  # type: ignore[misc, valid-type]
        def __setattr__(self, key: str, value: object) -> None:
            nonlocal was_set
            if key == "pthrDelay":
                was_set, value = True, _PROGRESS_DELAY_US
            super().__setattr__(key, value)

    bindings.nixlAgentConfig = Unhurried
    try:
        agent: Agent = api.nixl_agent(name, api.nixl_agent_config(backends=[backend]))
    finally:
        bindings.nixlAgentConfig = original
    if not was_set:
        _logger.warning("nixl: this version's progress thread cannot be slowed: it burns a core")
    return agent


def _errors(bindings: Any) -> tuple[type[Exception], ...]:
    found = [value for name, value in vars(bindings).items() if name.startswith("nixl")]
    return tuple(v for v in found if isinstance(v, type) and issubclass(v, Exception))


def _is_accessible(home: str) -> bool:
    try:
        os.stat(os.path.join(home, ".nixl.cfg"))
    except PermissionError:
        return False
    except OSError:
        pass  # the usual case: there is none
    return True


@contextlib.contextmanager
def _environment(changes: Mapping[str, str]) -> Iterator[None]:
    before = {key: os.environ.get(key) for key in changes}
    os.environ.update(changes)
    try:
        yield
    finally:
        for key, value in before.items():
            if value is None:
                os.environ.pop(key, None)
            else:
                os.environ[key] = value
