"""Draws a flame graph small enough to keep in docs/: `scripts/flame.py RAW TITLE > figure.svg`.

RAW is what a sampler of stacks writes (`py-spy record -f raw -p PID -o RAW`): a line for each
stack, its frames from the outermost joined by `;`, a space, and how often it was seen. Here a
function is one frame whatever its lines, small frames are left out, and so are all threads but the
one that runs the event loop. Width is the share of samples; hover for it.
"""

import re
import sys
from collections.abc import Iterable
from html import escape
from typing import Final

MIN_SHARE: Final = 0.004
WIDTH: Final = 1200
ROW: Final = 16
_MAIN: Final = "Runner.run (asyncio/runners.py)"
_COLORS: Final = {
    "router": "#e5794a",
    "text": "#e8b04c",
    "protocol": "#d9a0a0",
    "worker": "#e5794a",
}
_OTHERS: Final = "#c9d3dd"


class Node:
    """A frame under its callers."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.count = 0
        self.children: dict[str, Node] = {}

    def add(self, frames: list[str], count: int) -> None:
        self.count += count
        if frames:
            child = self.children.setdefault(frames[0], Node(frames[0]))
            child.add(frames[1:], count)

    def depth(self, least: float) -> int:
        below = [c.depth(least) for c in self.children.values() if c.count >= least]
        return 1 + max(below, default=0)


def read(lines: Iterable[str]) -> Node:
    """The main thread's samples, from what its loop runs."""
    root = Node("the loop")
    for line in lines:
        stack, _, count = line.rpartition(" ")
        frames = [re.sub(r":\d+\)$", ")", frame) for frame in stack.split(";")]
        if _MAIN in frames:
            root.add(frames[frames.index(_MAIN) + 1 :], int(count))
    return root


def draw(root: Node, title: str) -> str:
    """The SVG, the outermost frame at the bottom."""
    least = root.count * MIN_SHARE
    height = (root.depth(least) + 2) * ROW
    boxes: list[str] = []

    def box(node: Node, left: float, level: int) -> None:
        width = node.count / root.count * WIDTH
        top = height - (level + 1) * ROW
        share = f"{node.name}: {node.count / root.count:.1%}"
        package = node.name.partition("(")[2].partition("/")[0]
        color = _COLORS.get(package, _OTHERS)
        label = escape(node.name.partition(" (")[0][: int(width / 6.2)])
        boxes.append(
            f'<g><title>{escape(share)}</title><rect x="{left:.1f}" y="{top}" width="{width:.1f}" '
            f'height="{ROW - 1}" fill="{color}"/><text x="{left + 2:.1f}" y="{top + 11}">{label}'
            "</text></g>"
        )
        for child in sorted(node.children.values(), key=lambda c: -c.count):
            if child.count >= least:
                box(child, left, level + 1)
                left += child.count / root.count * WIDTH

    box(root, 0.0, 0)
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" '
        'font-family="monospace" font-size="10"><rect width="100%" height="100%" fill="white"/>'
        f'<text x="4" y="12" font-size="12">{escape(title)}</text>'
    )
    return "\n".join([head, *boxes, "</svg>"]) + "\n"


def main() -> int:
    if len(sys.argv) != 3:
        print(__doc__, file=sys.stderr)
        return 2
    with open(sys.argv[1], encoding="utf-8") as file:
        root = read(file)
    if not root.count:
        print("flame: no samples of an event loop in there", file=sys.stderr)
        return 2
    sys.stdout.write(draw(root, sys.argv[2]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
