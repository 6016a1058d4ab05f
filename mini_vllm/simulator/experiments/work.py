"""How many keys and values are computed with and without a cache: O(N^2) against O(N).

Without a cache, every step computes those of every token again, so generating n tokens after a prompt of P costs
P + (P+1) + ... + (P+n-1). With one, each token's are computed once. `num_computed_by_engine` is what the engine itself
computes: one token less, as those of the last generated token are never asked for.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from mini_vllm.exceptions import ConfigError


@dataclass(frozen=True)
class KVWork:
    """In tokens whose keys and values are computed."""

    prompt_len: int
    num_new_tokens: int

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value < 1:
                raise ConfigError(f"{name}: must be at least 1, got {value}")

    @property
    def without_cache(self) -> int:
        """The sum of P..P+n-1."""
        return self.num_new_tokens * self.prompt_len + self.num_new_tokens * (self.num_new_tokens - 1) // 2

    @property
    def with_cache(self) -> int:
        """Every token once, the last generated one included."""
        return self.prompt_len + self.num_new_tokens

    @property
    def num_computed_by_engine(self) -> int:
        return self.with_cache - 1

    @property
    def ratio(self) -> float:
        """About n / 2 once n is well above P."""
        return self.without_cache / self.with_cache


def kv_work(prompt_len: int = 5, num_new_tokens: int = 10) -> KVWork:
    """95 against 15 for the defaults."""
    return KVWork(prompt_len, num_new_tokens)


def kv_work_curve(lengths: Sequence[int], prompt_len: int = 5) -> list[KVWork]:
    """One for each number of new tokens."""
    return [KVWork(prompt_len, length) for length in lengths]
