"""The flags of `bench serve` as values that are checked before anything is sent. Light to import.

Names and defaults are vLLM's. None means not given. Flags that would not act are refused, not ignored.
"""

import math
from dataclasses import dataclass, field
from typing import Any

from mini_vllm.exceptions import ConfigError
from mini_vllm.sampling_params import SamplingParams

ENDPOINTS = {
    "openai": "/v1/completions",
    "vllm": "/v1/completions",
    "openai-chat": "/v1/chat/completions",
    "openai-responses": "/v1/responses",
    "anthropic": "/v1/messages",
}
"""What each backend speaks, and the path it sends to."""

DATASET_DEFAULTS: dict[str, dict[str, Any]] = {
    "random": {
        "random_input_len": 1024,
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
    "sharegpt": {"sharegpt_output_len": None},
    "custom": {"custom_output_len": 256},
    "timed_trace": {"timed_trace_speed": 1.0},
}
"""The flags each dataset has, and their defaults."""
FROM_FILE = ("sharegpt", "custom", "timed_trace")

LATENCIES = ("ttft", "tpot", "itl", "e2el")
SAMPLING = (
    "temperature", "top_p", "top_k", "min_p", "frequency_penalty", "presence_penalty", "repetition_penalty",
)  # fmt: skip
_NOT_OF_BACKEND = {
    "openai-responses": ("min_p", "frequency_penalty", "presence_penalty", "repetition_penalty", "logprobs"),
    "anthropic": ("min_p", "frequency_penalty", "presence_penalty", "repetition_penalty", "logprobs", "ignore_eos"),
}
"""Flags for which a backend's API has no field. What a server takes beyond it goes into --extra-body."""


@dataclass(frozen=True, kw_only=True)
class ServeOptions:
    """One run against a server. Raises `ConfigError` or `InvalidParameterError` naming the field."""

    backend: str = "openai"
    base_url: str | None = None
    host: str = "127.0.0.1"
    port: int = 8000
    endpoint: str | None = None
    header: tuple[str, ...] = ()
    insecure: bool = False
    model: str | None = None
    served_model_name: str | None = None
    tokenizer: str | None = None
    ready_check_timeout_sec: float = 0.0

    dataset_name: str = "random"
    dataset_path: str | None = None
    num_prompts: int = 1000
    seed: int = 0
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
    sharegpt_output_len: int | None = None
    custom_output_len: int | None = None
    timed_trace_speed: float | None = None
    prompt_token_ids: bool = False
    disable_shuffle: bool = False

    request_rate: float = math.inf
    burstiness: float = 1.0
    ramp_up_strategy: str | None = None
    ramp_up_start_rps: float | None = None
    ramp_up_end_rps: float | None = None
    max_concurrency: int | None = None
    num_warmups: int = 0

    ignore_eos: bool = False
    logprobs: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    repetition_penalty: float | None = None
    extra_body: dict[str, Any] = field(default_factory=dict)
    request_id_prefix: str = "bench-"

    goodput: tuple[str, ...] = ()
    percentile_metrics: str = "ttft,tpot,itl,e2el"
    metric_percentiles: str = "90,99"
    label: str | None = None
    metadata: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        self._check_choices()
        self._check_numbers()
        self._check_load()
        for name in _NOT_OF_BACKEND.get(self.backend, ()):
            if getattr(self, name) not in (None, False):
                raise ConfigError(f"{name}: the API of backend={self.backend!r} has no such field; see --extra-body")
        if self.prompt_token_ids and self.path_kind != "completions":
            raise ConfigError(f"prompt_token_ids: backend={self.backend!r} takes text only")
        SamplingParams(**{name: value for name in SAMPLING if (value := getattr(self, name)) is not None})
        self.dataset_settings()
        _ = self.goodput_limits, self.latencies, self.percentiles, self.headers, self.metadata_fields

    # -- checks ----------------------------------------------------------------------------------------------

    def _check_choices(self) -> None:
        for name, choices in (("backend", ENDPOINTS), ("dataset_name", DATASET_DEFAULTS)):
            if getattr(self, name) not in choices:
                raise ConfigError(f"{name}: must be one of {', '.join(choices)}, got {getattr(self, name)!r}")
        if self.ramp_up_strategy not in (None, "linear", "exponential"):
            raise ConfigError(f"ramp_up_strategy: must be linear or exponential, got {self.ramp_up_strategy!r}")
        if not isinstance(self.extra_body, dict):
            raise ConfigError("extra_body: must be a JSON object")
        if self.endpoint is not None and not self.endpoint.startswith("/"):
            raise ConfigError(f"endpoint: a path begins with /, got {self.endpoint!r}")

    def _check_numbers(self) -> None:
        for name, least in (("num_prompts", 1), ("num_warmups", 0), ("max_concurrency", 1), ("logprobs", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ConfigError(f"{name}: must be at least {least}, got {value}")
        for name in ("request_rate", "burstiness", "timed_trace_speed", "ramp_up_start_rps"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ConfigError(f"{name}: must be more than 0, got {value}")
        if not math.isfinite(self.burstiness):
            raise ConfigError("burstiness: must be finite")
        if self.ready_check_timeout_sec < 0:
            raise ConfigError("ready_check_timeout_sec: must be 0 or more")

    def _check_load(self) -> None:
        ramp = (self.ramp_up_strategy, self.ramp_up_start_rps, self.ramp_up_end_rps)
        if None in ramp and ramp != (None, None, None):
            raise ConfigError("ramp_up_strategy: needs --ramp-up-start-rps and --ramp-up-end-rps, and they need it")
        if self.ramp_up_strategy and self.request_rate != math.inf:
            raise ConfigError("ramp_up_strategy: sets the rate itself; leave out --request-rate")
        if self.ramp_up_end_rps is not None and not 0 < self.ramp_up_end_rps < math.inf:
            raise ConfigError(f"ramp_up_end_rps: must be more than 0 and finite, got {self.ramp_up_end_rps}")
        if (self.sends_at_once or self.dataset_name == "timed_trace") and self.burstiness != 1.0:
            raise ConfigError("burstiness: has no meaning without --request-rate or a ramp")
        if self.dataset_name == "timed_trace" and (self.request_rate != math.inf or self.ramp_up_strategy):
            raise ConfigError("request_rate: the trace says when requests arrive; see --timed-trace-speed")

    # -- what follows from the flags -------------------------------------------------------------------------

    @property
    def url(self) -> str:
        return self.base_url or f"http://{self.host}:{self.port}"

    @property
    def path(self) -> str:
        return self.endpoint or ENDPOINTS[self.backend]

    @property
    def path_kind(self) -> str:
        """Which API is spoken: completions, chat, responses or messages."""
        return ENDPOINTS[self.backend].removeprefix("/v1/").partition("/")[0]

    @property
    def sends_at_once(self) -> bool:
        """Whether no time passes between requests."""
        return self.request_rate == math.inf and not self.ramp_up_strategy and self.dataset_name != "timed_trace"

    @property
    def latencies(self) -> list[str]:
        """Which latencies are reported. Raises `ConfigError` for others."""
        names = [name.strip() for name in self.percentile_metrics.split(",") if name.strip()]
        if not set(names) <= set(LATENCIES):
            raise ConfigError(f"percentile_metrics: must be of {', '.join(LATENCIES)}, got {self.percentile_metrics!r}")
        return names

    @property
    def percentiles(self) -> list[float]:
        try:
            ranks = [float(rank) for rank in self.metric_percentiles.split(",") if rank.strip()]
        except ValueError:
            ranks = [-1.0]
        if not all(0 <= rank <= 100 for rank in ranks):
            raise ConfigError(
                f"metric_percentiles: must be numbers from 0 to 100 and commas, got {self.metric_percentiles!r}"
            )
        return ranks

    @property
    def goodput_limits(self) -> dict[str, float]:
        """{'ttft': milliseconds, ...}."""
        limits = {}
        for name, value in _pairs("goodput", self.goodput, ":").items():
            if name not in ("ttft", "tpot", "e2el"):
                raise ConfigError(f"goodput: must be ttft:MS, tpot:MS or e2el:MS, got {name!r}")
            try:
                limits[name] = float(value)
            except ValueError:
                raise ConfigError(f"goodput: {name} needs milliseconds, got {value!r}") from None
        return limits

    @property
    def headers(self) -> dict[str, str]:
        return _pairs("header", self.header, "=")

    @property
    def metadata_fields(self) -> dict[str, str]:
        return _pairs("metadata", self.metadata, "=")

    def dataset_settings(self) -> dict[str, Any]:
        """The chosen dataset's own flags with defaults filled in. Raises `ConfigError` for another dataset's flags."""
        settings = dict(DATASET_DEFAULTS[self.dataset_name])
        for dataset, defaults in DATASET_DEFAULTS.items():
            for name in defaults:
                value = getattr(self, name)
                if value is not None and dataset != self.dataset_name:
                    raise ConfigError(f"{name}: has no meaning for dataset_name={self.dataset_name!r}")
                settings |= {name: value} if value is not None else {}
        if (self.dataset_path is None) == (self.dataset_name in FROM_FILE):
            needs = "needs a file" if self.dataset_path is None else "reads no file"
            raise ConfigError(f"dataset_path: dataset_name={self.dataset_name!r} {needs}")
        for name in ("input_len", "output_len"):
            self._apply_length(name, settings)
        return settings

    def _apply_length(self, name: str, settings: dict[str, Any]) -> None:
        """`input_len` and `output_len` stand for the dataset's own flags."""
        value, own = getattr(self, name), f"{self.dataset_name}_{name}"
        if value is None:
            return
        if own not in settings:
            raise ConfigError(f"{name}: has no meaning for dataset_name={self.dataset_name!r}")
        if getattr(self, own) not in (None, value):
            raise ConfigError(f"{name}: {value} contradicts {own}: {getattr(self, own)}")
        settings[own] = value


def _pairs(field_name: str, texts: tuple[str, ...], mark: str) -> dict[str, str]:
    """'NAME=VALUE' each. Raises `ConfigError`."""
    pairs = {}
    for text in texts:
        name, found, value = text.partition(mark)
        if not found or not name:
            raise ConfigError(f"{field_name}: must look like NAME{mark}VALUE, got {text!r}")
        pairs[name.strip()] = value.strip()
    return pairs
