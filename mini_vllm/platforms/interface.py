"""What the engine may ask of the hardware.

A platform is handed nothing and holds no state of a model. Everything above it works in its terms, so another
accelerator is one more class here. Methods import torch when they need it, never at import time.
"""

import math
import os
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

from mini_vllm.logger import init_logger
from mini_vllm.platforms.cgroup import Cgroup

if TYPE_CHECKING:
    import torch


logger = init_logger(__name__)


class Platform(ABC):
    """One kind of device.

    device_type: torch's name for it.
    pin_memory: whether host buffers must be page-locked so that copies to the device need not be waited for.
    tensors_in_host_memory: whether numpy can work on the device's tensors in place.
    default_kv_cache_limit_bytes: how much the KV cache takes at most when nobody said how much; None is no limit.
    """

    device_type: str
    pin_memory: bool = False
    tensors_in_host_memory: bool = False
    default_kv_cache_limit_bytes: int | None = None

    @property
    def prepacks_linears(self) -> bool:
        """Whether weights gain from being packed once after loading."""
        return False

    @abstractmethod
    def device(self) -> "torch.device":
        """The device tensors live on."""

    def cpu_flags(self) -> frozenset[str]:
        """Instruction sets of the host's processor as /proc/cpuinfo names them; empty where it does not say."""
        return frozenset()

    @abstractmethod
    def supports_bf16(self) -> bool:
        """Whether bfloat16 products have instructions of their own."""

    @abstractmethod
    def explain_auto_dtype(self, checkpoint_dtype: str | None, *, native_kernels: bool = False) -> tuple[str, str]:
        """(dtype name that 'auto' means here for a checkpoint of that dtype, why).

        native_kernels: this package's own are to be had, and widen narrow types in vectors.
        """

    def auto_dtype(self, checkpoint_dtype: str | None) -> str:
        """The dtype name that 'auto' means here for a checkpoint of that dtype."""
        return self.explain_auto_dtype(checkpoint_dtype)[0]

    def dtype_warning(self, dtype: str, *, native_kernels: bool = False) -> str | None:
        """What is wrong with computing in `dtype` here, if anything."""
        return None

    @abstractmethod
    def available_memory_bytes(self) -> int:
        """Memory of the device that could be taken now."""

    @abstractmethod
    def total_memory_bytes(self) -> int:
        """Memory of the device that this process may use at all."""

    def attn_backends(self) -> tuple[str, ...]:
        """Names of attention backends to try when the user named none, fastest first; the last serves any layer."""
        return ("TORCH_REF",)

    @abstractmethod
    def describe(self) -> str:
        """One line for the log."""

    def synchronize(self) -> None:
        """Wait until the device has done all it was given; nothing to wait for where calls block."""
        return

    def num_threads(self) -> int:
        """CPU threads to compute with: the cores this process may run on, or `OMP_NUM_THREADS` if that is fewer."""
        asked = os.environ.get("OMP_NUM_THREADS", "")
        if asked.isdecimal() and int(asked) > 0:
            if int(asked) > (cores := usable_cores()):
                logger.warning("OMP_NUM_THREADS: %s is more than the %d cores this process may use", asked, cores)
            return min(int(asked), cores)
        return usable_cores()

    def set_num_threads(self, num_threads: int | None = None) -> int:
        """Let torch compute with `num_threads` (None: `num_threads()`) CPU threads; returns how many.

        Never more than there are cores: threads that wait for one that has no core make a step many times slower.
        """
        import torch

        count = num_threads or self.num_threads()
        if count > (cores := usable_cores()):
            logger.warning("num_threads: %d is more than the %d cores this process may use; taking %d",
                           count, cores, cores)  # fmt: skip
            count = cores
        if torch.get_num_threads() != count:
            torch.set_num_threads(count)
        return count


def usable_cores(cgroup: Cgroup | None = None) -> int:
    """The cores of this process's affinity mask, or fewer where a cgroup grants less CPU time; at least 1."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = (cgroup or Cgroup()).cpu_quota()
    return max(1, cores if quota is None else min(cores, math.ceil(quota)))
