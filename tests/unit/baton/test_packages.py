"""What is installed is what is here: a wheel without one package fails at its first import."""

import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[3]
TOP = ("protocol", "discovery", "text", "router", "worker", "baton")


def test_every_package_is_installed() -> None:
    folders = {file.parent for top in TOP for file in (ROOT / top).rglob("*.py")}
    here = {".".join(folder.relative_to(ROOT).parts) for folder in folders}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert sorted(project["tool"]["setuptools"]["packages"]) == sorted(here)
