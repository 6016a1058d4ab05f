"""Claims about stop strings in text that comes in pieces, mostly against a search of the whole text."""

import time
from collections.abc import Sequence

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from mini_vllm.text.stop_strings import StopStringMatcher

letters = st.text(alphabet="ab🙂", max_size=30)
stop_lists = st.lists(st.text(alphabet="ab🙂", min_size=1, max_size=5), min_size=1, max_size=4)


def expected(text: str, stops: Sequence[str], include: bool) -> tuple[str, str | None]:
    """By definition: the first position at which a stop string ends, and the longest that ends there."""
    for end in range(1, len(text) + 1):
        found = max((stop for stop in stops if text[:end].endswith(stop)), key=len, default=None)
        if found is not None:
            return (text[:end] if include else text[: end - len(found)]), found
    return text, None


def could_grow(text: str, stops: Sequence[str]) -> int:
    """Characters at the end that a stop string could begin with."""
    return max(n for n in range(len(text) + 1) for s in stops if n == 0 or (n < len(s) and text.endswith(s[:n])))


def cut(text: str, sizes: Sequence[int]) -> list[str]:
    pieces, start = [], 0
    for size in sizes:
        pieces.append(text[start : start + size])
        start += size
    return [*pieces, text[start:]]


@given(letters, stop_lists, st.lists(st.integers(0, 5), max_size=12), st.booleans())
@example("aab", ["ab"], [1, 1], False)
@example("abab🙂", ["abab🙂", "ba"], [2, 2], False)
def test_the_find_is_that_of_a_search_of_the_whole(
    text: str, stops: list[str], sizes: list[int], include: bool
) -> None:
    matcher = StopStringMatcher(stops, include)
    shown, found = "", None
    for piece in cut(text, sizes):
        more, found = matcher.feed(piece)
        shown += more
        if found is not None:
            break
    assert (shown + matcher.flush(), found) == expected(text, stops, include)


@given(letters, stop_lists)
def test_exactly_what_could_still_match_is_held_back(text: str, stops: list[str]) -> None:
    matcher, fed, shown = StopStringMatcher(stops), "", ""
    for character in text:
        more, found = matcher.feed(character)
        fed, shown = fed + character, shown + more
        if found is not None:
            return
        assert len(fed) - len(shown) == could_grow(fed, stops)
        assert fed.startswith(shown)


def test_with_the_stop_string_shown_nothing_is_held_back() -> None:
    matcher = StopStringMatcher(["</end>"], include_in_output=True)
    assert [matcher.feed(piece) for piece in ("a<", "/en", "d> and more")] == [
        ("a<", None), ("/en", None), ("d>", "</end>"),
    ]  # fmt: skip


def test_while_not_armed_nothing_is_found_but_may_begin() -> None:
    matcher = StopStringMatcher(["ab", "bcd"])
    assert matcher.feed("xab", armed=False) == ("xa", None), "b may begin bcd"
    assert matcher.feed("c", armed=False) == ("", None)
    assert matcher.feed("d!") == ("", "bcd")


def test_a_search_of_each_piece_alone_misses_what_straddles() -> None:
    """Broken control: the borders are where stop strings get lost."""
    pieces = ["one <", "st", "op> two"]
    assert not any("<stop>" in piece for piece in pieces)
    matcher = StopStringMatcher(["<stop>"])
    assert [matcher.feed(piece) for piece in pieces] == [("one ", None), ("", None), ("", "<stop>")]


@pytest.mark.parametrize("stops", [["a" * 5000 + "b"], ["a" * n + "b" for n in range(1, 120)]])
def test_a_character_costs_the_same_however_much_is_held_back(stops: list[str]) -> None:
    """The worst case of a naive search: every position is the beginning of something."""
    matcher, text = StopStringMatcher(stops), "a" * 60_000
    start = time.process_time()
    for position in range(0, len(text), 4096):
        matcher.feed(text[position : position + 4096])
    assert time.process_time() - start < 2.0
    steps = matcher._automaton
    assert max(steps.held) == max(map(len, stops)) - 1
