"""Typed look-ups in config.json: what is missing or ill-typed is a `CheckpointError` naming file and key."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mini_vllm.exceptions import CheckpointError, UnsupportedModelError
from mini_vllm.hf_config.defaults import KEY_NAMES, MODEL_TYPE_DEFAULTS

CONFIG_FILE = "config.json"
SUPPORTED_DTYPES = ("float32", "bfloat16", "float16")
NO_DEFAULT: Any = object()
_TOO_LARGE = 10**300


def read_json(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{file}: must hold a JSON object, not {type(value).__name__}")
    return value


class ConfigReader:
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
        if default is NO_DEFAULT:
            raise self.fail(key, "is missing")
        return default

    def integer(self, key: str, default: Any = NO_DEFAULT, minimum: int = 1) -> int:
        value = self._get(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
            raise self.fail(key, f"must be an integer of at least {minimum}, got {value!r}")
        return value

    def optional_integer(self, key: str, minimum: int) -> int | None:
        return None if self.d.get(key) is None else self.integer(key, minimum=minimum)

    def intermediate_size(self) -> int:
        default = 4 * self.integer("hidden_size") if self.model_type == "gpt2" else NO_DEFAULT
        return self.integer("intermediate_size", default)

    def number(self, key: str, default: Any = NO_DEFAULT) -> float:
        return self.positive(self._get(key, default), key)

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
        value = self._get("architectures", NO_DEFAULT)
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

    def positive(self, value: Any, key: str) -> float:
        """`value`, which `key` holds, as a positive number."""
        if value is None:
            raise self.fail(key, "is missing")
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < _TOO_LARGE:
            raise self.fail(key, f"must be a positive number, got {value!r}")
        return float(value)
