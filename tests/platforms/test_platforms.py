"""What hardware this is, and what follows from it."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mini_vllm import platforms
from mini_vllm.exceptions import ConfigError
from mini_vllm.platforms import CpuPlatform, CudaPlatform, current_platform, select_platform
from mini_vllm.platforms.cgroup import Cgroup
from mini_vllm.platforms.interface import usable_cores
from tests.platforms.test_cgroup import GIB, v2, write


def cpu(root: Path, flags: str = "fpu avx2", key: str = "flags") -> CpuPlatform:
    cpuinfo = f"processor\t: 0\nmodel name\t: Test CPU\n{key}\t\t: {flags}\n\nprocessor\t: 1\n"
    meminfo = f"MemTotal:       {16 * GIB // 1024} kB\nMemAvailable:   {8 * GIB // 1024} kB"
    return CpuPlatform(write(root, {"proc/cpuinfo": cpuinfo, "proc/meminfo": meminfo}))


@pytest.mark.parametrize(
    ("flags", "key"),
    [("avx512f avx512_bf16", "flags"), ("amx_tile amx_bf16", "flags"), ("asimd bf16 i8mm", "Features")],
)
def test_auto_dtype_is_bf16_where_a_cpu_has_the_instructions(tmp_path: Path, flags: str, key: str) -> None:
    platform = cpu(tmp_path, flags, key)
    for checkpoint in ("float32", "float16", "bfloat16", None):
        assert platform.auto_dtype(checkpoint) == "bfloat16"
    assert "bf16" in platform.explain_auto_dtype("float32")[1]


def test_auto_dtype_is_float32_on_other_cpus_and_never_float16(tmp_path: Path) -> None:
    platform = cpu(tmp_path, "avx2 avx512f avx512_fp16")
    for checkpoint in ("float32", "float16", "bfloat16", None):
        assert platform.auto_dtype(checkpoint) == "float32"
        assert platform.explain_auto_dtype(checkpoint, native_kernels=True)[0] == "bfloat16"
    assert not platform.supports_bf16()


def test_slow_dtypes_are_warned_of(tmp_path: Path) -> None:
    old, new = cpu(tmp_path / "old"), cpu(tmp_path / "new", "avx512_bf16")
    assert "slower" in (new.dtype_warning("float16") or "")
    assert "emulated" in (old.dtype_warning("bfloat16") or "")
    assert new.dtype_warning("bfloat16") is None
    assert old.dtype_warning("float32") is None
    assert old.dtype_warning("bfloat16", native_kernels=True) is None


def test_free_memory_is_the_machines_without_a_container(tmp_path: Path) -> None:
    platform = cpu(tmp_path)
    assert platform.available_memory_bytes() == 8 * GIB
    assert platform.total_memory_bytes() == 16 * GIB


def test_free_memory_is_the_containers_when_that_is_less(tmp_path: Path) -> None:
    platform = cpu(v2(tmp_path, memory_max=2 * GIB, memory_current=GIB))
    assert platform.available_memory_bytes() == GIB
    assert platform.total_memory_bytes() == 2 * GIB


def test_free_memory_is_the_machines_when_the_container_allows_more(tmp_path: Path) -> None:
    platform = cpu(v2(tmp_path, memory_max=64 * GIB, memory_current=GIB))
    assert platform.available_memory_bytes() == 8 * GIB
    assert platform.total_memory_bytes() == 16 * GIB


def test_a_machine_without_proc_still_has_memory_and_a_dtype(tmp_path: Path) -> None:
    platform = CpuPlatform(tmp_path)
    assert 0 < platform.available_memory_bytes() < platform.total_memory_bytes()
    assert platform.auto_dtype("bfloat16") == "float32"
    assert platform.describe().startswith("cpu")


def test_num_threads_follows_omp_num_threads_when_set(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    platform = cpu(tmp_path)
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(8)))
    monkeypatch.setattr("mini_vllm.platforms.interface.Cgroup", lambda: Cgroup(tmp_path))
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert platform.num_threads() == 3
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0})
    assert platform.num_threads() == 1


def test_there_are_never_more_threads_than_cores(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0})
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert cpu(tmp_path).num_threads() == 1
    before = torch.get_num_threads()
    try:
        assert cpu(tmp_path).set_num_threads(64) == 1
    finally:
        torch.set_num_threads(before)


def test_set_num_threads_reaches_torch(tmp_path: Path) -> None:
    before = torch.get_num_threads()
    try:
        count = min(2, usable_cores())
        assert cpu(tmp_path).set_num_threads(count) == count
        assert torch.get_num_threads() == count
    finally:
        torch.set_num_threads(before)


def test_the_real_machine_can_be_described() -> None:
    assert current_platform.total_memory_bytes() >= current_platform.available_memory_bytes() > 0
    assert current_platform.num_threads() >= 1
    assert current_platform.device_type in current_platform.describe()


# --- choosing ----------------------------------------------------------------------------------------------


@pytest.fixture
def unselected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platforms, "_selected", None)


@pytest.mark.usefixtures("unselected")
def test_auto_is_the_cpu_where_there_is_no_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platforms, "_why_no_cuda", lambda: "no driver")
    assert current_platform.device_type == "cpu"
    assert select_platform("auto") is select_platform("cpu")


@pytest.mark.usefixtures("unselected")
def test_auto_is_cuda_where_there_is_cuda_and_cpu_can_still_be_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platforms, "_why_no_cuda", lambda: None)
    assert isinstance(select_platform("auto"), CudaPlatform)
    assert select_platform("cpu").device_type == current_platform.device_type == "cpu"


@pytest.mark.usefixtures("unselected")
def test_cuda_without_cuda_is_refused_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platforms, "_NVIDIA_DRIVER_FILES", ())
    with pytest.raises(ConfigError, match="device: 'cuda' was asked for, but this machine has no NVIDIA driver"):
        select_platform("cuda")


@pytest.mark.parametrize("device", ["gpu", "", "cuda:1", "CPU"])
def test_an_unknown_device_is_refused_with_the_valid_ones(device: str) -> None:
    with pytest.raises(ConfigError, match="device: must be one of auto, cpu, cuda"):
        select_platform(device)


def test_importing_platforms_and_asking_a_cpu_loads_no_torch() -> None:
    code = (
        "import sys; from mini_vllm.platforms import CpuPlatform, current_platform; p = CpuPlatform(); "
        "p.auto_dtype('float32'), p.available_memory_bytes(), p.num_threads(); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


# --- cuda, without one -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("capability", "checkpoint", "expected"),
    [
        ((9, 0), "float32", "bfloat16"),
        ((9, 0), None, "bfloat16"),
        ((9, 0), "float16", "float16"),
        ((9, 0), "bfloat16", "bfloat16"),
        ((7, 5), "bfloat16", "float16"),
        ((7, 5), "float32", "float16"),
    ],
)
def test_auto_dtype_on_cuda_is_the_checkpoints_as_far_as_the_gpu_has_it(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], checkpoint: str | None, expected: str
) -> None:
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda: capability)
    assert CudaPlatform().auto_dtype(checkpoint) == expected


def test_cuda_counts_what_the_allocator_holds_unused_as_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda: (5 * GIB, 16 * GIB))
    monkeypatch.setattr("torch.cuda.memory_reserved", lambda: 3 * GIB)
    monkeypatch.setattr("torch.cuda.memory_allocated", lambda: GIB)
    assert CudaPlatform().available_memory_bytes() == 7 * GIB
    assert CudaPlatform().total_memory_bytes() == 16 * GIB
