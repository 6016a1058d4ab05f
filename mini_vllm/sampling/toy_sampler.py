"""The teaching sampler: one row of logits, one token, in numpy.

The order is fixed: temperature, top-k, top-p, softmax, one draw. The batched `sampling.sampler.Sampler` means the
same distribution; it only gets its randomness elsewhere, because a seed here draws the same number every call.
"""

import numpy as np
import numpy.typing as npt

from mini_vllm.sampling_params import SamplingParams

Row = npt.NDArray[np.float64]


def softmax(logits: Row) -> Row:
    """Probabilities `[vocab]`. The maximum is subtracted first, so large logits do not overflow."""
    weights = np.exp(logits - np.max(logits))
    return np.asarray(weights / weights.sum())


def apply_top_k(logits: Row, k: int) -> Row:
    """Keep exactly the `k` highest logits (ties go to the lowest id), others become -inf; k <= 0 keeps all."""
    if k <= 0 or k >= len(logits):
        return logits
    return _keep(logits, _best_first(logits)[:k])


def apply_top_p(logits: Row, p: float) -> Row:
    """Keep the smallest set whose probability reaches `p`, with the token that crosses it; p >= 1 keeps all."""
    if p >= 1.0:
        return logits
    order = _best_first(logits)
    before = np.cumsum(softmax(logits)[order])
    return _keep(logits, order[: int(np.count_nonzero(before < p)) + 1])


def _best_first(logits: Row) -> npt.NDArray[np.int64]:
    return np.argsort(-logits, kind="stable")


def _keep(logits: Row, ids: npt.NDArray[np.int64]) -> Row:
    kept = np.full_like(logits, -np.inf)
    kept[ids] = logits[ids]
    return kept


def sample(logits: Row, params: SamplingParams) -> int:
    """One token id from one row. Greedy is the argmax and draws nothing, whatever the other parameters say."""
    if params.is_greedy:
        return int(np.argmax(logits))
    row = np.asarray(logits, dtype=np.float64) / params.temperature
    probabilities = softmax(apply_top_p(apply_top_k(row, params.top_k), params.top_p))
    return int(np.random.default_rng(_entropy(params.seed)).choice(len(row), p=probabilities))


def _entropy(seed: int | None) -> int | None:
    return None if seed is None else seed % 2**64  # numpy takes no negative seeds


class Sampler:
    """`sample` as the object that a `ToyEngine` holds, so that it can be replaced."""

    def sample(self, logits: Row, params: SamplingParams) -> int:
        """One token id from a row `[vocab]` of logits."""
        return sample(logits, params)
