"""Every place of the packages that reads what others wrote is fuzzed, or says why not."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import baton
from tests.fuzz.decoders import DECODERS, EXEMPT

ROOT = Path(baton.__file__).parent.parent
PACKAGES = ("protocol", "text", "discovery", "worker", "router", "baton")
OWN_TALK = "baton/bench"
"""Benchmarks read what their own processes write."""


def _is_decoding(call: ast.Call) -> bool:
    if isinstance(call.func, ast.Name):
        return call.func.id in ("Decoder", "convert")
    if not isinstance(call.func, ast.Attribute):
        return False
    owner, name = ast.unparse(call.func.value), call.func.attr
    return name != "encode" and (
        name in ("Decoder", "safe_load", "from_bytes", "ParseFromString", "FromString")
        or (name in ("decode", "convert") and owner.startswith("msgspec"))
        or (name == "loads" and owner in ("json", "pickle", "marshal"))
        or name in ("unpack", "unpack_from", "iter_unpack")
    )


def _places(path: Path) -> Iterator[str]:
    """`file:function`, or `file:NAME` of a module's constant."""
    tree = ast.parse(path.read_text())
    file = path.relative_to(ROOT).as_posix()
    stack: list[tuple[ast.AST, str]] = [(tree, "")]
    while stack:
        node, name = stack.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            name = node.name
        elif not name and isinstance(node, ast.Assign | ast.AnnAssign):
            target = node.targets[0] if isinstance(node, ast.Assign) else node.target
            name = ast.unparse(target)
        if isinstance(node, ast.Call) and _is_decoding(node):
            yield f"{file}:{name}"
        stack += [(child, name) for child in ast.iter_child_nodes(node)]


def _found() -> set[str]:
    files = [file for package in PACKAGES for file in sorted((ROOT / package).rglob("*.py"))]
    return {place for file in files for place in _places(file) if not place.startswith(OWN_TALK)}


def test_every_decoder_of_the_packages_is_fuzzed_or_exempt() -> None:
    covered = {place for decoder in DECODERS for place in decoder.covers}
    found = _found()
    assert len(found) > 20
    assert sorted(found - covered - EXEMPT.keys()) == []
    assert sorted((covered | EXEMPT.keys()) - found) == [], "gone from the packages"


def test_names_are_unique_and_every_entry_has_examples() -> None:
    names = [decoder.name for decoder in DECODERS]
    assert len(set(names)) == len(names)
    for decoder in DECODERS:
        assert decoder.corpus(), decoder.name


@pytest.mark.parametrize(
    "line",
    [
        "x = msgspec.json.decode(body)",
        "d = struct.unpack('<I', b)",
        "def f():\n    yaml.safe_load(t)",
        "n = int.from_bytes(b, 'big')",
        "D = msgspec.msgpack.Decoder(T)",
        "json.loads(t)",
    ],
)
def test_a_new_decoder_is_noticed(line: str) -> None:
    calls = [node for node in ast.walk(ast.parse(line)) if isinstance(node, ast.Call)]
    assert any(_is_decoding(call) for call in calls)
