"""Finds, builds if need be, and loads the library of native CPU kernels; all through ctypes, without torch headers.

`library()` is asked by whoever has a kernel in it, and is None where there is none: then the torch reference does the
work, and one line in the log says so. The level is the best one that this processor runs. MINI_VLLM_CPU_ISA forces
one ('avx512_bf16', 'avx512', 'avx2', 'portable') or switches native kernels off ('off').

A library that came with the package is taken; otherwise it is compiled, once, into the package's folder or, where that
cannot be written, into ~/.cache/mini_vllm. Every process has one thread pool in it; processes made by fork() compute
on one thread, so start workers with 'spawn'.
"""

import ctypes
import functools
import os
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from mini_vllm.exceptions import ConfigError
from mini_vllm.logger import init_logger
from mini_vllm.ops.cpu.build import (
    ISA_FLAGS,
    PACKAGE_LIBRARY_DIR,
    REQUIRED_CPU_FLAGS,
    BuildError,
    build_library,
    cache_dir,
    library_name,
)
from mini_vllm.ops.cpu.build import (
    ISA_VARIABLE as ISA_VARIABLE,
)
from mini_vllm.platforms import current_platform

logger = init_logger(__name__)

ABI_VERSION = 1
DTYPE_CODES: dict[torch.dtype, int] = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""How kernels are told an element type."""

_lock = threading.Lock()


def library() -> ctypes.CDLL | None:
    """The loaded library, or None where kernels are not to be had. Raises `ConfigError` for a wrong variable."""
    return _load(os.environ.get(ISA_VARIABLE, ""))


def available() -> bool:
    """Whether native kernels can serve tensors of this process's platform."""
    return current_platform.device_type == "cpu" and library() is not None


def loaded_isa() -> str | None:
    """The level in use, or None without a library."""
    loaded = library()
    return None if loaded is None else str(vars(loaded)["isa"])


def function(name: str, argtypes: Sequence[Any], restype: Any = None) -> Any:
    """The C function `name` with its types declared, or None without a library."""
    loaded = library()
    if loaded is None:
        return None
    found = loaded[name]  # a new object each time, so that nobody's declaration changes another's
    found.argtypes, found.restype = list(argtypes), restype
    return found


def set_num_threads(count: int) -> None:
    """How many threads the pool computes with, the calling one among them."""
    loaded = library() if current_platform.device_type == "cpu" else None
    if loaded is not None:
        loaded.mv_set_num_threads(count)


def choose_isa(asked: str, cpu_flags: frozenset[str]) -> str | None:
    """The level for a processor with these flags, or the one asked for; None for 'off'. Raises `ConfigError`."""
    if asked == "off":
        return None
    runnable = [isa for isa, needed in REQUIRED_CPU_FLAGS.items() if needed <= cpu_flags]
    if not asked:
        return runnable[0]
    if asked not in ISA_FLAGS:
        raise ConfigError(f"{ISA_VARIABLE}: {asked!r} is unknown; use one of {', '.join(ISA_FLAGS)} or off")
    if asked not in runnable:
        missing = ", ".join(sorted(REQUIRED_CPU_FLAGS[asked] - cpu_flags))
        raise ConfigError(f"{ISA_VARIABLE}: this processor cannot run {asked!r}, it lacks {missing}")
    return asked


def _load(asked: str) -> ctypes.CDLL | None:
    with _lock:  # one compilation, whoever asks first
        return _load_once(asked)


@functools.cache
def _load_once(asked: str) -> ctypes.CDLL | None:
    isa = choose_isa(asked, current_platform.cpu_flags())
    if isa is None:
        logger.info("CPU kernels: off (%s=off); torch computes, which is slower", ISA_VARIABLE)
        return None
    try:
        start = time.perf_counter()
        path, built = _find_or_build(isa)
        loaded = ctypes.CDLL(str(path))
    except (BuildError, OSError) as error:
        logger.warning("CPU kernels: none (%s); torch computes, which costs up to half of the speed", error)
        return None
    if loaded.mv_abi_version() != ABI_VERSION:
        raise RuntimeError(f"{path} has another interface than this package")
    vars(loaded)["isa"] = isa
    loaded.mv_set_num_threads(torch.get_num_threads())
    how = f"compiled in {time.perf_counter() - start:.1f} s" if built else "ready-made"
    logger.info("CPU kernels: %s (%s)", isa, how)
    return loaded


def _find_or_build(isa: str) -> tuple[Path, bool]:
    """(path, whether it had to be compiled)."""
    name = library_name(isa)
    folders = (PACKAGE_LIBRARY_DIR, cache_dir())
    for folder in folders:
        if (folder / name).is_file():
            return folder / name, False
    writable = os.access(PACKAGE_LIBRARY_DIR.parent, os.W_OK)
    logger.info("CPU kernels: compiling for %s, which takes about a minute and happens once", isa)
    return build_library(isa, folders[0] if writable else folders[1]), True
