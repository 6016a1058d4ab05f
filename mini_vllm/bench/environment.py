"""What a measurement (or a bug report) ran on: versions, processor, memory, device, threads, environment variables.

`collect_environment` gathers it as plain data, `format_environment` renders it. Nothing secret is included: of the
environment only variables that change how the engine runs, and of those no value that looks like a credential.
"""

import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mini_vllm
from mini_vllm.bench.ceilings import last_level_cache_bytes
from mini_vllm.bench.noise import usable_cpus
from mini_vllm.platforms import current_platform
from mini_vllm.platforms.cgroup import Cgroup

PACKAGES = (
    "torch", "numpy", "safetensors", "tokenizers", "jinja2", "msgspec", "tqdm", "rich", "transformers", "triton",
)  # fmt: skip
CPU_FLAGS = (
    "avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512vl", "avx512_bf16", "avx512_fp16", "avx512_vnni", "avx_vnni",
    "avx_vnni_int8", "amx_tile", "amx_bf16", "amx_int8", "asimd", "asimdhp", "asimddp", "bf16", "i8mm", "sve", "sve2",
)  # fmt: skip
"""Instruction sets that decide which kernels run."""

_VARIABLES = re.compile(
    r"(MINI_VLLM|OMP|GOMP|KMP|MKL|OPENBLAS|ONEDNN|DNNL|ATEN|TORCH|PYTORCH|CUDA|NVIDIA|TRITON|HF|HUGGINGFACE|HUGGING_FACE"
    r"|TRANSFORMERS|TOKENIZERS|MALLOC|LD_PRELOAD|PYTHONHASHSEED|PYTHONMALLOC)(_|$)"
)
_SECRET_NAME = re.compile(r"(^|_)(TOKEN|TOKENS|KEY|KEYS|APIKEY|SECRET|PASSWORD|PASSWD|CREDENTIALS?|AUTH)(_|$)")
_SECRET_VALUE = re.compile(r"\b(hf_|sk-|ghp_|github_pat_|xox[abp]-|AKIA|Bearer )\S{6,}")
_URL_USER = re.compile(r"(://)[^/@\s]+@")
HIDDEN = "(set, not shown)"


def collect_environment() -> dict[str, Any]:
    """Everything, by section; each section is a flat dict whose values survive JSON."""
    return {
        "versions": _versions(),
        "system": _system(),
        "cpu": _cpu(),
        "memory": _memory(),
        "device": _device(),
        "torch": _torch(),
        "variables": relevant_variables(os.environ),
    }


# --- sections -----------------------------------------------------------------------------------------------


def _versions() -> dict[str, str | None]:
    versions: dict[str, str | None] = {
        "mini_vllm": mini_vllm.__version__,
        "git_commit": _git_commit(Path(mini_vllm.__file__).parent),
        "python": f"{platform.python_version()} ({platform.python_implementation()}, {platform.python_compiler()})",
    }
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return versions


def _git_commit(folder: Path) -> str | None:
    """The commit of a source checkout, with '+' when files differ from it; None for an installed package."""
    if not any((parent / ".git").exists() for parent in folder.parents):
        return None
    commit = _output_of("git", "-C", str(folder), "rev-parse", "HEAD")
    if not commit:
        return None
    return commit + ("+" if _output_of("git", "-C", str(folder), "status", "--porcelain") else "")


def _system() -> dict[str, Any]:
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    return {
        "os": platform.platform(),
        "distribution": _distribution(),
        "libc": " ".join(platform.libc_ver()).strip() or None,
        "c_compiler": (_output_of(compiler, "--version") or "").partition("\n")[0] or None if compiler else None,
        "executable": sys.executable,
    }


def _distribution() -> str | None:
    try:
        return platform.freedesktop_os_release().get("PRETTY_NAME")
    except OSError:
        return None


def _cpu() -> dict[str, Any]:
    info = _first_entry(_read("/proc/cpuinfo"))
    flags = set((info.get("flags") or info.get("Features") or "").split())
    cpus = sorted(usable_cpus())
    return {
        "model": info.get("model name") or platform.processor() or platform.machine(),
        "architecture": platform.machine(),
        "cpus_of_machine": os.cpu_count(),
        "cpus_usable": len(cpus),
        "affinity": compact_ranges(cpus),
        "cgroup_quota_cpus": Cgroup().cpu_quota(),
        "flags": [flag for flag in CPU_FLAGS if flag in flags],
        "last_level_cache_bytes": last_level_cache_bytes(),
        "transparent_hugepages": _chosen(_read("/sys/kernel/mm/transparent_hugepage/enabled")),
        "frequency_governor": _read("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor").strip() or None,
        "hypervisor": "hypervisor" in flags,
    }


