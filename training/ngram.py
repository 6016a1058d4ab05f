"""A 3-gram language model over token ids: the baseline a neural model must beat.

Interpolated modified Kneser-Ney (Chen and Goodman, "An Empirical Study of
Smoothing Techniques for Language Modeling", 1998): each order discounts its
counts by one of three amounts, estimated from the counts of counts, and gives
the freed mass to the order below, whose counts are numbers of distinct left
neighbours. The lowest order is mixed with the uniform distribution, so every
probability is positive.
"""

from __future__ import annotations

import numpy as np


def modified_discounts(counts: np.ndarray) -> np.ndarray:
    """Return discounts indexed by min(count, 3); index 0 is never used for a seen n-gram."""
    n1, n2, n3, n4 = (max(1, int((counts == i).sum())) for i in (1, 2, 3, 4))
    y = n1 / (n1 + 2 * n2)
    return np.array([0.0, 1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3])


class Order:
    """One order of the model: counts per n-gram, and what its contexts give to the order below."""

    def __init__(self, keys: np.ndarray, counts: np.ndarray, vocab_size: int) -> None:
        """Take sorted unique n-gram keys (`context * vocab_size + token`) and their counts."""
        self.keys, self.vocab_size = keys, vocab_size
        discount = modified_discounts(counts)[np.minimum(counts, 3)]
        self.contexts, index = np.unique(keys // vocab_size, return_inverse=True)
        totals = np.bincount(index, weights=counts)
        self.prob = (counts - discount) / totals[index]
        self.backoff = np.bincount(index, weights=discount) / totals

    def mix(self, context: np.ndarray, token: np.ndarray, lower: np.ndarray) -> np.ndarray:
        """Return this order's probabilities, given those of the order below."""
        seen = lookup(self.keys, self.prob, context * self.vocab_size + token, 0.0)
        return seen + lookup(self.contexts, self.backoff, context, 1.0) * lower


def lookup(keys: np.ndarray, values: np.ndarray, wanted: np.ndarray, missing: float) -> np.ndarray:
    """Return the value of each wanted key in sorted `keys`, or `missing`."""
    at = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[at] == wanted, values[at], missing)


class TrigramModel:
    """Interpolated modified Kneser-Ney of order three."""

    def __init__(self, stream: np.ndarray, vocab_size: int) -> None:
        v = self.vocab_size = vocab_size
        trigrams, counts = np.unique((stream[:-2] * v + stream[1:-1]) * v + stream[2:], return_counts=True)
        bigrams, bigram_types = np.unique(trigrams % (v * v), return_counts=True)
        tokens, token_types = np.unique(bigrams % v, return_counts=True)
        self.trigram = Order(trigrams, counts, v)
        self.bigram = Order(bigrams, bigram_types, v)
        self.unigram = Order(tokens, token_types, v)

    def nats(self, ids: np.ndarray) -> float:
        """Return the code length of `ids[1:]` given `ids[0]`, in nats."""
        first, second, token = np.concatenate((ids[:1], ids[:-2])), ids[:-1], ids[1:]
        uniform = np.full(len(token), 1 / self.vocab_size)
        prob = self.unigram.mix(np.zeros_like(token), token, uniform)
        prob = self.bigram.mix(second, token, prob)
        prob = self.trigram.mix(first * self.vocab_size + second, token, prob)
        return float(-np.log(prob).sum())
