"""Stop strings in text that arrives in pieces.

`StopStringMatcher.feed` is handed the text as it becomes certain and returns what can be shown: all of it but the
shortest end that may still turn out to be the beginning of a stop string. It finds the match that ends first (the
longest, when several end there), wherever the borders between pieces and tokens are.

All strings are looked for at once by one automaton (Aho and Corasick, "Efficient string matching: an aid to
bibliographic search", 1975), so a character costs O(1), amortised, however many strings there are.
"""

from collections import deque
from collections.abc import Sequence
from functools import lru_cache


class _Automaton:
    """States are the beginnings of the stop strings; state 0 is the empty one.

    held[state]: characters at the end of the text that could still grow into a match.
    match[state]: the longest stop string that ends here; empty for none.
    """

    def __init__(self, strings: Sequence[str]) -> None:
        self._next: list[dict[str, int]] = [{}]
        self.match = [""]
        depth = [0]
        for string in strings:
            state = 0
            for character in string:
                if character not in self._next[state]:
                    self._next[state][character] = len(self._next)
                    self._next.append({})
                    self.match.append("")
                    depth.append(depth[state] + 1)
                state = self._next[state][character]
            self.match[state] = string
        self._link(depth)

    def _link(self, depth: list[int]) -> None:
        """Where a state falls back to: the longest proper end of it that is a state, too. Shorter states first."""
        self._fallback = [0] * len(depth)
        self.held = [0] * len(depth)
        queue = deque(self._next[0].values())
        while queue:
            state = queue.popleft()
            fallback = self._fallback[state]
            self.match[state] = self.match[state] or self.match[fallback]
            self.held[state] = depth[state] if self._next[state] else self.held[fallback]
            for character, child in self._next[state].items():
                self._fallback[child] = self.step(fallback, character)
                queue.append(child)

    def step(self, state: int, character: str) -> int:
        while state and character not in self._next[state]:
            state = self._fallback[state]
        return self._next[state].get(character, 0)


@lru_cache(maxsize=64)
def _compiled(strings: tuple[str, ...]) -> _Automaton:
    return _Automaton(strings)


class StopStringMatcher:
    """Looks for stop strings in one text.

    strings: not empty, each of at least one character. include_in_output: show the stop string that was found;
    nothing is held back then.
    """

    def __init__(self, strings: Sequence[str], include_in_output: bool = False) -> None:
        self._automaton = _compiled(tuple(strings))
        self._include = include_in_output
        self._state = 0
        self._held = ""

    def feed(self, text: str, armed: bool = True) -> tuple[str, str | None]:
        """Take more text; return (what can be shown of all so far, the stop string that was found).

        Nothing may be fed after a find. What follows it in `text`, and the string itself unless it is to be shown,
        is discarded. While not `armed` no find is made, but one may begin.
        """
        automaton, state = self._automaton, self._state
        for position, character in enumerate(text):
            state = automaton.step(state, character)
            found = automaton.match[state]
            if found and armed:
                whole = self._held + text[: position + 1]
                self._state, self._held = 0, ""
                return whole if self._include else whole[: -len(found)], found
        self._state = state
        whole = self._held + text
        shown = len(whole) - (0 if self._include else automaton.held[state])
        self._held = whole[shown:]
        return whole[:shown], None

    def flush(self) -> str:
        """No more text will come: return what was held back."""
        rest, self._state, self._held = self._held, 0, ""
        return rest
