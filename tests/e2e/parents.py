"""A parent of routers in a test: its children, and what it says."""

import re
from pathlib import Path

from tests.e2e.fleet import Process, is_alive


def said(parent: Process) -> str:
    return Path(parent.log).read_text(errors="replace")


def started(parent: Process) -> list[int]:
    """Numbers of all children it ever started, in that order."""
    return [int(pid) for pid in re.findall(r"router started pid=(\d+)", said(parent))]


def children(parent: Process) -> list[int]:
    """Those that live."""
    return [pid for pid in started(parent) if is_alive(pid)]
