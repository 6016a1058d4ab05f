"""The rotary embedding a config.json asks for, in any of its spellings, checked value by value.

`rope_theta` with `rope_scaling`, or `rope_parameters`, per layer type where a family has two; older names of a scaling
are understood. A scaling that is not implemented is an `UnsupportedModelError` that lists those that are.
"""

from dataclasses import dataclass, field
from typing import Any

from mini_vllm.exceptions import UnsupportedModelError
from mini_vllm.hf_config.reader import CONFIG_FILE, ConfigReader
from mini_vllm.logger import init_logger

logger = init_logger(__name__)

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
ORIGINAL = "original_max_position_embeddings"
_ROPE_OTHER_KEYS = {"type", "rope_type", "rope_theta", "partial_rotary_factor"}
_ROPE_REFUSED_KEYS = ("short_mscale", "long_mscale", "mrope_section")
_PARTIAL_ROTARY_DEFAULTS = {"stablelm": 0.25}
_ROPE_THETA_DEFAULTS = {"gemma3_text": 1e6, "llama4_text": 5e5}
_LOCAL_ROPE_THETA_DEFAULT = 1e4
_WITH_LOCAL_ROPE = ("gemma3_text",)
"""Model types whose sliding-window layers turn by frequencies of their own."""


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


class RopeReader:
    """Reads the rotary part of the config that `read` holds."""

    def __init__(self, read: ConfigReader) -> None:
        self.read = read

    def rope(self) -> RopeConfig:
        """`rope_parameters` where there is one, else `rope_scaling`; theta inside it goes before `rope_theta`."""
        key, parameters = self._rope_parameters("full_attention")
        return self._rope_config(key, parameters, "rope_theta", _ROPE_THETA_DEFAULTS.get(self.read.model_type, 10000.0))

    def local_rope(self) -> RopeConfig | None:
        """Gemma 3's, whose files once gave no more of it than `rope_local_base_freq`."""
        if self.read.model_type not in _WITH_LOCAL_ROPE:
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
            raise self.read.fail(f"{key}.high_freq_factor", "must be above low_freq_factor")
        if rope_type == "yarn" and scaling.get("beta_fast", 32) <= scaling.get("beta_slow", 1):
            raise self.read.fail(f"{key}.beta_fast", "must be above beta_slow")
        theta = self._rope_number(key, parameters, "rope_theta", default_theta, theta_key)
        default_partial = _PARTIAL_ROTARY_DEFAULTS.get(self.read.model_type, 1.0)
        partial = self._rope_number(key, parameters, "partial_rotary_factor", default_partial)
        if partial > 1:
            raise self.read.fail("partial_rotary_factor", f"must be in (0, 1], got {partial}")
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
        if ORIGINAL not in ROPE_SCALING_KEYS[rope_type]:
            return values
        limit = float(self.read.integer("max_position_embeddings"))
        if rope_type == "dynamic":  # stretches from max_position_embeddings, whatever else the file says
            return {**values, ORIGINAL: limit}
        # Longrope switches at this number, so no guess will do.
        original = self._rope_number(key, parameters, ORIGINAL, None if rope_type == "longrope" else limit)
        return {**({} if rope_type == "llama3" else {"factor": limit / original}), **values, ORIGINAL: original}

    def _rope_value(self, key: str, value: Any) -> Any:
        """A positive number; for keys that say so, a list of them or a switch."""
        if key.endswith((".short_factor", ".long_factor")):
            if not isinstance(value, list) or not value:
                raise self.read.fail(key, f"must be a list of numbers, got {value!r}")
            return [self.read.positive(item, key) for item in value]
        if key.endswith(".truncate"):
            if not isinstance(value, bool):
                raise self.read.fail(key, f"must be true or false, got {value!r}")
            return value
        return self.read.positive(value, key)

    def _rope_parameters(self, layer_type: str) -> tuple[str, dict[str, Any]]:
        given = [key for key in ("rope_parameters", "rope_scaling") if self.read.d.get(key)]
        if len(given) == 2 and self.read.d["rope_parameters"] != self.read.d["rope_scaling"]:
            raise self.read.fail("rope_scaling", "contradicts rope_parameters")
        key = given[0] if given else "rope_parameters"
        parameters = self.read.d.get(key) or {}
        if not isinstance(parameters, dict):
            raise self.read.fail(key, f"must be an object, got {parameters!r}")
        if self.read.model_type in _WITH_LOCAL_ROPE:
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
            raise self.read.fail(key, f"must have parameters per layer type, got {parameters!r}")
        of_layers = parameters.get(layer_type) or {}
        if not isinstance(of_layers, dict):
            raise self.read.fail(f"{key}.{layer_type}", f"must be an object, got {of_layers!r}")
        return f"{key}.{layer_type}", of_layers

    def _rope_number(
        self, key: str, parameters: dict[str, Any], name: str, default: float | None, outer_name: str | None = None
    ) -> float:
        outer_name = outer_name or name
        inner, outer = parameters.get(name), self.read.d.get(outer_name)
        if inner is not None and outer is not None and inner != outer:
            raise self.read.fail(f"{key}.{name}", f"{inner!r} contradicts {outer_name} {outer!r}")
        value = inner if inner is not None else outer
        return self.read.positive(default if value is None else value, name)
