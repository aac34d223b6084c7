"""Stop strings in a text that comes in pieces: found across borders, never shown by halves.

The result does not depend on where the pieces are cut: the match that is complete first wins, of
those the longest one. It knows text only, nothing of tokens.
"""

from collections.abc import Sequence


class StopMatcher:
    """Holds back what may become a stop string, and says when one did.

    Work is constant per character and stop string, whatever their lengths (Knuth-Morris-Pratt).
    """

    def __init__(self, stops: Sequence[str], *, include_stop: bool = False) -> None:
        self._stops = [stop for stop in stops if stop]
        self._failures = [_failures(stop) for stop in self._stops]
        self._states = [0] * len(self._stops)
        self._firsts = frozenset(stop[0] for stop in self._stops)
        self._include_stop = include_stop
        self._held = ""
        self.matched: str | None = None
        """The stop string that was found; nothing is released after it."""

    def push(self, text: str, *, armed: bool = True) -> tuple[str, str | None]:
        """The text that may be shown now, and the stop string that ended it, if any.

        A stop string that is complete while not `armed` is text like any other.
        """
        if self.matched is not None or not text:
            return "", self.matched
        if not self._held and self._firsts.isdisjoint(text):
            return text, None
        for index, char in enumerate(text):
            found = self._step(char)
            if found is not None and armed:
                return self._end(self._held + text[: index + 1], found), found
        whole = self._held + text
        cut = len(whole) - max(self._states)
        self._held = whole[cut:]
        return whole[:cut], None

    def finish(self) -> str:
        """The held text, once: no more will come."""
        text, self._held = self._held, ""
        self._states = [0] * len(self._stops)
        return text

    def _end(self, whole: str, found: str) -> str:
        self.matched = found
        self._held = ""
        return whole if self._include_stop else whole[: len(whole) - len(found)]

    def _step(self, char: str) -> str | None:
        """Advance every stop string by one character; the longest one that is complete."""
        found: str | None = None
        for index, stop in enumerate(self._stops):
            state, failures = self._states[index], self._failures[index]
            while state and stop[state] != char:
                state = failures[state - 1]
            if stop[state] == char:
                state += 1
            if state == len(stop):
                if found is None or len(stop) > len(found):
                    found = stop
                state = failures[state - 1]
            self._states[index] = state
        return found


def _failures(stop: str) -> list[int]:
    """For each prefix the length of its longest proper suffix that is a prefix too."""
    failures = [0] * len(stop)
    length = 0
    for index in range(1, len(stop)):
        while length and stop[index] != stop[length]:
            length = failures[length - 1]
        if stop[index] == stop[length]:
            length += 1
        failures[index] = length
    return failures