def _memory() -> dict[str, Any]:
    swap = re.search(r"^SwapTotal:\s+(\d+) kB", _read("/proc/meminfo"), re.MULTILINE)
    machine = re.search(r"^MemTotal:\s+(\d+) kB", _read("/proc/meminfo"), re.MULTILINE)
    return {
        "machine_bytes": int(machine[1]) * 1024 if machine else None,
        "cgroup_limit_bytes": Cgroup().memory_limit_bytes(),
        "swap_bytes": int(swap[1]) * 1024 if swap else None,
    }


def _device() -> dict[str, Any]:
    """The platform the engine would choose (or has chosen), in its own words."""
    try:
        return {
            "type": current_platform.device_type,
            "description": current_platform.describe(),
            "memory_bytes": current_platform.total_memory_bytes(),
            "memory_available_bytes": current_platform.available_memory_bytes(),
            "supports_bf16": current_platform.supports_bf16(),
            "threads_by_default": current_platform.num_threads(),
        }
    except (ImportError, RuntimeError) as error:  # a broken installation is just what this is run for
        return {"type": None, "description": f"cannot be asked: {error}"}


def _torch() -> dict[str, Any]:
    try:
        import torch
    except ImportError as error:
        return {"version": None, "problem": str(error)}
    return {
        "version": torch.__version__,
        "cuda": torch.version.cuda,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "mkl": torch.backends.mkl.is_available(),
        "onednn": torch.backends.mkldnn.is_available(),
        "openmp": torch.backends.openmp.is_available(),
        "num_threads": torch.get_num_threads(),
        "num_interop_threads": torch.get_num_interop_threads(),
    }


# --- environment variables ----------------------------------------------------------------------------------


def relevant_variables(environ: Mapping[str, str]) -> dict[str, str]:
    """Variables that change how the engine runs, sorted; what may be a secret is named but not shown."""
    return {
        name: redact_value(value) if not _SECRET_NAME.search(name) else HIDDEN
        for name, value in sorted(environ.items())
        if _VARIABLES.match(name)
    }


def redact_value(value: str) -> str:
    """`value` without user names in URLs; hidden whole when a part of it looks like a credential."""
    return HIDDEN if _SECRET_VALUE.search(value) else _URL_USER.sub(r"\1...@", value)


# --- rendering ----------------------------------------------------------------------------------------------


def format_environment(environment: Mapping[str, Mapping[str, Any]]) -> str:
    """The sections as aligned text."""
    lines = []
    for section, values in environment.items():
        lines.append(f"[{section}]")
        width = max((len(name) for name in values), default=0)
        lines += [f"  {name:<{width}}  {_text_of(name, value)}" for name, value in values.items()]
        lines += ["  (none)"] if not values else []
        lines.append("")
    return "\n".join(lines).rstrip()


def _text_of(name: str, value: Any) -> str:
    if value is None:
        return "none" if name.startswith("cgroup") else "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return " ".join(str(item) for item in value) or "-"
    if name.endswith("_bytes"):
        return f"{value / 2**30:.2f} GiB" if value >= 2**30 else f"{value / 2**20:.1f} MiB"
    return str(value)


def compact_ranges(numbers: list[int]) -> str:
    """[0, 1, 2, 5] -> '0-2,5'."""
    parts: list[list[int]] = []
    for number in sorted(numbers):
        if parts and number == parts[-1][-1] + 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ",".join(str(part[0]) if len(part) == 1 else f"{part[0]}-{part[-1]}" for part in parts)


# --- small readers ------------------------------------------------------------------------------------------


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _first_entry(cpuinfo: str) -> dict[str, str]:
    pairs = (line.split(":", 1) for line in cpuinfo.split("\n\n")[0].splitlines() if ":" in line)
    return {key.strip(): value.strip() for key, value in pairs}


def _chosen(text: str) -> str | None:
    """The word in brackets: 'always [madvise] never' -> 'madvise'."""
    match = re.search(r"\[(\w+)\]", text)
    return match[1] if match else None


def _output_of(*command: str) -> str | None:
    """Standard output of a short command; None when it is missing, fails or hangs."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=5, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
