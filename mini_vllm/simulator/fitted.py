"""A cost that was fitted to measured steps: tables where kernels jump, constants where work is proportional.

A step is a matrix product over its tokens, attention over the keys its requests hold, and a choice of tokens. The
first and the last have no formula: libraries change their kernels with the number of rows. So both are tables over
measured sizes, linear in between. `calibrate.py` measures, `fit.py` fits.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mini_vllm.exceptions import ConfigError
from mini_vllm.simulator.cost import StepLoad

FORMAT = "mini-vllm step cost 2"
RATES = ("key", "chunk", "pair", "request", "prompt_token")
Table = tuple[tuple[int, float], ...]
"""(size, seconds) in ascending order of size."""


@dataclass(frozen=True)
class FittedCost:
    """Seconds of a step, as a sum. Raises `ConfigError` for what cannot be.

    token_seconds: of a step of so many tokens. sample_seconds: what sampling so many requests adds to that of one.
    key_seconds: for each key that a request with a single token reads. chunk_seconds, pair_seconds: for each request
    with more tokens, and each (query, key) pair of these. request_seconds, prompt_token_seconds: what adding a request
    takes, outside of every step. slowdown: all this is of a machine that nothing else slows; on average it takes so
    many times as long. quality: how well it describes what was measured. about: where that was.
    """

    token_seconds: Table
    sample_seconds: Table = ()
    key_seconds: float = 0.0
    chunk_seconds: float = 0.0
    pair_seconds: float = 0.0
    request_seconds: float = 0.0
    prompt_token_seconds: float = 0.0
    slowdown: float = 1.0
    quality: dict[str, float] = field(default_factory=dict)
    about: dict[str, Any] = field(default_factory=dict)
    _of_tokens: "_Lookup" = field(init=False, repr=False, compare=False)
    _of_samples: "_Lookup" = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        for name in RATES:
            value = getattr(self, f"{name}_seconds")
            if not 0 <= value < math.inf:
                raise ConfigError(f"{name}_seconds: must be at least 0, got {value!r}")
        if not 1 <= self.slowdown < math.inf:
            raise ConfigError(f"slowdown: must be at least 1, got {self.slowdown!r}")
        _require_table("token_seconds", self.token_seconds)
        _require_table("sample_seconds", self.sample_seconds or ((1, 0.0),))
        if not any(seconds for _, seconds in self.token_seconds):
            raise ConfigError("token_seconds: steps that take no time have no throughput")
        object.__setattr__(self, "_of_tokens", _Lookup(self.token_seconds))
        object.__setattr__(self, "_of_samples", _Lookup(((0, 0.0), (1, 0.0), *self.sample_seconds)))

    def step_seconds(self, load: StepLoad) -> float:
        if not load.num_tokens:
            return 0.0
        starts = load.starts
        seconds = self._of_tokens(load.num_tokens) + self._of_samples(load.num_sampled)
        seconds += self.key_seconds * (sum(starts) + len(starts))
        if load.chunks:
            seconds += self.chunk_seconds * len(load.chunks) + self.pair_seconds * load.prefill_pairs
        return seconds * self.slowdown

    def add_seconds(self, num_prompt_tokens: int) -> float:
        return (self.request_seconds + self.prompt_token_seconds * num_prompt_tokens) * self.slowdown

    def describe(self) -> dict[str, Any]:
        return {
            "cost_model": "fitted",
            "token_seconds": [list(entry) for entry in self.token_seconds],
            "sample_seconds": [list(entry) for entry in self.sample_seconds],
            "seconds_per": {name: getattr(self, f"{name}_seconds") for name in RATES},
            "slowdown": self.slowdown,
            "quality": self.quality,
            "about": self.about,
        }

    def save(self, path: str | Path) -> None:
        """Write it as JSON. Raises `ConfigError` when the file cannot be written."""
        try:
            Path(path).write_text(json.dumps({"format": FORMAT, **self.describe()}, indent=2) + "\n", encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"cost_file: cannot write {path}: {error.strerror}") from error

    @classmethod
    def load(cls, path: str | Path) -> "FittedCost":
        """Read what `save` wrote. Raises `ConfigError` naming the file."""
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise ConfigError(f"cost_file: cannot read {path}: {error}") from error
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise ConfigError(
                f"cost_file: {path} is no fitted cost model (format must be {FORMAT!r}); write one with --calibrate"
            )
        seconds = data.get("seconds_per")
        if not isinstance(seconds, dict) or not all(type(seconds.get(name)) in (int, float) for name in RATES):
            raise ConfigError(f"cost_file: {path}: seconds_per must have a number for each of {', '.join(RATES)}")
        key, chunk, pair, request, prompt_token = (float(seconds[name]) for name in RATES)
        return cls(
            _table_of(path, "token_seconds", data.get("token_seconds")),
            _table_of(path, "sample_seconds", data.get("sample_seconds")),
            key,
            chunk,
            pair,
            request,
            prompt_token,
            slowdown=_slowdown_of(path, data.get("slowdown")),
            quality=data.get("quality", {}),
            about=data.get("about", {}),
        )


def _slowdown_of(path: str | Path, value: Any) -> float:
    if type(value) not in (int, float):
        raise ConfigError(f"cost_file: {path}: slowdown must be a number, got {value!r}")
    return float(value)


def _table_of(path: str | Path, name: str, entries: Any) -> Table:
    try:
        return tuple((int(size), float(seconds)) for size, seconds in entries)
    except (TypeError, ValueError):
        raise ConfigError(f"cost_file: {path}: {name} must be a list of [size, seconds]") from None


def _require_table(name: str, table: Table) -> None:
    sizes = [size for size, _ in table]
    if not sizes or sizes[0] < 1 or sizes != sorted(set(sizes)):
        raise ConfigError(f"{name}: sizes must ascend from at least 1, got {sizes}")
    if not all(0 <= seconds < math.inf for _, seconds in table):
        raise ConfigError(f"{name}: seconds must be at least 0, got {[seconds for _, seconds in table]}")


class _Lookup:
    """Linear between the entries; before the first as there, after the last as it rose over the upper half."""

    def __init__(self, table: Sequence[tuple[int, float]]) -> None:
        sizes, seconds = [size for size, _ in table], [value for _, value in table]
        last = sizes[-1]
        self._values: list[float] = np.interp(np.arange(last + 1), sizes, seconds).tolist()
        self._slope = max(0.0, (self._values[-1] - self._values[last // 2]) / max(last - last // 2, 1))

    def __call__(self, size: int) -> float:
        values = self._values
        if size < len(values):
            return values[size]
        return values[-1] + (size - len(values) + 1) * self._slope
