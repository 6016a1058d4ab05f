"""When requests are sent: seeded gamma arrivals, of which Poisson arrivals are one case.

Gaps between arrivals are drawn from a gamma distribution of shape `burstiness` and mean 1 / rate: 1 is a Poisson
process, less comes in bursts, more is steadier. The gaps are then scaled so that they add up to what the rate asks
for; so the offered load is the one that was asked for, whatever the seed.
"""

import math
from collections.abc import Sequence

import numpy as np


def rates_of(
    num_requests: int,
    request_rate: float,
    ramp_up_strategy: str | None = None,
    start_rps: float | None = None,
    end_rps: float | None = None,
) -> list[float]:
    """The rate in force before each request but the first. A ramp goes from start to end over the requests."""
    count = max(num_requests - 1, 0)
    if ramp_up_strategy is None or start_rps is None or end_rps is None:
        return [request_rate] * count
    progress = [index / max(count - 1, 1) for index in range(count)]
    if ramp_up_strategy == "linear":
        return [start_rps + (end_rps - start_rps) * done for done in progress]
    return [start_rps * (end_rps / start_rps) ** done for done in progress]


def arrival_offsets(rates: Sequence[float], burstiness: float = 1.0, seed: int = 0) -> list[float]:
    """Seconds from the start of the run, for len(rates) + 1 requests; the first is sent at once.

    An infinite rate sends all at once.
    """
    if not rates or math.isinf(rates[0]):
        return [0.0] * (len(rates) + 1)
    means = 1.0 / np.asarray(rates, dtype=np.float64)
    gaps = np.random.default_rng(seed).gamma(shape=burstiness, scale=1.0 / burstiness, size=len(rates)) * means
    total = gaps.sum()
    gaps = gaps * (means.sum() / total) if total > 0 else means
    return [0.0, *np.cumsum(gaps).tolist()]
