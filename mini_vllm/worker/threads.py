"""The threads that compute: how many, for torch and for the native kernels alike, and on which cores."""

import os

import torch

from mini_vllm.exceptions import ConfigError
from mini_vllm.logger import init_logger
from mini_vllm.ops.cpu import library as native
from mini_vllm.platforms.binding import BIND_VARIABLE, bind, cores_to_bind, new_threads
from mini_vllm.platforms.interface import Platform

logger = init_logger(__name__)

_ELEMENTS_FOR_ALL_THREADS = 1 << 20


def start_threads(platform: Platform, num_threads: int | None) -> int:
    """Start threads and bind them as `VLLM_CPU_OMP_THREADS_BIND` says; returns how many compute, the caller included.

    num_threads: None is one for each core to bind to, or else what the platform says. Raises `ConfigError`.
    """
    cores = cores_to_bind(os.environ)
    if cores is None:
        count = platform.set_num_threads(num_threads)
        native.set_num_threads(count)
        return count
    if num_threads is not None and num_threads > len(cores):
        raise ConfigError(f"num_threads: {num_threads} is more than the {len(cores)} cores of {BIND_VARIABLE}")
    count = platform.set_num_threads(num_threads or len(cores))
    _start_bound(count, cores)
    logger.info("%s: %d threads that compute on cores %s", BIND_VARIABLE, count, ", ".join(map(str, cores[:count])))
    return count


def _start_bound(count: int, cores: list[int]) -> None:
    """Every worker gets a core of its own. The calling thread may use all of the list, and so may what it starts later
    (another thread that runs steps, say): the first core is the one that no worker keeps busy."""
    os.sched_setaffinity(0, cores)
    native.set_num_threads(1)  # workers that are there already, bound to nothing, go
    bind(new_threads(lambda: native.set_num_threads(count)), cores[1:count])
    bind(new_threads(_occupy_openmp), cores[1:count])


def _occupy_openmp() -> None:
    """OpenMP's threads start when they are first needed."""
    torch.zeros(_ELEMENTS_FOR_ALL_THREADS).add_(1)
