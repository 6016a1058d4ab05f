"""Typed look-ups in a GGUF file's metadata: each names file and key when something is missing or ill-typed.

It remembers which keys of the architecture were asked for, so that those nobody understood can be told.
"""

from typing import Any

from mini_vllm.exceptions import CheckpointError, UnsupportedModelError
from mini_vllm.gguf.reader import GGUFFile

_REQUIRED: Any = object()


class Metadata:
    """Reads `{architecture}.{key}`, or a full key where it contains the dot of another section."""

    def __init__(self, file: GGUFFile) -> None:
        self.file = file
        self.architecture = file.architecture
        self._asked: set[str] = set()

    def fail(self, key: str, problem: str) -> CheckpointError:
        return CheckpointError(f"{self.file.path.name}: {self._full(key)} {problem}")

    def unsupported(self, key: str, problem: str) -> UnsupportedModelError:
        return UnsupportedModelError(f"{self.file.path.name}: {self._full(key)} {problem}")

    def _full(self, key: str) -> str:
        return key if key.startswith(("tokenizer.", "general.")) else f"{self.architecture}.{key}"

    def get(self, key: str) -> Any:
        """The value as it is, or None."""
        full = self._full(key)
        self._asked.add(full)
        return self.file.metadata.get(full)

    def integer(self, key: str, default: Any = _REQUIRED, minimum: int = 1) -> int:
        """An integer; one given per layer counts if it is the same in all of them."""
        value = self._uniform(key)
        value = self._default(key, default) if value is None else value
        if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
            raise self.fail(key, f"must be an integer of at least {minimum}, got {value!r}")
        return value

    def number(self, key: str, default: Any = _REQUIRED) -> float:
        value = self._uniform(key)
        value = self._default(key, default) if value is None else value
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise self.fail(key, f"must be a number, got {value!r}")
        return float(value)

    def string(self, key: str, default: Any = _REQUIRED) -> str:
        value = self.get(key)
        value = self._default(key, default) if value is None else value
        if not isinstance(value, str):
            raise self.fail(key, f"must be a string, got {value!r}")
        return value

    def boolean(self, key: str, default: bool) -> bool:
        value = self.get(key)
        value = default if value is None else value
        if not isinstance(value, bool):
            raise self.fail(key, f"must be true or false, got {value!r}")
        return value

    def items(self, key: str, kind: type | tuple[type, ...], default: Any = _REQUIRED) -> list[Any]:
        """An array whose items are all of this kind."""
        value = self.get(key)
        value = self._default(key, default) if value is None else value
        if not isinstance(value, list) or not all(isinstance(item, kind) for item in value):
            raise self.fail(key, "must be an array of one kind of values")
        return value

    def _default(self, key: str, default: Any) -> Any:
        if default is _REQUIRED:
            raise self.fail(key, "is missing")
        return default

    def _uniform(self, key: str) -> Any:
        value = self.get(key)
        if not isinstance(value, list):
            return value
        if len(set(value)) != 1:
            raise self.unsupported(key, f"differs from layer to layer, which is not supported: {value[:8]}")
        return value[0]

    def ignored(self) -> list[str]:
        """Keys of this architecture that nobody asked for."""
        prefix = f"{self.architecture}."
        return sorted(key for key in self.file.metadata if key.startswith(prefix) and key not in self._asked)
