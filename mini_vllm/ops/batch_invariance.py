"""Batch invariance, as `--batch-invariant` asks for it: a request's logits are the same bits whatever its neighbours.

While a model is built and loaded inside `batch_invariance(True)`, whoever has a choice of kernels takes one whose
result for a row depends on that row alone, and refuses with a `ConfigError` where there is none. Nothing is decided
per call.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from mini_vllm.exceptions import ConfigError
from mini_vllm.ops.cpu import library
from mini_vllm.platforms import current_platform

_required = False


@contextmanager
def batch_invariance(required: bool) -> Iterator[None]:
    """Models built and loaded inside the `with` block are batch-invariant if `required`."""
    global _required
    before, _required = _required, required
    try:
        if required:
            _check_available()
        yield
    finally:
        _required = before


def is_batch_invariant() -> bool:
    """Whether what is built or loaded now must be batch-invariant."""
    return _required


def require_dtype(dtype: torch.dtype) -> None:
    """Raise `ConfigError` where no kernel multiplies weights of this type."""
    if dtype not in library.DTYPE_CODES:
        raise ConfigError(f"batch_invariant: there are no kernels for weights of type {dtype}")


def require_attention_backend(name: str) -> None:
    """Raise `ConfigError` for a backend whose results depend on the shape of the batch."""
    if name != "CPU_NATIVE":
        raise ConfigError(f"batch_invariant: attention must be CPU_NATIVE's, and here it is {name}'s")


def _check_available() -> None:
    if current_platform.device_type != "cpu":
        raise ConfigError(
            f"batch_invariant: only CPUs have such kernels so far, and the device is {current_platform.device_type!r}"
        )
    if not library.available():
        raise ConfigError(
            "batch_invariant: needs the native kernels, and there are none here (the log says why); install a C++ "
            f"compiler, or unset {library.ISA_VARIABLE}"
        )
