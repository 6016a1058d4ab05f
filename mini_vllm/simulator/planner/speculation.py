"""What speculative decoding can gain (Leviathan et al., 2023): the expected tokens of a cycle over its cost.

alpha: chance that one draft token is accepted, taken as the same at every position. k: drafts per cycle. c: cost of
one draft as a share of one step of the target. Verification costs a step, and `verify_growth` more of one per draft
where the target is no longer bound by memory.
"""

from mini_vllm.exceptions import ConfigError


def expected_tokens_per_verify(alpha: float, k: int) -> float:
    """(1 - alpha^(k+1)) / (1 - alpha): accepted drafts and the one token that verification always yields."""
    _check(alpha, k)
    return float(k + 1) if alpha == 1 else (1 - alpha ** (k + 1)) / (1 - alpha)


def speedup(alpha: float, k: int, c: float, verify_growth: float = 0.0) -> float:
    """Expected tokens over the cycle's cost in steps: E / (1 + k * (c + verify_growth))."""
    if c < 0 or verify_growth < 0:
        raise ConfigError(f"draft_cost: must be at least 0, got {min(c, verify_growth)}")
    return expected_tokens_per_verify(alpha, k) / (1 + k * (c + verify_growth))


def optimal_k(alpha: float, c: float, max_k: int = 32, verify_growth: float = 0.0) -> int:
    """The number of drafts that gains most; the smaller of equal ones, 0 when speculation only costs."""
    return max(range(max_k + 1), key=lambda k: (speedup(alpha, k, c, verify_growth), -k))


def speculation_wins(alpha: float, c: float, verify_growth: float = 0.0) -> bool:
    """Some k gains exactly when alpha exceeds what a draft costs, its verification included."""
    return alpha > c + verify_growth


def ceiling(alpha: float) -> float:
    """Speed-up with free drafts without end: 1 / (1 - alpha)."""
    _check(alpha, 0)
    return float("inf") if alpha == 1 else 1 / (1 - alpha)


def acceptance_from_tokens(tokens_per_cycle: float, k: int) -> float:
    """The alpha that `tokens_per_cycle` (the mean acceptance length, bonus included) at k drafts implies."""
    if not 1 <= tokens_per_cycle <= k + 1:
        raise ConfigError(f"tokens_per_cycle: must be in [1, {k + 1}] with {k} drafts, got {tokens_per_cycle}")
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if expected_tokens_per_verify(middle, k) < tokens_per_cycle else (low, middle)
    return high


def _check(alpha: float, k: int) -> None:
    if not 0 <= alpha <= 1:
        raise ConfigError(f"acceptance_rate: must be in [0, 1], got {alpha}")
    if k < 0:
        raise ConfigError(f"num_speculative_tokens: must be at least 0, got {k}")
