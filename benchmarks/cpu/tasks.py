"""What is timed, as prompts to complete, and how a figure comes out of the seconds.

A task is one or two calls of an engine. Where it is two, the second generates more tokens from the same prompts and
the difference is what decoding took: prompts and start-up of a call cancel, in every engine alike.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass

Calls = list[tuple[list[list[int]], list[int]]]
"""(prompts, tokens to generate of each), one after the other."""

FIRST_ID, LAST_ID = 10, 2000
BATCHES = (1, 2, 4, 8, 16, 32, 64)
CONTEXTS = (128, 512, 2048, 8064)


def prompt(rng: random.Random, length: int) -> list[int]:
    return [rng.randrange(FIRST_ID, LAST_ID) for _ in range(length)]


@dataclass(frozen=True)
class Task:
    """One row of the table.

    counted: tokens of the figure, over the seconds of the call or over the difference of two calls.
    requests: (prompt, output) lengths. more: where it is not 0, every request is run for one token, then for this many
    more. sweep: 'batch' or 'context' for a point of a curve, at `at`.
    """

    name: str
    counted: int
    requests: tuple[tuple[int, int], ...]
    more: int = 0
    sweep: str = ""
    at: int = 0

    def calls(self, seed: int) -> Calls:
        """The same for every engine, other prompts for another seed."""
        rng = random.Random(f"{self.name}-{seed}")
        prompts = [prompt(rng, length) for length, _ in self.requests]
        first = [count for _, count in self.requests]
        return [(prompts, first)] + ([(prompts, [n + self.more for n in first])] if self.more else [])

    def figure(self, seconds: Sequence[float]) -> float:
        """Tokens a second. Raises ValueError where the machine was so noisy that the longer call was not longer."""
        elapsed = seconds[1] - seconds[0] if self.more else seconds[0]
        if elapsed <= 0:
            raise ValueError("the longer call took no longer: too noisy, or too few tokens")
        return self.counted / elapsed

    @property
    def total(self) -> int:
        """Tokens of all sequences together."""
        return sum(p + n + self.more for p, n in self.requests)

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence."""
        return max(p + n for p, n in self.requests) + self.more


def decoding(name: str, batch: int, context: int, more: int, sweep: str = "", at: int = 0) -> Task:
    return Task(name, batch * more, ((context, 1),) * batch, more, sweep, at)


def prefill(tokens: int) -> Task:
    return Task(f"prefill {tokens}", tokens, ((tokens, 1),))


def fixed_list(count: int = 32, shrink: int = 1, seed: int = 7) -> tuple[tuple[int, int], ...]:
    """(prompt, output) lengths: 64 to 256, and 64 to 128, all divided by `shrink`."""
    rng = random.Random(seed)
    return tuple((rng.randint(64, 256) // shrink, rng.randint(64, 128) // shrink) for _ in range(count))


def request_list(shrink: int) -> Task:
    """32 requests at once; the figure counts generated tokens, prompts are part of the time."""
    listed = fixed_list(shrink=shrink)
    suffix = f", lengths / {shrink}" if shrink > 1 else ""
    return Task(f"32 requests{suffix}", sum(n for _, n in listed), listed)


def mixed_steps(shrink: int) -> Task:
    """Six prompts that do not fit one step, so that some decode already; prompt and generated tokens count."""
    listed = tuple((512 // min(shrink, 4), (16 + 8 * i) // shrink) for i in range(6))
    suffix = f", lengths / {shrink}" if shrink > 1 else ""
    return Task(f"mixed steps{suffix}", sum(p + n for p, n in listed), listed)


def sweeps(more: int, batches: Sequence[int], contexts: Sequence[int]) -> list[Task]:
    """How cost grows with the batch (64 tokens of context) and, for one stream, with the context."""
    by_batch = [decoding(f"batch {b}", b, 64, max(8, more // b), "batch", b) for b in batches]
    return by_batch + [decoding(f"context {c}", 1, c, more, "context", c) for c in contexts]
