"""The flags of both benchmarks, as values that are checked before a model is loaded.

Light to import: the command line reads names and defaults from here. Lengths are in tokens. None means not given.
"""

from dataclasses import dataclass
from typing import Any

from mini_vllm.exceptions import ConfigError
from mini_vllm.sampling_params import SamplingParams

DATASETS = ("random", "sharegpt", "prefix_repetition")

DATASET_DEFAULTS: dict[str, dict[str, Any]] = {
    "random": {
        "random_input_len": 256,
        "random_output_len": 128,
        "random_range_ratio": 0.0,
        "random_prefix_len": 0,
    },
    "prefix_repetition": {
        "prefix_repetition_prefix_len": 256,
        "prefix_repetition_suffix_len": 256,
        "prefix_repetition_num_prefixes": 10,
        "prefix_repetition_output_len": 128,
    },
    "sharegpt": {"dataset_path": None},
}
"""The flags each dataset has, and their defaults."""


@dataclass(frozen=True, kw_only=True)
class LatencyOptions:
    """One batch of equal requests, repeated. Raises `ConfigError` or `InvalidParameterError` naming the field."""

    input_len: int = 32
    output_len: int = 128
    batch_size: int = 8
    num_iters: int = 10
    num_iters_warmup: int = 3
    temperature: float = 1.0
    disable_detokenize: bool = False
    keep_prefix_cache: bool = False
    save_detailed: bool = False

    def __post_init__(self) -> None:
        for name in ("input_len", "output_len", "batch_size", "num_iters"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}: must be at least 1, got {getattr(self, name)}")
        if self.num_iters_warmup < 0:
            raise ConfigError(f"num_iters_warmup: must be 0 or more, got {self.num_iters_warmup}")
        SamplingParams(temperature=self.temperature)  # raises for what no request could have


@dataclass(frozen=True, kw_only=True)
class ThroughputOptions:
    """What to send and how often. Raises `ConfigError` for flags that would not act.

    input_len, output_len: for any dataset that has such a length; they stand for its own flags.
    """

    num_prompts: int = 64
    dataset_name: str | None = None
    dataset_path: str | None = None
    input_len: int | None = None
    output_len: int | None = None
    random_input_len: int | None = None
    random_output_len: int | None = None
    random_range_ratio: float | None = None
    random_prefix_len: int | None = None
    prefix_repetition_prefix_len: int | None = None
    prefix_repetition_suffix_len: int | None = None
    prefix_repetition_num_prefixes: int | None = None
    prefix_repetition_output_len: int | None = None
    num_repeats: int = 3
    num_warmups: int = 8
    temperature: float = 1.0
    disable_detokenize: bool = False
    keep_prefix_cache: bool = False
    save_detailed: bool = False

    def __post_init__(self) -> None:
        for name, least in (("num_prompts", 1), ("num_repeats", 1), ("num_warmups", 0)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name}: must be at least {least}, got {getattr(self, name)}")
        if self.dataset_name is not None and self.dataset_name not in DATASETS:
            raise ConfigError(f"dataset_name: must be one of {', '.join(DATASETS)}, got {self.dataset_name!r}")
        self.dataset_settings()
        SamplingParams(temperature=self.temperature)  # raises for what no request could have

    @property
    def dataset(self) -> str:
        """The name given, else sharegpt when there is a file and random when there is none (as vLLM)."""
        return self.dataset_name or ("random" if self.dataset_path is None else "sharegpt")

    def dataset_settings(self) -> dict[str, Any]:
        """The chosen dataset's own flags with defaults filled in. Raises `ConfigError` for another dataset's flags."""
        settings = dict(DATASET_DEFAULTS[self.dataset])
        for dataset, defaults in DATASET_DEFAULTS.items():
            for name in defaults:
                value = getattr(self, name)
                if value is None:
                    continue
                if dataset != self.dataset:
                    raise ConfigError(f"{name}: has no meaning for dataset_name={self.dataset!r}")
                settings[name] = value
        if self.dataset == "sharegpt" and self.dataset_path is None:
            raise ConfigError("dataset_path: sharegpt needs a file")
        self._apply_lengths(settings)
        return settings

    def _apply_lengths(self, settings: dict[str, Any]) -> None:
        """`input_len` and `output_len` stand for the dataset's own flags."""
        own = {
            "random": ("random_input_len", "random_output_len"),
            "prefix_repetition": (None, "prefix_repetition_output_len"),
            "sharegpt": (None, "output_len"),
        }[self.dataset]
        for name, target in zip(("input_len", "output_len"), own, strict=True):
            value = getattr(self, name)
            if value is None:
                continue
            if target is None:
                raise ConfigError(f"{name}: has no meaning for dataset_name={self.dataset!r}")
            if target != name and getattr(self, target) not in (None, value):
                raise ConfigError(f"{name}: {value} contradicts {target}: {getattr(self, target)}")
            settings[target] = value
