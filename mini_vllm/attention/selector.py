"""Which attention backend serves a layer: the one asked for, or the platform's choice.

The answer is fixed per (name, head size, dtype), because caches are laid out for it.
"""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module

import torch

from mini_vllm.attention.backend import AttentionBackend
from mini_vllm.exceptions import ConfigError
from mini_vllm.logger import init_logger
from mini_vllm.platforms import current_platform

logger = init_logger(__name__)

_BACKENDS = {
    "CPU_NATIVE": ("mini_vllm.attention.native", "NativeBackend"),
    "TORCH_REF": ("mini_vllm.attention.torch_ref", "TorchRefBackend"),
}
_forced: list[str] = []


def supported_backends() -> list[str]:
    return sorted(_BACKENDS)


def register_backend(name: str, module: str, class_name: str) -> None:
    """Add (or replace) a backend from outside this package."""
    _BACKENDS[name.upper()] = (module, class_name)
    _cached_backend.cache_clear()


@contextmanager
def use_attn_backend(name: str | None) -> Iterator[None]:
    """Layers built inside the `with` block take this backend; None leaves the choice to the platform."""
    if name is None:
        yield
        return
    _forced.append(name)
    try:
        yield
    finally:
        _forced.pop()


def get_attn_backend(name: str | None, head_size: int, dtype: torch.dtype) -> type[AttentionBackend]:
    """The backend class. Raises `ConfigError` naming what is unknown or why it cannot serve such a layer."""
    if name is None and _forced:
        name = _forced[-1]
    if name is None:
        name = _default_backend(head_size, dtype)
    return _cached_backend(name.upper(), head_size, dtype)


def _default_backend(head_size: int, dtype: torch.dtype) -> str:
    """The first of the platform's candidates that can serve such layers; the last one always can."""
    *candidates, last = current_platform.attn_backends()
    for name in candidates:
        module, class_name = _BACKENDS[name]
        if getattr(import_module(module), class_name).supports(head_size, dtype) is None:
            return name
    return last


@functools.cache
def _cached_backend(name: str, head_size: int, dtype: torch.dtype) -> type[AttentionBackend]:
    if name not in _BACKENDS:
        raise ConfigError(f"attention_backend: {name!r} is unknown; available are {', '.join(supported_backends())}")
    module, class_name = _BACKENDS[name]
    backend: type[AttentionBackend] = getattr(import_module(module), class_name)
    reason = backend.supports(head_size, dtype)
    if reason is not None:
        raise ConfigError(f"attention_backend: {name} cannot serve head size {head_size} in {dtype}: {reason}")
    logger.info("Using %s attention backend", backend.name)
    return backend
