"""The CPU: its memory is the machine's (or the container's), and its instructions decide the dtype."""

import functools
import os
import platform
from pathlib import Path
from typing import TYPE_CHECKING

from mini_vllm.platforms.cgroup import Cgroup
from mini_vllm.platforms.interface import Platform

if TYPE_CHECKING:
    import torch

_BF16_FLAGS = frozenset({"avx512_bf16", "amx_bf16", "bf16"})
"""How /proc/cpuinfo calls them: x86 'flags' have the first two, Arm 'Features' the last."""


class CpuPlatform(Platform):
    """This machine's processor. `root` is '/' except in tests, which bring their own /proc and /sys."""

    device_type = "cpu"
    tensors_in_host_memory = True
    default_kv_cache_limit_bytes = 4 << 30  # memory is shared with everything else that runs here

    def __init__(self, root: str | Path = "/") -> None:
        self._root = Path(root)
        self._cgroup = Cgroup(root)

    def device(self) -> "torch.device":
        import torch

        return torch.device("cpu")

    @property
    def prepacks_linears(self) -> bool:
        """Packing is oneDNN's, which some builds of torch (macOS) are without."""
        import torch

        return bool(torch.backends.mkldnn.is_available())

    def supports_bf16(self) -> bool:
        return bool(self.cpu_flags() & _BF16_FLAGS)

    def attn_backends(self) -> tuple[str, ...]:
        return "CPU_NATIVE", "TORCH_REF"

    def explain_auto_dtype(self, checkpoint_dtype: str | None, *, native_kernels: bool = False) -> tuple[str, str]:
        """bfloat16, half the bytes to read, where something multiplies it quickly; else float32. Whatever the
        checkpoint has."""
        flags = sorted(self.cpu_flags() & _BF16_FLAGS)
        if flags:
            return "bfloat16", f"this CPU has {', '.join(flags)}"
        if native_kernels:
            return "bfloat16", "this CPU has no bfloat16 instructions, but native kernels widen it on the way"
        return "float32", "this CPU has no bfloat16 instructions"

    def dtype_warning(self, dtype: str, *, native_kernels: bool = False) -> str | None:
        if native_kernels:
            return None
        if dtype == "float16":
            return "float16 is many times slower than bfloat16 or float32 on a CPU"
        if dtype == "bfloat16" and not self.supports_bf16():
            return "this CPU has no bfloat16 instructions, so bfloat16 is emulated and slower than float32"
        return None

    def available_memory_bytes(self) -> int:
        """What the kernel says could be taken without swapping, or what the container's limit leaves if less."""
        machine = self._meminfo("MemAvailable")
        if machine is None:
            machine = self.total_memory_bytes() // 2  # no /proc/meminfo to ask (macOS): a guess, on the safe side
        container = self._cgroup.memory_available_bytes()
        return machine if container is None else min(machine, container)

    def total_memory_bytes(self) -> int:
        machine = self._meminfo("MemTotal")
        if machine is None:
            machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        container = self._cgroup.memory_limit_bytes()
        return machine if container is None else min(machine, container)

    def describe(self) -> str:
        flags = ", ".join(sorted(self.cpu_flags() & _BF16_FLAGS)) or "no bfloat16 instructions"
        gib = self.available_memory_bytes() / 2**30
        return f"cpu ({self._model_name()}; {flags}), {gib:.1f} GiB of memory free"

    @functools.cached_property
    def _cpuinfo(self) -> dict[str, str]:
        """The first processor's entry of /proc/cpuinfo; empty where there is none."""
        path = self._root / "proc/cpuinfo"
        if not path.is_file():
            return {}
        first = path.read_text(encoding="utf-8", errors="replace").strip().split("\n\n")[0]
        pairs = (line.split(":", 1) for line in first.splitlines() if ":" in line)
        return {key.strip(): value.strip() for key, value in pairs}

    def cpu_flags(self) -> frozenset[str]:
        info = self._cpuinfo
        return frozenset((info.get("flags") or info.get("Features") or "").split())

    def _model_name(self) -> str:
        return self._cpuinfo.get("model name") or platform.processor() or platform.machine()

    def _meminfo(self, name: str) -> int | None:
        path = self._root / "proc/meminfo"
        if not path.is_file():
            return None
        for line in path.read_text(encoding="utf-8").splitlines():
            key, _, value = line.partition(":")
            if key == name:
                return int(value.split()[0]) * 1024
        return None
