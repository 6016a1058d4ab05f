"""The only place that asks "what hardware is this?".

`current_platform` answers for the whole process. It is worked out when first used, or chosen by name before that
with `select_platform`. Importing this package loads no torch.
"""

from pathlib import Path
from typing import Any, cast

from mini_vllm.exceptions import ConfigError
from mini_vllm.platforms.cpu import CpuPlatform
from mini_vllm.platforms.cuda import CudaPlatform
from mini_vllm.platforms.interface import Platform
from mini_vllm.platforms.openmp import engine_environment

__all__ = ["CpuPlatform", "CudaPlatform", "Platform", "current_platform", "engine_environment", "select_platform"]

DEVICES = ("auto", "cpu", "cuda")

_NVIDIA_DRIVER_FILES = ("/proc/driver/nvidia/version", "/dev/nvidiactl", "/dev/dxg")
"""One of these exists wherever CUDA can work (the last under WSL); asking torch costs its import."""

_selected: Platform | None = None


def select_platform(device: str = "auto") -> Platform:
    """Make `device` ('auto', 'cpu' or 'cuda') the platform of this process and return it.

    'auto' is CUDA where torch finds a device, else the CPU. Raises `ConfigError` for other names, and for 'cuda'
    where there is none.
    """
    global _selected
    if device not in DEVICES:
        raise ConfigError(f"device: must be one of {', '.join(DEVICES)}, got {device!r}")
    if device == "cuda" and (reason := _why_no_cuda()):
        raise ConfigError(f"device: 'cuda' was asked for, but {reason}; use device='cpu' or 'auto'")
    if device == "auto":
        device = "cpu" if _why_no_cuda() else "cuda"
    if _selected is None or _selected.device_type != device:
        _selected = CudaPlatform() if device == "cuda" else CpuPlatform()
    return _selected


def _why_no_cuda() -> str | None:
    if not any(Path(path).exists() for path in _NVIDIA_DRIVER_FILES):
        return "this machine has no NVIDIA driver"
    import torch

    if torch.version.cuda is None:
        return f"torch {torch.__version__} was built without CUDA"
    return None if torch.cuda.is_available() else "torch finds no usable CUDA device"


class _CurrentPlatform:
    """Stands for the selected platform, so that it can be imported before it is known."""

    def __getattr__(self, name: str) -> Any:
        return getattr(_selected if _selected is not None else select_platform(), name)

    def __repr__(self) -> str:
        return f"current_platform({_selected.device_type if _selected else 'not selected yet'})"


current_platform = cast(Platform, _CurrentPlatform())
