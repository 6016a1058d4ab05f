"""Which steps a calibration takes: request sets that spread tokens, samples, keys and chunks apart.

Families, each from small to large: prompts alone; several in one step; prompts after a prefix that is cached;
batches that lose requests step by step, so that every number of rows occurs, at short and at long contexts; and
prompts among decodes. Nothing is assumed about where the engine changes its kernels.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from mini_vllm.exceptions import ConfigError

LEAST_MODEL_LEN = 16
ALONE_GROWTH = 1.4
"""Ratio of lengths of prompts that are measured alone. (Every small number of tokens occurs in draining batches.)"""

LARGEST_BATCH = 256
LONGEST_DRAIN = 16
"""Steps in which a batch loses its requests."""


@dataclass(frozen=True)
class Staged:
    """A request that is added before step `at` of its set. shared: tokens its prompt begins with that are the same in
    every run, and with every request of this salt; the rest is new each time."""

    at: int
    prompt_len: int
    output_len: int
    shared: int = 0
    salt: int = 0


@dataclass(frozen=True)
class RequestSet:
    """family: those behind a set are larger, so where one takes too long they are left out."""

    family: str
    name: str
    requests: Sequence[Staged]

    @property
    def is_cached(self) -> bool:
        """Whether its prompts are there from the run before."""
        return any(request.shared for request in self.requests)

    @property
    def num_slots(self) -> int:
        """Of the KV cache that it fills, at most."""
        return sum(request.prompt_len + request.output_len for request in self.requests)


@dataclass
class SetMaker:
    """Sets that fit a context, a batch, a step's budget and a KV cache of that many tokens. Raises `ConfigError`."""

    max_len: int
    max_batch: int
    budget: int
    kv_tokens: int
    _salt: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        if self.max_len < LEAST_MODEL_LEN:
            raise ConfigError(
                f"max_model_len: {self.max_len} tokens are too few to calibrate with, at least {LEAST_MODEL_LEN} are "
                "needed"
            )
        self.max_batch = min(self.max_batch, LARGEST_BATCH)

    def all(self) -> list[RequestSet]:
        """Every set that fits."""
        families: tuple[Callable[[], Iterator[RequestSet]], ...] = (
            self._alone, self._several, self._draining, self._mixed, self._after_prefixes, self._long_contexts,
        )  # fmt: skip
        return [each for family in families for each in family() if each.num_slots <= self.kv_tokens // 2]

    def _alone(self) -> Iterator[RequestSet]:
        for length in sizes_up_to(min(self.max_len - 1, self.budget)):
            yield RequestSet("alone", f"a prompt of {length} tokens", [Staged(0, length, 1)])

    def _several(self) -> Iterator[RequestSet]:
        for count in (2, 8, 32):
            for length in (8, 48, min(self.budget, 2048) // count):
                if count <= self.max_batch and length < self.max_len and count * length <= self.budget:
                    name = f"{count} prompts of {length} tokens"
                    yield RequestSet(f"{count} prompts", name, [Staged(0, length, 1)] * count)

    def _draining(self) -> Iterator[RequestSet]:
        """Batches of 8, 16, 32, ... that shrink to half, the first of them to one."""
        for low, high in halves(self.max_batch):
            yield RequestSet("batches", f"a batch of {high}", self._drain(low, high, 4))

    def _long_contexts(self) -> Iterator[RequestSet]:
        shapes = [(4, 16), (1, 8), (8, 64), (8, 256)]
        for share, high in dict.fromkeys((share, min(size, self.max_batch)) for share, size in shapes):
            context = self.max_len // share - 2 * LONGEST_DRAIN
            if context > LEAST_MODEL_LEN:
                self._salt += high
                requests = self._drain(high // 4, high, context, context)
                yield RequestSet(f"contexts, {high} rows", f"{high} requests of {context} tokens", requests)

    def _drain(self, low: int, high: int, prompt_len: int, shared: int = 0) -> list[Staged]:
        """`high` requests that begin together; they end one (or a few) a step until `low` are left."""
        stride = max(1, -(-(high - low) // LONGEST_DRAIN))
        requests = []
        for place in range(high):
            steps = 2 + (high - max(place, low - 1)) // stride
            if prompt_len + steps < self.max_len:
                requests.append(Staged(0, prompt_len, steps, shared, self._salt + place))
        return requests

    def _mixed(self) -> Iterator[RequestSet]:
        """Few to many requests decode; every other step a prompt comes in beside them."""
        longest = min(self.max_len // 2, self.budget // 2)
        for rows in (1, 6, 20, 60, 120, 250):
            lengths = [length for length in (8, 32, 100, 250) if length <= longest]
            prompts = [Staged(2 * place + 2, length, 1) for place, length in enumerate(lengths)]
            steps = 2 * len(lengths) + 2
            if rows < self.max_batch and 16 + steps < self.max_len:
                decodes = [Staged(0, 16, steps)] * rows
                yield RequestSet("prompts among decodes", f"prompts beside {rows} decodes", [*decodes, *prompts])

    def _after_prefixes(self) -> Iterator[RequestSet]:
        """A prefix that stays in the cache, and then prompts that go on from it."""
        for share in (4, 2):
            for tail in (16, 100):
                prefix = self.max_len // share
                if tail < min(prefix, self.budget):
                    self._salt += 1
                    requests = [Staged(at, prefix + at * tail, 1, prefix, self._salt) for at in (0, 1)]
                    yield RequestSet("prefixes", f"{tail} tokens after {prefix}", requests)


def sizes_up_to(limit: int) -> list[int]:
    """1, 2, 3, 4, 6, ... up to the limit, and what lies just above a power of two: kernels like to change there."""
    sizes, size = {limit}, 1.0
    while size < limit:
        sizes.add(round(size))
        size = max(size + 1, ALONE_GROWTH * size)
    return sorted(sizes | {power + 1 for power in (8, 16, 32, 64) if power < limit})


def halves(max_batch: int) -> list[tuple[int, int]]:
    """(smallest, largest) of batches that cover 1 to `max_batch` rows."""
    ranges, low, high = [], 1, min(8, max_batch)
    while True:
        ranges.append((low, high))
        if high == max_batch:
            return ranges
        low, high = high, min(2 * high, max_batch)


class TokenMaker:
    """Prompts of random tokens."""

    def __init__(self, token_ids: Sequence[int], seed: int) -> None:
        self._token_ids, self._seed = token_ids, seed
        self._rng = random.Random(seed)

    def tokens(self, request: Staged) -> list[int]:
        shared = random.Random(f"{self._seed} {request.salt}").choices(self._token_ids, k=request.shared)
        return shared + self._rng.choices(self._token_ids, k=request.prompt_len - request.shared)
