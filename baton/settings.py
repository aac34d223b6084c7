"""One config struct from a YAML file, `BATON_*` variables and flags: later ones win.

Unknown keys of the file and unknown flags are errors that name the nearest right one; so are values
of the wrong type. An unknown variable is only said and ignored. File and environment may also hold
another program's names, if somebody who knows them translates them first.
"""

import argparse
import difflib
import sys
import typing
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Final, Protocol, TypeVar

import msgspec
import yaml

from protocol.errors import ConfigError
from protocol.settings import ProcessSettings

C = TypeVar("C", bound=ProcessSettings)

_PREFIX: Final = "BATON_"
_UNITS: Final = ("MS", "BYTES", "PORT")
"""Last words of names that say what kind of number it is."""
_LISTS: Final = ("nats", "etcd", "api_keys")


def add_flags(parser: argparse.ArgumentParser, config: type[ProcessSettings]) -> None:
    """One flag for each field; flags that were not given do not appear in the namespace."""
    parser.add_argument("--config", metavar="F", help="YAML file with the same names as the flags")
    for field in msgspec.structs.fields(config):
        if field.name == "labels":
            continue
        flag = "--" + field.name.replace("_", "-")
        kind, text = unwrapped(field.type)
        choices = _choices(kind)
        parser.add_argument(
            flag,
            dest=field.name,
            default=argparse.SUPPRESS,
            choices=choices,
            metavar=None if choices else _metavar(field.name, kind),
            help=f"{text} (default: {shown_default(field)})".replace("%", "%%"),
        )


def unwrapped(kind: Any) -> tuple[Any, str]:
    """The plain type of a field and what is said about it."""
    if typing.get_origin(kind) is not typing.Annotated:
        return kind, ""
    plain, *extra = typing.get_args(kind)
    texts = [meta.description for meta in extra if isinstance(meta, msgspec.Meta)]
    return plain, texts[0] or "" if texts else ""


def _metavar(name: str, kind: Any) -> str:
    unit = name.rpartition("_")[2].upper()
    is_number = bool({int, float} & {kind, *typing.get_args(kind)})
    return "N" if is_number and unit not in _UNITS else unit


def _choices(kind: Any) -> tuple[str, ...] | None:
    return typing.get_args(kind) if typing.get_origin(kind) is typing.Literal else None


def shown_default(field: msgspec.structs.FieldInfo) -> str:
    """The default as a person would write it."""
    value = field.default
    if isinstance(value, tuple):
        return ",".join(map(str, value)) or "none"
    return "none" if value in ("", None, msgspec.NODEFAULT) else str(value)


class Translator(Protocol):
    """Turns another program's names into ours."""

    @property
    def names(self) -> Collection[str]:
        """Those it understands in a file."""

    def translate(
        self, values: Mapping[str, Any], where: str, environ: Mapping[str, str]
    ) -> dict[str, Any]:
        """What the file says, in our names; unknown keys stay as they are. Raises ConfigError."""


def load_settings(
    config: type[C],
    args: argparse.Namespace,
    environ: Mapping[str, str],
    translator: Translator | None = None,
) -> C:
    """Raises ConfigError with one line."""
    names = {field.name for field in msgspec.structs.fields(config)}
    values = _from_file(getattr(args, "config", None), names, environ, translator)
    given = {
        key.removeprefix(_PREFIX).lower(): value
        for key, value in environ.items()
        if key.startswith(_PREFIX)
    }
    values.update({name: value for name, value in given.items() if name in names})
    for name in sorted(given.keys() - names):  # not an error: orchestrators inject such variables
        print(f"baton: ignored {_PREFIX}{name.upper()}{_hint(name, names)}", file=sys.stderr)
    values.update({name: value for name, value in vars(args).items() if name in names})
    for name in _LISTS:
        if isinstance(values.get(name), str):
            values[name] = [part.strip() for part in values[name].split(",") if part.strip()]
    try:
        built = msgspec.convert(values, config, strict=False)
    except msgspec.ValidationError as error:
        raise ConfigError(_where(str(error))) from None
    except UnicodeEncodeError as error:  # bytes of a variable that are no UTF-8
        raise ConfigError(f"a setting is not valid text: {error.object!r}") from None
    built.check()
    return built


def _from_file(
    path: str | None, names: set[str], environ: Mapping[str, str], translator: Translator | None
) -> dict[str, Any]:
    values = {} if path is None else _read(Path(path))
    where = path or "environment"
    known = names
    if translator is not None:
        values = translator.translate(values, where, environ)
        known = names | set(translator.names)
    for name in values:
        if name not in names:
            raise ConfigError(f"{where}: unknown key `{name}`{_hint(str(name), known)}")
    return values


def _read(path: Path) -> dict[str, Any]:
    try:
        loaded = yaml.safe_load(path.read_text())
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        text = " ".join(str(error).split())
        raise ConfigError(f"{path} is not YAML: {text}") from None
    except RecursionError:
        raise ConfigError(f"{path} is nested too deeply") from None
    if loaded is None:
        return {}
    if not isinstance(loaded, dict):
        raise ConfigError(f"{path} must be a mapping of names to values")
    return loaded


def _hint(name: str, names: set[str]) -> str:
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f"; did you mean `{near[0]}`?" if near else ""


def _where(text: str) -> str:
    """msgspec says `Expected `int`, got `str` - at `$.port``: put the name first."""
    message, _, path = text.partition(" - at `$.")
    return f"{path.rstrip('`')}: {message}" if path else text
