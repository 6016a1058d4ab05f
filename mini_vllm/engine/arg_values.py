"""Arguments that are more than a number or a name: sizes with units, names of classes, shares of tenants.

Each function takes what a user may write, in Python or on the command line, and raises `ConfigError` with the name of
the argument.
"""

import math
import re
from collections.abc import Mapping
from typing import Any

from mini_vllm.config import KV_CACHE_DTYPE_ALIASES, KV_CACHE_DTYPES
from mini_vllm.exceptions import ConfigError

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "K": 2**10, "M": 2**20, "G": 2**30}


def parse_size(name: str, value: Any) -> int:
    """An integer, or one with a unit: k, m, g are powers of 1000, K, M, G of 1024."""
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([kmgKMG]?)", value.strip()) if isinstance(value, str) else None
    if match is None:
        raise ConfigError(f"{name}: must be an integer, or one with a unit such as 16k or 2G, got {value!r}")
    size = float(match[1]) * _UNITS[match[2]]
    if size != int(size):
        raise ConfigError(f"{name}: must come to a whole number, got {value!r}")
    return int(size)


def parse_logits_processors(value: Any) -> tuple[Any, ...]:
    """Classes, or names module:Class, as a list or as text with commas between."""
    items = tuple(name.strip() for name in value.split(",")) if isinstance(value, str) else tuple(value or ())
    for item in items:
        if not isinstance(item, type) and not (isinstance(item, str) and re.fullmatch(r"[\w.]+:[\w.]+", item)):
            raise ConfigError(f"logits_processors: must be classes or names module:Class, got {item!r}")
    return items


def parse_names(value: Any) -> tuple[str, ...]:
    """Names, as a list or as text with commas between."""
    items = value.split(",") if isinstance(value, str) else tuple(value or ())
    if not all(isinstance(name, str) for name in items):
        raise ConfigError(f"quantization_skip_layers: must be names, got {value!r}")
    return tuple(name.strip() for name in items if name.strip())


def parse_tenant_weights(value: Any) -> dict[str, float]:
    """A mapping of names to numbers above 0, or text such as batch=0.5,chat=2."""
    if isinstance(value, str):
        parts = [part.rpartition("=") for part in value.split(",") if part.strip()]
        pairs: list[tuple[Any, Any]] = [(name.strip(), _number(text)) for name, _, text in parts]
    elif isinstance(value, Mapping) or value is None:
        pairs = list((value or {}).items())
    else:
        raise ConfigError(f"tenant_weights: must be a mapping, or text such as name=2,other=0.5, got {value!r}")
    for name, weight in pairs:
        if not isinstance(name, str) or not _is_weight(weight):
            raise ConfigError(f"tenant_weights: must be names and numbers above 0 (name=2,other=0.5), got {value!r}")
    if len(dict(pairs)) < len(pairs):
        raise ConfigError(f"tenant_weights: must name each tenant once, got {value!r}")
    return dict(pairs)


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _is_weight(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf


def parse_max_model_len(value: Any) -> int | str | None:
    """None, 'auto', or a size of at least 1. vLLM's -1 means 'auto'."""
    if value is None or value == "auto":
        return value  # type: ignore[no-any-return]
    if value in (-1, "-1"):
        return "auto"
    size = parse_size("max_model_len", value)
    if size < 1:
        raise ConfigError(f"max_model_len: must be at least 1, or 'auto', got {value!r}")
    return size


def parse_kv_cache_dtype(value: str) -> str:
    """One of `KV_CACHE_DTYPES`, by its name or a short one. Raises `ConfigError`."""
    name = KV_CACHE_DTYPE_ALIASES.get(value, value)
    if name not in KV_CACHE_DTYPES:
        raise ConfigError(
            f"kv_cache_dtype: must be one of {', '.join((*KV_CACHE_DTYPES, *KV_CACHE_DTYPE_ALIASES))}, got {value!r}"
        )
    return name
