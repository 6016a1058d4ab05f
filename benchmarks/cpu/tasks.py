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


def prompt(rng: random.Random, length: int) -> list[int]:
    return [rng.randrange(FIRST_ID, LAST_ID) for _ in range(length)]


@dataclass(frozen=True)
class Task:
    """name: as in tables. counted: tokens that the figure counts, over the seconds of the call, or over the difference
    of two."""

    name: str
    counted: int
    batch: int
    context: int
    more: int = 0
    requests: tuple[tuple[int, int], ...] = ()

    def calls(self, seed: int) -> Calls:
        """The same for every engine, other prompts for another seed."""
        rng = random.Random(f"{self.name}-{seed}")
        if self.requests:
            return [([prompt(rng, p) for p, _ in self.requests], [n for _, n in self.requests])]
        prompts = [prompt(rng, self.context) for _ in range(self.batch)]
        first = (prompts, [1] * self.batch)
        return [first, (prompts, [1 + self.more] * self.batch)] if self.more else [first]

    def figure(self, seconds: Sequence[float]) -> float:
        """Tokens a second. Raises ValueError where the machine was so noisy that the longer call was not longer."""
        elapsed = seconds[1] - seconds[0] if self.more else seconds[0]
        if elapsed <= 0:
            raise ValueError("the longer call took no longer")
        return self.counted / elapsed

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence."""
        return max((p + n for p, n in self.requests), default=self.context + self.more + 1)

    @property
    def most_sequences(self) -> int:
        return len(self.requests) or self.batch


def decoding(name: str, batch: int, context: int, more: int) -> Task:
    return Task(name, batch * more, batch, context, more)


def fixed_list(count: int, seed: int = 7) -> tuple[tuple[int, int], ...]:
    """(prompt, output) lengths: 64 to 256, and 64 to 128."""
    rng = random.Random(seed)
    return tuple((rng.randint(64, 256), rng.randint(64, 128)) for _ in range(count))


def main_tasks(more: int, scale: float) -> list[Task]:
    """The table. more: tokens that decoding is timed over. scale: shortens the request lists."""
    listed = fixed_list(max(4, round(32 * scale)))
    mixed = tuple((512, 16 + 4 * i) for i in range(max(3, round(8 * scale))))
    return [
        decoding("decode, 1 stream", 1, 128, more),
        Task("prefill 512", 512, 1, 512),
        Task(f"{len(listed)} requests", sum(n for _, n in listed), 0, 0, requests=listed),
        Task("mixed steps", sum(p + n for p, n in mixed), 0, 0, requests=mixed),
    ]


def sweep_tasks(more: int, batches: Sequence[int], contexts: Sequence[int]) -> list[Task]:
    """How cost grows with the batch and with the context."""
    by_batch = [decoding(f"batch {b}", b, 64, more) for b in batches]
    by_context = [decoding(f"context {c}", 1, c, more) for c in contexts]
    return by_batch + by_context


def long_prompt(tokens: int) -> Task:
    return Task(f"prefill {tokens}", tokens, 1, tokens)
