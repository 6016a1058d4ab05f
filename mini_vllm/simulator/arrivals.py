"""When conversations begin in an open system: Poisson, gamma, at a fixed rate, or all at once.

`rate` and `burstiness` mean what they mean in `mini-vllm bench serve`: gaps are gamma distributed with shape
`burstiness` and mean 1 / rate (1 is a Poisson process, less comes in bursts, more is steadier), the first arrival is
at 0, and the gaps are scaled so that the load on offer is the rate that was asked for, whatever the seed. The same
seed at another rate gives the same pattern, stretched. Closed systems, where an arrival waits for a finish, are in
`workload.py`.
"""

import math

import numpy as np
from numpy.typing import NDArray

from mini_vllm.exceptions import ConfigError

OPEN_ARRIVALS = ("poisson", "gamma", "fixed", "at-once")
ARRIVALS = (*OPEN_ARRIVALS, "closed")


def check_arrivals(kind: str, rate: float | None, burstiness: float) -> None:
    """Raise `ConfigError` for what no arrivals can have."""
    if kind not in ARRIVALS:
        raise ConfigError(f"arrivals: must be one of {', '.join(ARRIVALS)}, got {kind!r}")
    if not 0 < burstiness < math.inf:
        raise ConfigError(f"burstiness: must be above 0, got {burstiness!r}")
    if burstiness != 1.0 and kind != "gamma":
        raise ConfigError(f"burstiness: {burstiness:g} only has a meaning for arrivals='gamma', got {kind!r}")
    if kind in ("at-once", "closed"):
        if rate is not None:
            raise ConfigError(f"rate: has no meaning for arrivals={kind!r}")
    elif rate is None or not 0 < rate < math.inf:
        raise ConfigError(f"rate: must be above 0 requests per second for arrivals={kind!r}, got {rate!r}")


def arrival_times(
    kind: str, count: int, rate: float | None, burstiness: float, rng: np.random.Generator
) -> NDArray[np.float64]:
    """Seconds at which each of `count` conversations begins, in order."""
    check_arrivals(kind, rate, burstiness)
    if kind == "at-once" or count < 2:
        return np.zeros(count)
    assert rate is not None, f"{kind} arrivals are not open"
    if kind == "fixed":
        return np.arange(count) / rate
    shape = burstiness if kind == "gamma" else 1.0
    gaps = rng.gamma(shape, 1.0 / shape, count - 1)
    total = gaps.sum()
    gaps = gaps * ((count - 1) / total) if total > 0 else np.ones(count - 1)
    return np.concatenate(([0.0], np.cumsum(gaps))) / rate
