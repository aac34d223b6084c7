"""Writes docs/machines.md from the tables of the state machines. `--check` only compares."""

import argparse
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from router.scheduling import lifecycle
from worker import outbox
from worker.handoff import source, states

TARGET = Path(__file__).parents[1] / "docs" / "machines.md"

HEAD = """\
# State machines

Whatever can go wrong in a hand-off goes through one of four tables. Each lives in one file, with
its theory above it; an event that a table has no row for is late and changes nothing, or is a
defect of ours and raises. `make model` explores all of them together.

This page is generated: `python scripts/write_machines_doc.py`.
"""

Row = tuple[str, str, str]
"""State, event, next state."""


@dataclass(frozen=True)
class Machine:
    title: str
    file: str
    what: str
    first: str
    rows: list[Row]

    def diagram(self) -> str:
        """Several events between two states share an arrow; what stays is not drawn."""
        arrows: dict[tuple[str, str], list[str]] = {}
        for state, event, after in self.rows:
            if state != after:
                arrows.setdefault((state, after), []).append(event)
        inner = {state for state, _, after in self.rows if state != after}
        lines = ["```mermaid", "stateDiagram-v2", f"    [*] --> {_id(self.first)}"]
        names = _ordered([self.first, *(n for row in self.rows for n in (row[0], row[2]))])
        lines += [f'    state "{name}" as {_id(name)}' for name in names if _id(name) != name]
        for (state, after), events in arrows.items():
            lines.append(f"    {_id(state)} --> {_id(after)}: {' / '.join(events)}")
        ends = _ordered(row[2] for row in self.rows if row[2] not in inner)
        lines += [f"    {_id(end)} --> [*]" for end in ends]
        return "\n".join([*lines, "```"])

    def page(self) -> str:
        stays = [f"{event} ({state})" for state, event, after in self.rows if state == after]
        text = f"## {self.title}\n\n`{self.file}`. {self.what}\n\n{self.diagram()}\n"
        return text + (f"\nChanges no state: {'; '.join(stays)}.\n" if stays else "")


def machines() -> list[Machine]:
    return [
        Machine(
            "A choice",
            "router/scheduling/lifecycle.py",
            "What one client waits for, in the router. It ends exactly once.",
            "queued",
            [(state, move, after) for (state, move), after in lifecycle.TABLE.items()],
        ),
        Machine(
            "A lease",
            "worker/handoff/source.py",
            "Blocks that a prefill worker lends. Its word is zeroed before its blocks are let go.",
            source.LeaseState.LENT.value,
            _named(source.NEXT.items()),
        ),
        Machine(
            "A pull",
            "worker/handoff/states.py",
            "Blocks that a decode worker copies. They are used only in *ready*; while they are "
            "*fenced* a transfer may still write them.",
            states.PullState.WAITING.value,
            _named(states.NEXT.items()),
        ),
        Machine(
            "An attempt, as its router was told",
            "worker/outbox.py",
            "What a worker has said of one dispatch, kept to be said again.",
            outbox.Told.TAKEN.value,
            _named(outbox.NEXT.items()),
        ),
    ]


def _named(items: Iterable[tuple[tuple[Enum, Enum], Enum]]) -> list[Row]:
    return [(state.value, event.value, after.value) for (state, event), after in items]


def _id(name: str) -> str:
    return "".join(c if c.isalnum() else "_" for c in name)


def _ordered(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(names))


def document() -> str:
    return "\n".join([HEAD, *(machine.page() for machine in machines())])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    is_check = parser.parse_args().check
    text = document()
    if not is_check:
        TARGET.write_text(text)
    elif not TARGET.exists() or TARGET.read_text() != text:
        sys.stderr.write(f"{TARGET} is not what the tables say: python {sys.argv[0]}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
