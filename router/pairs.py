"""Which transport each pair of workers hands KV over with, for `/cluster_info`.

What the decode workers said with `Decoding`; bounded, the pairs used longest ago go first. For
people: no decision is made on it, and nothing of it is on `/metrics`, where workers have their own.
"""

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

MAX_PAIRS: Final = 1024


class Way(NamedTuple):
    transport: str
    reason: str


@dataclass(slots=True)
class _Pair:
    way: Way
    num_transfers: int = 0
    num_bytes: int = 0


class TransferPairs:
    """By (source worker, sink worker). Counts start again when the way changes."""

    def __init__(self, max_pairs: int = MAX_PAIRS) -> None:
        self._max = max_pairs
        self._pairs: OrderedDict[tuple[str, str], _Pair] = OrderedDict()

    def used(self, source: str, sink: str, way: Way, num_bytes: int) -> None:
        pair = self._pairs.get((source, sink))
        if pair is None or pair.way != way:
            pair = self._pairs[source, sink] = _Pair(way)
        pair.num_transfers += 1
        pair.num_bytes += num_bytes
        self._pairs.move_to_end((source, sink))
        while len(self._pairs) > self._max:
            self._pairs.popitem(last=False)

    def for_people(self) -> list[dict[str, Any]]:
        """In order of names."""
        return [
            {
                "from": source,
                "to": sink,
                "transport": pair.way.transport,
                "reason": pair.way.reason,
                "transfers": pair.num_transfers,
                "bytes": pair.num_bytes,
            }
            for (source, sink), pair in sorted(self._pairs.items(), key=lambda item: item[0])
        ]


Pairs = Iterable[dict[str, Any]]


def joined(ours: Pairs, theirs: Pairs) -> list[dict[str, Any]]:
    """What two routers said `for_people`, as one list. Those that do not agree on the way of a pair
    leave two lines of it."""
    found: dict[tuple[str, ...], dict[str, Any]] = {}
    for pair in (*ours, *theirs):
        way = tuple(str(pair.get(name)) for name in ("from", "to", "transport", "reason"))
        known = found.setdefault(way, {**pair, "transfers": 0, "bytes": 0})
        for count in ("transfers", "bytes"):
            known[count] += pair.get(count, 0)
    return [found[way] for way in sorted(found)]
