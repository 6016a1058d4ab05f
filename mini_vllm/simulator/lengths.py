"""How long prompts and outputs are: fixed, uniform, log-normal, Zipf, or as in a trace.

A distribution is written as one short text, so that a flag, a sweep and a file can all hold it: `512`,
`uniform:200,4000`, `lognormal:500,1.0` (mean, sigma; a third number is a limit), `zipf:1.2,4096` (exponent, largest),
`trace:FILE`. Lengths are whole tokens, at least 1. Draws are numpy's, from the generator that is handed in.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from mini_vllm.engine.request_trace import read_request_trace
from mini_vllm.exceptions import ConfigError

MAX_LENGTH = 2**31 - 1
_MAX_ZIPF = 10**7
_MAX_REDRAWS = 1000


class Lengths(Protocol):
    """A distribution of lengths in tokens."""

    def draw(self, rng: np.random.Generator, count: int) -> NDArray[np.int64]:
        """`count` lengths, the same for the same generator."""


@dataclass(frozen=True)
class Fixed:
    value: int

    def draw(self, rng: np.random.Generator, count: int) -> NDArray[np.int64]:
        return np.full(count, self.value, dtype=np.int64)


@dataclass(frozen=True)
class Uniform:
    """Both ends included."""

    low: int
    high: int

    def draw(self, rng: np.random.Generator, count: int) -> NDArray[np.int64]:
        return rng.integers(self.low, self.high + 1, count)


@dataclass(frozen=True)
class LogNormal:
    """mean: of the distribution itself, not of its logarithm. Values above `limit` are drawn again."""

    mean: float
    sigma: float
    limit: int = MAX_LENGTH

    def draw(self, rng: np.random.Generator, count: int) -> NDArray[np.int64]:
        values = self._draw(rng, count)
        for _ in range(_MAX_REDRAWS):
            above = values > self.limit
            if not above.any():
                return values
            values[above] = self._draw(rng, int(above.sum()))
        raise ConfigError(
            f"lognormal: hardly any value of mean {self.mean:g} and sigma {self.sigma:g} is at most {self.limit}"
        )

    def _draw(self, rng: np.random.Generator, count: int) -> NDArray[np.int64]:
        mu = math.log(self.mean) - self.sigma**2 / 2
        values = np.minimum(np.rint(rng.lognormal(mu, self.sigma, count)), MAX_LENGTH + 1)
        return np.maximum(values, 1).astype(np.int64)


@dataclass(frozen=True)
class Zipf:
    """P(k) in proportion to k^-exponent for k from 1 to `largest`: most are short, a few are very long."""

    exponent: float
    largest: int

    def draw(self, rng: np.random.Generator, count: int) -> NDArray[np.int64]:
        cumulative = np.cumsum(np.arange(1, self.largest + 1, dtype=np.float64) ** -self.exponent)
        ranks = np.searchsorted(cumulative, rng.random(count) * cumulative[-1], side="right")
        return np.asarray(ranks + 1, dtype=np.int64)


@dataclass(frozen=True)
class Observed:
    """Draws with replacement from lengths that were seen."""

    values: tuple[int, ...]

    def draw(self, rng: np.random.Generator, count: int) -> NDArray[np.int64]:
        return np.asarray(self.values, dtype=np.int64)[rng.integers(0, len(self.values), count)]


def parse_lengths(field: str, text: str, *, of_outputs: bool = False) -> Lengths:
    """The distribution that `text` describes. Raises `ConfigError` naming `field`.

    of_outputs: which column of a trace is meant.
    """
    kind, _, rest = text.strip().partition(":")
    if not rest:
        return Fixed(_whole(field, kind, text))
    if kind == "trace":
        return _from_trace(field, rest, of_outputs)
    makers: dict[str, Callable[[str, list[str], str], Lengths]] = {
        "uniform": _uniform, "lognormal": _lognormal, "zipf": _zipf,
    }  # fmt: skip
    if kind not in makers:
        raise ConfigError(
            f"{field}: must be a number, uniform:LOW,HIGH, lognormal:MEAN,SIGMA[,LIMIT], zipf:EXPONENT,LARGEST or "
            f"trace:FILE, got {text!r}"
        )
    return makers[kind](field, [part.strip() for part in rest.split(",")], text)


def _uniform(field: str, parts: list[str], text: str) -> Lengths:
    _require_parts(field, parts, (2,), text)
    low, high = (_whole(field, part, text) for part in parts)
    if low > high:
        raise ConfigError(f"{field}: uniform needs LOW <= HIGH, got {text!r}")
    return Uniform(low, high)


def _lognormal(field: str, parts: list[str], text: str) -> Lengths:
    _require_parts(field, parts, (2, 3), text)
    mean, sigma = _number(field, parts[0], text), _number(field, parts[1], text)
    if mean < 1 or sigma < 0:
        raise ConfigError(f"{field}: lognormal needs MEAN >= 1 and SIGMA >= 0, got {text!r}")
    return LogNormal(mean, sigma, _whole(field, parts[2], text) if len(parts) == 3 else MAX_LENGTH)


def _zipf(field: str, parts: list[str], text: str) -> Lengths:
    _require_parts(field, parts, (2,), text)
    exponent, largest = _number(field, parts[0], text), _whole(field, parts[1], text)
    if exponent < 0 or largest > _MAX_ZIPF:
        raise ConfigError(f"{field}: zipf needs EXPONENT >= 0 and LARGEST <= {_MAX_ZIPF}, got {text!r}")
    return Zipf(exponent, largest)


def _from_trace(field: str, path: str, of_outputs: bool) -> Lengths:
    requests = read_request_trace(path)
    if not requests:
        raise ConfigError(f"{field}: the trace {path} has no requests")
    return Observed(tuple(max(r.output_length, 1) if of_outputs else r.input_length for r in requests))


def _require_parts(field: str, parts: list[str], counts: tuple[int, ...], text: str) -> None:
    if len(parts) not in counts:
        raise ConfigError(f"{field}: needs {' or '.join(map(str, counts))} numbers, got {text!r}")


def _number(field: str, part: str, text: str) -> float:
    try:
        value = float(part)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ConfigError(f"{field}: {part!r} is not a number in {text!r}")
    return value


def _whole(field: str, part: str, text: str) -> int:
    value = _number(field, part, text)
    if value != int(value) or not 1 <= value <= MAX_LENGTH:
        raise ConfigError(f"{field}: lengths are whole numbers from 1 to {MAX_LENGTH}, got {text!r}")
    return int(value)
