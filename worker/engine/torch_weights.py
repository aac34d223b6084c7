"""Tensors of a model folder: one `model.safetensors`, or shards with their index.

Opens, checks names and shapes before anything large is read, and digests. Every error is one
ConfigError line that names the file. It knows no model: callers say which tensors they expect.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError, safe_open

from protocol.errors import ConfigError

_SINGLE: Final = "model.safetensors"
_INDEX: Final = "model.safetensors.index.json"
_FLOATS: Final = frozenset({"F64", "F32", "F16", "BF16"})
_WHOLE_BYTES: Final = 256 << 20
_PIECE_BYTES: Final = 1 << 20
_NUM_PIECES: Final = 64


class Weights:
    """The open files of a folder. Tensors are read when asked for, and are copies."""

    def __init__(self, folder: Path, files: Mapping[str, Any], owner: Mapping[str, str]) -> None:
        """`files`: open file by name; `owner`: the file each tensor is in."""
        self._folder = folder
        self._files = files
        self._owner = owner

    @property
    def names(self) -> frozenset[str]:
        return frozenset(self._owner)

    def check(self, expected: Mapping[str, tuple[int, ...]], *, optional: Iterable[str]) -> None:
        """The tensors are exactly those `expected`, with these shapes, as floating-point numbers.

        A tensor nobody expects means a model other than its config says; those whose names end in
        one of `optional` may be there.
        """
        missing = sorted(set(expected) - self.names)
        if missing:
            raise ConfigError(_listing(self._folder, "has no tensor", missing))
        endings = tuple(optional)
        extra = sorted(n for n in self.names - set(expected) if not n.endswith(endings))
        if extra:
            raise ConfigError(_listing(self._folder, "has an unexpected tensor", extra))
        for name, shape in expected.items():
            self._check_tensor(name, shape)

    def read(
        self, name: str, dtype: torch.dtype, device: torch.device | str = "cpu"
    ) -> torch.Tensor:
        """Memory of its own: the files may be replaced while the model runs."""
        file = self._owner[name]
        with _reading(self._folder / file):
            stored: torch.Tensor = self._files[file].get_tensor(name)
            return stored.to(device, dtype, copy=True)

    def _check_tensor(self, name: str, shape: tuple[int, ...]) -> None:
        file = self._owner[name]
        path = self._folder / file
        with _reading(path):
            part = self._files[file].get_slice(name)
            found, kind = tuple(part.get_shape()), str(part.get_dtype())
        if found != shape:
            raise ConfigError(
                f"{path}: {name} has the shape {list(found)}, config.json asks for {list(shape)}"
            )
        if kind not in _FLOATS:
            raise ConfigError(f"{path}: {name} is stored as {kind}, which is not supported")


@contextmanager
def open_weights(folder: Path) -> Iterator[Weights]:
    """The tensors of `folder`. Raises ConfigError, here and from what it yields."""
    listed = _listed(folder)
    with ExitStack() as stack:
        files: dict[str, Any] = {}
        owner: dict[str, str] = {}
        for name in sorted(set(listed.values())):
            path = folder / name
            with _reading(path):
                files[name] = stack.enter_context(safe_open(path, framework="pt"))
                for tensor in files[name].keys():  # noqa: SIM118  no mapping, it only has `keys`
                    if listed.get(tensor, name) == name:
                        owner[tensor] = name
        lost = sorted(set(listed) - set(owner) - {""})
        if lost:
            raise ConfigError(_listing(folder, f"{_INDEX} names, and its file lacks,", lost))
        yield Weights(folder, files, owner)


def weights_digest(folder: Path, facts: Mapping[str, Any]) -> str:
    """sha256 in hex of `facts` and of every weight file, with its name and size.

    Files above 256 MiB count by 64 pieces of 1 MiB, evenly spread, first and last included: names
    and shapes stand in the first, and training moves every number. A file altered by hand in a few
    places between the pieces keeps its digest.
    """
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    for name in sorted(set(_listed(folder).values())):
        path = folder / name
        with _reading(path):
            size = path.stat().st_size
            digest.update(f"\0{name}\0{size}\0".encode())
            _digest_file(path, size, digest.update)
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


def _listed(folder: Path) -> dict[str, str]:
    """File of each tensor by the index; of a single file, its name under the tensor name ""."""
    index = folder / _INDEX
    if not index.is_file():
        if not (folder / _SINGLE).is_file():
            raise ConfigError(f"model folder {folder} has neither {_SINGLE} nor {_INDEX}")
        return {"": _SINGLE}
    with _reading(index):
        try:
            listed = json.loads(index.read_bytes())["weight_map"]
            names = {str(tensor): str(file) for tensor, file in listed.items()}
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise ConfigError(f"{index} is damaged: it has no weight_map") from None
    for name in names.values():
        if name != Path(name).name or not _is_file(folder / name):
            raise ConfigError(f"{index} names {name}, which is not a file of the folder")
    return names


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name too long, say
        return False


def _listing(folder: Path, what: str, names: list[str]) -> str:
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return f"model folder {folder} {what} {names[0]}{more}"


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """What the libraries say about `path`, as a line for the operator."""
    try:
        yield
    except (SafetensorError, OSError) as error:
        reason = " ".join(str(error).split())
        if isinstance(error, OSError) and error.strerror:
            reason = error.strerror
        raise ConfigError(f"{path} cannot be read: {reason}") from None
