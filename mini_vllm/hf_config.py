"""A checkpoint's config.json (and generation_config.json) as one typed, validated value.

Both spellings are read: `torch_dtype` or `dtype`, `rope_theta` with `rope_scaling` or `rope_parameters`. What is
missing or ill-typed is a `CheckpointError` naming file and key; a rotary scaling that is not implemented is an
`UnsupportedModelError`. Options only one family has stay in `raw`, and that family's model reads or refuses them.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from mini_vllm.exceptions import CheckpointError, UnsupportedModelError
from mini_vllm.logger import init_logger

logger = init_logger(__name__)

CONFIG_FILE = "config.json"
GENERATION_CONFIG_FILE = "generation_config.json"
SUPPORTED_DTYPES = ("float32", "bfloat16", "float16")
ROPE_SCALING_KEYS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor", "original_max_position_embeddings"),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("factor", "original_max_position_embeddings"),
    "longrope": ("short_factor", "long_factor", "factor", "original_max_position_embeddings"),
}
"""Supported rotary types and what each needs."""
ROPE_OPTIONAL_KEYS: dict[str, tuple[str, ...]] = {
    "yarn": ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
    "longrope": ("attention_factor",),
}
KEY_NAMES: dict[str, dict[str, str]] = {
    "gemma2": {"hidden_act": "hidden_activation"},
    "gemma3_text": {"hidden_act": "hidden_activation"},
    "gpt2": {
        "hidden_size": "n_embd",
        "intermediate_size": "n_inner",
        "num_hidden_layers": "n_layer",
        "num_attention_heads": "n_head",
        "max_position_embeddings": "n_positions",
        "hidden_act": "activation_function",
    },
    "opt": {"intermediate_size": "ffn_dim", "hidden_act": "activation_function"},
}
"""What files of a model_type call a key that most call otherwise. The usual name is read where theirs is not given."""
_GEMMA_DEFAULTS: dict[str, Any] = {
    "hidden_act": "gelu_pytorch_tanh",
    "num_key_value_heads": 4,
    "head_dim": 256,
    "sliding_window": 4096,
    "query_pre_attn_scalar": 256,
    "tie_word_embeddings": True,
}
MODEL_TYPE_DEFAULTS: dict[str, dict[str, Any]] = {
    "gemma2": {
        **_GEMMA_DEFAULTS,
        "sliding_window_pattern": 2,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
    },
    "gemma3_text": {**_GEMMA_DEFAULTS, "sliding_window_pattern": 6},
    "gpt2": {
        "hidden_act": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        "scale_attn_weights": True,
        "tie_word_embeddings": True,
    },
    "opt": {
        "hidden_act": "relu",
        "do_layer_norm_before": True,
        "enable_bias": True,
        "layer_norm_elementwise_affine": True,
        "tie_word_embeddings": True,
    },
    "llama4_text": {
        "num_key_value_heads": 8,
        "head_dim": 128,
        "rms_norm_eps": 1e-5,
        "intermediate_size_mlp": 16384,
        "interleave_moe_layer_step": 1,
        "no_rope_layer_interval": 4,
        "attention_chunk_size": 8192,
        "use_qk_norm": True,
        "attn_temperature_tuning": True,
        "floor_scale": 8192,
        "attn_scale": 0.1,
    },
    "mistral": {"sliding_window": 4096, "num_key_value_heads": 8},
    "phi3": {"rms_norm_eps": 1e-5},
    "qwen3": {"head_dim": 128},
    "stablelm": {"layer_norm_eps": 1e-5},
}
"""What a key that changes results means where a file of this model_type omits it, when not what others mean."""

_ORIGINAL = "original_max_position_embeddings"
_ROPE_OTHER_KEYS = {"type", "rope_type", "rope_theta", "partial_rotary_factor"}
_ROPE_REFUSED_KEYS = ("short_mscale", "long_mscale", "mrope_section")
_PARTIAL_ROTARY_DEFAULTS = {"stablelm": 0.25}
_LIMIT_IS_STRETCHED_ALREADY = ("gemma3", "gemma3_text")
_ROPE_THETA_DEFAULTS = {"gemma3_text": 1e6, "llama4_text": 5e5}
_LOCAL_ROPE_THETA_DEFAULT = 1e4
_WITH_LOCAL_ROPE = ("gemma3_text",)
"""Model types whose sliding-window layers turn by frequencies of their own."""
_NO_DEFAULT: Any = object()
_TOO_LARGE = 10**300


@dataclass(frozen=True)
class RopeConfig:
    """Rotary embedding: base `theta`, and `scaling` values whose meaning `rope_type` gives (layers/rope_scaling.py)."""

    rope_type: str = "default"
    theta: float = 10000.0
    scaling: dict[str, Any] = field(default_factory=dict, hash=False)
    partial_rotary_factor: float = 1.0
    """Share of each head that is rotated."""
    max_model_len: int | None = None
    """Tokens a request may hold: 'dynamic' and 'longrope' choose their frequencies by it, once per engine. None is
    within the original context."""


@dataclass(frozen=True)
class HFConfig:
    """The parts of config.json that models are built from."""

    architectures: tuple[str, ...]
    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    hidden_act: str
    rms_norm_eps: float
    rope: RopeConfig
    max_position_embeddings: int
    tie_word_embeddings: bool
    attention_bias: bool
    mlp_bias: bool
    sliding_window: int | None
    """As written in the file; a family may have a switch beside it."""
    dtype: str | None
    """What the weights are stored in, one of `SUPPORTED_DTYPES`; None when the file does not say."""
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    raw: dict[str, Any] = field(repr=False, hash=False)
    local_rope: RopeConfig | None = None
    """Of sliding-window layers, in families where it is not `rope`."""

    @classmethod
    def from_folder(cls, path: str | Path) -> "HFConfig":
        """Read `path`/config.json. Raises `CheckpointError`, `UnsupportedModelError`."""
        folder = Path(path)
        if not folder.is_dir():
            raise CheckpointError(f"model: {str(path)!r} is not a folder")
        if not (folder / CONFIG_FILE).is_file():
            raise CheckpointError(f"model: {str(path)!r} has no {CONFIG_FILE}")
        return cls.from_dict(_read_json(folder / CONFIG_FILE))

    @classmethod
    def from_dict(cls, d: Mapping[str, Any]) -> "HFConfig":
        """The same from the parsed JSON."""
        read = _Reader(d)
        if isinstance(d.get("text_config"), dict) and read.d.get("num_attention_heads") is None:
            raise UnsupportedModelError(
                f"{CONFIG_FILE}: architectures {list(read.architectures())} is not supported: it has several parts, of "
                "which text_config is one; only models of text alone are supported"
            )
        num_heads = read.integer("num_attention_heads")
        return cls(
            architectures=read.architectures(),
            model_type=read.model_type,
            vocab_size=read.integer("vocab_size"),
            hidden_size=read.integer("hidden_size"),
            intermediate_size=read.intermediate_size(),
            num_hidden_layers=read.integer("num_hidden_layers"),
            num_attention_heads=num_heads,
            num_key_value_heads=read.kv_heads(num_heads),
            head_dim=read.head_dim(num_heads),
            hidden_act=read.string("hidden_act", "silu"),
            rms_norm_eps=read.number("rms_norm_eps", 1e-6),
            rope=read.rope(),
            max_position_embeddings=read.integer("max_position_embeddings"),
            tie_word_embeddings=read.boolean("tie_word_embeddings"),
            attention_bias=read.boolean("attention_bias"),
            mlp_bias=read.boolean("mlp_bias"),
            sliding_window=read.optional_integer("sliding_window", minimum=1),
            dtype=read.dtype(),
            bos_token_id=read.optional_integer("bos_token_id", minimum=0),
            eos_token_ids=read.eos_token_ids(),
            raw=dict(d),
            local_rope=read.local_rope(),
        )

    def optional_number(self, key: str) -> float | None:
        """An option only one family has: a positive number, None where it is null. Raises `CheckpointError`."""
        read = _Reader(self.raw)
        return None if read.d.get(key) is None else read.number(key)

    def number(self, key: str) -> float:
        """The same where the family cannot do without."""
        return _Reader(self.raw).number(key)

    def integer(self, key: str, default: int | None = None) -> int:
        return _Reader(self.raw).integer(key, _NO_DEFAULT if default is None else default)

    def boolean(self, key: str) -> bool:
        return _Reader(self.raw).boolean(key)

    @property
    def derived_max_model_len(self) -> int:
        """Most tokens a request may ever hold: `max_position_embeddings`, or what rope scaling stretches it to."""
        scaling, limit = self.rope.scaling, self.max_position_embeddings
        if self.rope.rope_type == "yarn":
            return int(scaling[_ORIGINAL] * scaling["factor"])
        stretched = self.rope.rope_type in ("linear", "dynamic") and self.model_type not in _LIMIT_IS_STRETCHED_ALREADY
        return int(limit * scaling["factor"]) if stretched else limit

    @property
    def default_max_model_len(self) -> int:
        """The limit when none is asked for. For longrope the original context: its long factors make short texts
        worse, so they have to be asked for."""
        limit = self.derived_max_model_len
        return min(limit, int(self.rope.scaling[_ORIGINAL])) if self.rope.rope_type == "longrope" else limit

    def with_max_model_len(self, max_model_len: int | None) -> "HFConfig":
        """The config to build a model from for requests of at most this many tokens; None is the default limit.

        'auto', which may shrink to the pool when the model is long built, counts as None: what the pool holds never
        changes a token.
        """
        limit = self.default_max_model_len if max_model_len is None else max_model_len
        local_rope = None if self.local_rope is None else replace(self.local_rope, max_model_len=limit)
        return replace(self, rope=replace(self.rope, max_model_len=limit), local_rope=local_rope)


def generation_config(path: str | Path) -> dict[str, Any]:
    """The parsed `path`/generation_config.json; empty when there is none. Raises `CheckpointError` if malformed."""
    file = Path(path) / GENERATION_CONFIG_FILE
    return _read_json(file) if file.is_file() else {}


def _read_json(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{file}: must hold a JSON object, not {type(value).__name__}")
    return value


class _Reader:
    """Typed look-ups in config.json; `null` counts as absent, as it does for the tools that write the file."""

    def __init__(self, d: Mapping[str, Any]) -> None:
        self.d, self.names = d, dict[str, str]()
        self.model_type = self.string("model_type", "")
        self.names = KEY_NAMES.get(self.model_type, {})
        named = {key: d[name] for key, name in self.names.items() if d.get(name) is not None}
        self.d = {**MODEL_TYPE_DEFAULTS.get(self.model_type, {}), **d, **named}

    def fail(self, key: str, problem: str) -> CheckpointError:
        return CheckpointError(f"{CONFIG_FILE}: {self.names.get(key, key)} {problem}")

    def _get(self, key: str, default: Any) -> Any:
        value = self.d.get(key)
        if value is not None:
            return value
        if default is _NO_DEFAULT:
            raise self.fail(key, "is missing")
        return default

    def integer(self, key: str, default: Any = _NO_DEFAULT, minimum: int = 1) -> int:
        value = self._get(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
            raise self.fail(key, f"must be an integer of at least {minimum}, got {value!r}")
        return value

    def optional_integer(self, key: str, minimum: int) -> int | None:
        return None if self.d.get(key) is None else self.integer(key, minimum=minimum)

    def intermediate_size(self) -> int:
        default = 4 * self.integer("hidden_size") if self.model_type == "gpt2" else _NO_DEFAULT
        return self.integer("intermediate_size", default)

    def number(self, key: str, default: Any = _NO_DEFAULT) -> float:
        return _positive_number(self._get(key, default), self, key)

    def boolean(self, key: str) -> bool:
        value = self._get(key, False)
        if not isinstance(value, bool):
            raise self.fail(key, f"must be true or false, got {value!r}")
        return value

    def string(self, key: str, default: str) -> str:
        value = self._get(key, default)
        if not isinstance(value, str):
            raise self.fail(key, f"must be a string, got {value!r}")
        return value

    def architectures(self) -> tuple[str, ...]:
        value = self._get("architectures", _NO_DEFAULT)
        if not isinstance(value, list) or not value or not all(isinstance(name, str) for name in value):
            raise self.fail("architectures", f"must be a list of names, got {value!r}")
        return tuple(value)

    def kv_heads(self, num_heads: int) -> int:
        kv_heads = self.integer("num_key_value_heads", num_heads)
        if num_heads % kv_heads:
            raise self.fail("num_key_value_heads", f"{kv_heads} must divide num_attention_heads {num_heads}")
        return kv_heads

    def head_dim(self, num_heads: int) -> int:
        hidden = self.integer("hidden_size")
        if self.d.get("head_dim") is None and hidden % num_heads:
            raise self.fail("hidden_size", f"{hidden} must be a multiple of num_attention_heads {num_heads}")
        return self.integer("head_dim", hidden // num_heads)

    def dtype(self) -> str | None:
        old, new = (self.d.get(key) for key in ("torch_dtype", "dtype"))
        if old is not None and new is not None and old != new:
            raise self.fail("dtype", f"{new!r} contradicts torch_dtype {old!r}")
        value = new if new is not None else old
        if value is None:
            return None
        name = value.removeprefix("torch.") if isinstance(value, str) else value
        if name not in SUPPORTED_DTYPES:
            raise UnsupportedModelError(
                f"{CONFIG_FILE}: dtype {value!r} is not supported; supported are {', '.join(SUPPORTED_DTYPES)}"
            )
        return str(name)

    def eos_token_ids(self) -> tuple[int, ...]:
        value = self.d.get("eos_token_id")
        ids = value if isinstance(value, list) else [] if value is None else [value]
        for token_id in ids:
            if isinstance(token_id, bool) or not isinstance(token_id, int) or token_id < 0:
                raise self.fail("eos_token_id", f"must be a token id or a list of them, got {value!r}")
        return tuple(ids)

    def rope(self) -> RopeConfig:
        """`rope_parameters` where there is one, else `rope_scaling`; theta inside it goes before `rope_theta`."""
        key, parameters = self._rope_parameters("full_attention")
        return self._rope_config(key, parameters, "rope_theta", _ROPE_THETA_DEFAULTS.get(self.model_type, 10000.0))

    def local_rope(self) -> RopeConfig | None:
        """Gemma 3's, whose files once gave no more of it than `rope_local_base_freq`."""
        if self.model_type not in _WITH_LOCAL_ROPE:
            return None
        key, parameters = self._rope_parameters("sliding_attention")
        return self._rope_config(key, parameters, "rope_local_base_freq", _LOCAL_ROPE_THETA_DEFAULT)

    def _rope_config(self, key: str, parameters: dict[str, Any], theta_key: str, default_theta: float) -> RopeConfig:
        rope_type = self._rope_type(key, parameters)
        needed, optional = ROPE_SCALING_KEYS[rope_type], ROPE_OPTIONAL_KEYS.get(rope_type, ())
        for name in sorted(set(parameters) - set(needed) - set(optional) - _ROPE_OTHER_KEYS):
            if name in _ROPE_REFUSED_KEYS and parameters[name]:
                raise UnsupportedModelError(f"{CONFIG_FILE}: {key}.{name} is not supported for rope_type {rope_type!r}")
            logger.warning("%s: %s.%s has no meaning for rope_type %r", CONFIG_FILE, key, name, rope_type)
        values = self._with_original(key, rope_type, parameters)
        scaling = {name: self._rope_value(f"{key}.{name}", values.get(name)) for name in needed}
        scaling |= {name: self._rope_value(f"{key}.{name}", values[name]) for name in optional if name in values}
        if rope_type == "llama3" and scaling["high_freq_factor"] <= scaling["low_freq_factor"]:
            raise self.fail(f"{key}.high_freq_factor", "must be above low_freq_factor")
        if rope_type == "yarn" and scaling.get("beta_fast", 32) <= scaling.get("beta_slow", 1):
            raise self.fail(f"{key}.beta_fast", "must be above beta_slow")
        theta = self._rope_number(key, parameters, "rope_theta", default_theta, theta_key)
        default_partial = _PARTIAL_ROTARY_DEFAULTS.get(self.model_type, 1.0)
        partial = self._rope_number(key, parameters, "partial_rotary_factor", default_partial)
        if partial > 1:
            raise self.fail("partial_rotary_factor", f"must be in (0, 1], got {partial}")
        return RopeConfig(rope_type, theta, scaling, partial)

    def _rope_type(self, key: str, parameters: dict[str, Any]) -> str:
        """The scaling's name; longrope went by 'su', and by 'yarn' in the first Phi-3 files."""
        rope_type = parameters.get("rope_type", parameters.get("type", "default"))
        if rope_type == "su" or (rope_type == "yarn" and "short_factor" in parameters):
            return "longrope"
        if not isinstance(rope_type, str) or rope_type not in ROPE_SCALING_KEYS:
            raise UnsupportedModelError(
                f"{CONFIG_FILE}: {key}.rope_type {rope_type!r} is not supported; supported are "
                f"{', '.join(ROPE_SCALING_KEYS)}"
            )
        return rope_type

    def _with_original(self, key: str, rope_type: str, parameters: dict[str, Any]) -> dict[str, Any]:
        """The values given, the context length before scaling, and the factor that may follow from it."""
        values = {name: value for name, value in parameters.items() if value is not None}
        if _ORIGINAL not in ROPE_SCALING_KEYS[rope_type]:
            return values
        limit = _positive_number(self.integer("max_position_embeddings"), self, "max_position_embeddings")
        if rope_type == "dynamic":  # stretches from max_position_embeddings, whatever else the file says
            return {**values, _ORIGINAL: limit}
        # Longrope switches at this number, so no guess will do.
        original = self._rope_number(key, parameters, _ORIGINAL, None if rope_type == "longrope" else limit)
        return {**({} if rope_type == "llama3" else {"factor": limit / original}), **values, _ORIGINAL: original}

    def _rope_value(self, key: str, value: Any) -> Any:
        """A positive number; for keys that say so, a list of them or a switch."""
        if key.endswith((".short_factor", ".long_factor")):
            if not isinstance(value, list) or not value:
                raise self.fail(key, f"must be a list of numbers, got {value!r}")
            return [_positive_number(item, self, key) for item in value]
        if key.endswith(".truncate"):
            if not isinstance(value, bool):
                raise self.fail(key, f"must be true or false, got {value!r}")
            return value
        return _positive_number(value, self, key)

    def _rope_parameters(self, layer_type: str) -> tuple[str, dict[str, Any]]:
        given = [key for key in ("rope_parameters", "rope_scaling") if self.d.get(key)]
        if len(given) == 2 and self.d["rope_parameters"] != self.d["rope_scaling"]:
            raise self.fail("rope_scaling", "contradicts rope_parameters")
        key = given[0] if given else "rope_parameters"
        parameters = self.d.get(key) or {}
        if not isinstance(parameters, dict):
            raise self.fail(key, f"must be an object, got {parameters!r}")
        if self.model_type in _WITH_LOCAL_ROPE:
            key, parameters = self._rope_parameters_of(layer_type, key, parameters)
        for name, value in parameters.items():
            if isinstance(value, dict):
                raise UnsupportedModelError(f"{CONFIG_FILE}: {key}.{name}: parameters per layer type are not supported")
        return key, parameters

    def _rope_parameters_of(self, layer_type: str, key: str, parameters: dict[str, Any]) -> tuple[str, dict[str, Any]]:
        """`rope_parameters` has an object per layer type; the older `rope_scaling` is about full attention alone."""
        if key == "rope_scaling":
            return key, parameters if layer_type == "full_attention" else {}
        if set(parameters) - {"full_attention", "sliding_attention"}:
            raise self.fail(key, f"must have parameters per layer type, got {parameters!r}")
        of_layers = parameters.get(layer_type) or {}
        if not isinstance(of_layers, dict):
            raise self.fail(f"{key}.{layer_type}", f"must be an object, got {of_layers!r}")
        return f"{key}.{layer_type}", of_layers

    def _rope_number(
        self, key: str, parameters: dict[str, Any], name: str, default: float | None, outer_name: str | None = None
    ) -> float:
        outer_name = outer_name or name
        inner, outer = parameters.get(name), self.d.get(outer_name)
        if inner is not None and outer is not None and inner != outer:
            raise self.fail(f"{key}.{name}", f"{inner!r} contradicts {outer_name} {outer!r}")
        value = inner if inner is not None else outer
        return _positive_number(default if value is None else value, self, name)


def _positive_number(value: Any, read: _Reader, key: str) -> float:
    if value is None:
        raise read.fail(key, "is missing")
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < _TOO_LARGE:
        raise read.fail(key, f"must be a positive number, got {value!r}")
    return float(value)
