"""Stop strings are found across borders; the cuts of the text do not matter."""

from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st

from text.stops import StopMatcher

SMALL_TEXT = st.text("ab\n", max_size=30)
STOPS = st.lists(st.text("ab\n", max_size=5), max_size=4)


def run(stops: list[str], pieces: list[str], **options: bool) -> tuple[str, str | None]:
    matcher = StopMatcher(stops, **options)
    shown = [matcher.push(piece)[0] for piece in pieces]
    return "".join(shown) + matcher.finish(), matcher.matched


def plain(stops: list[str], text: str, *, include_stop: bool) -> tuple[str, str | None]:
    """What is meant: the match that ends first, of those the longest."""
    ends = [(text.find(s) + len(s), -len(s), s) for s in stops if s and s in text]
    if not ends:
        return text, None
    end, _, stop = min(ends)
    return (text[:end] if include_stop else text[: end - len(stop)]), stop


@settings(max_examples=400, deadline=None)
@given(STOPS, SMALL_TEXT, st.lists(st.integers(0, 30), max_size=6), st.booleans())
def test_result_is_the_same_for_all_cuts(
    stops: list[str], text: str, cuts: list[int], include_stop: bool
) -> None:
    places = [0, *sorted(cuts), len(text)]
    pieces = [text[a:b] for a, b in pairwise(places)]

    expected = plain(stops, text, include_stop=include_stop)

    assert run(stops, pieces, include_stop=include_stop) == expected
    assert run(stops, list(text), include_stop=include_stop) == expected


@settings(max_examples=200, deadline=None)
@given(STOPS, SMALL_TEXT)
def test_only_what_may_begin_a_stop_is_held(stops: list[str], text: str) -> None:
    matcher = StopMatcher(stops)
    shown = ""
    for index, char in enumerate(text):
        released, stop = matcher.push(char)
        shown += released
        if stop is not None:
            break
        held = text[len(shown) : index + 1]
        assert not held or any(s.startswith(held) for s in stops)
        assert not any(shown.endswith(s[: len(s)]) for s in stops if s)


def test_nothing_is_shown_after_a_stop() -> None:
    matcher = StopMatcher(["END"])

    assert matcher.push("one E") == ("one ", None)
    assert matcher.push("ND two") == ("", "END")
    assert matcher.push("three") == ("", "END")
    assert matcher.finish() == ""


def test_held_text_is_shown_when_no_more_comes() -> None:
    matcher = StopMatcher(["\n\nUser:"])

    assert matcher.push("bye\n\nUs") == ("bye", None)
    assert matcher.finish() == "\n\nUs"


def test_an_unarmed_match_is_text_like_any_other() -> None:
    matcher = StopMatcher(["ab"])

    assert matcher.push("xaby", armed=False) == ("xaby", None)
    assert matcher.push("zab", armed=True) == ("z", "ab")


def test_long_stop_strings_cost_no_more() -> None:
    matcher = StopMatcher(["a" * 50_000 + "b"])

    shown = [matcher.push("a" * 1_000)[0] for _ in range(60)]

    assert len("".join(shown)) == 10_000
    assert matcher.push("b") == ("", "a" * 50_000 + "b")
