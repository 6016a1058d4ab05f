"""Container limits, read from made-up trees of /proc and /sys."""

from pathlib import Path

import pytest

from mini_vllm.platforms.cgroup import Cgroup
from mini_vllm.platforms.interface import usable_cores

GIB = 1 << 30
V1_UNLIMITED = "9223372036854771712"


def write(root: Path, files: dict[str, object]) -> Path:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{content}\n", encoding="utf-8")
    return root


def v2(root: Path, group: str = "/", **files: object) -> Path:
    """A version-2 tree in which this process's group has `files` (memory_max=... is memory.max)."""
    folder = f"sys/fs/cgroup/{group.strip('/')}".rstrip("/")
    write(root, {"proc/self/cgroup": f"0::{group}"})
    return write(root, {f"{folder}/{name.replace('_', '.', 1)}": content for name, content in files.items()})


def test_a_machine_without_cgroups_has_no_limits(tmp_path: Path) -> None:
    cgroup = Cgroup(tmp_path)
    assert cgroup.memory_limit_bytes() is None
    assert cgroup.memory_available_bytes() is None
    assert cgroup.cpu_quota() is None


def test_v2_limit_minus_usage_counts_page_cache_as_free(tmp_path: Path) -> None:
    stat = f"anon 1\ninactive_file {GIB}\nactive_file {GIB // 2}\nslab 9"
    cgroup = Cgroup(v2(tmp_path, memory_max=4 * GIB, memory_current=3 * GIB, memory_stat=stat))
    assert cgroup.memory_limit_bytes() == 4 * GIB
    assert cgroup.memory_available_bytes() == GIB + GIB * 3 // 2


def test_v2_max_means_no_limit(tmp_path: Path) -> None:
    cgroup = Cgroup(v2(tmp_path, memory_max="max", memory_current=GIB, cpu_max="max 100000"))
    assert cgroup.memory_available_bytes() is None
    assert cgroup.cpu_quota() is None


def test_a_limit_of_an_ancestor_counts(tmp_path: Path) -> None:
    v2(tmp_path, "/outer/inner", memory_max="max", memory_current=GIB)
    write(tmp_path, {"sys/fs/cgroup/outer/memory.max": 2 * GIB, "sys/fs/cgroup/outer/memory.current": GIB})
    assert Cgroup(tmp_path).memory_available_bytes() == GIB


def test_the_tightest_limit_wins(tmp_path: Path) -> None:
    v2(tmp_path, "/outer/inner", memory_max=8 * GIB, memory_current=GIB)
    write(tmp_path, {"sys/fs/cgroup/outer/memory.max": 4 * GIB, "sys/fs/cgroup/outer/memory.current": 3 * GIB})
    assert Cgroup(tmp_path).memory_limit_bytes() == 4 * GIB
    assert Cgroup(tmp_path).memory_available_bytes() == GIB


def test_a_host_path_that_the_container_cannot_see_falls_back_to_the_mounted_root(tmp_path: Path) -> None:
    write(tmp_path, {"proc/self/cgroup": "0::/../docker/abc", "sys/fs/cgroup/memory.max": GIB})
    write(tmp_path, {"sys/fs/cgroup/memory.current": 0})
    assert Cgroup(tmp_path).memory_available_bytes() == GIB


def test_usage_above_the_limit_leaves_nothing_rather_than_less(tmp_path: Path) -> None:
    assert Cgroup(v2(tmp_path, memory_max=GIB, memory_current=2 * GIB)).memory_available_bytes() == 0


def v1(root: Path, **files: object) -> Path:
    write(root, {"proc/self/cgroup": "5:cpu,cpuacct:/job\n4:memory:/job\n0::/"})
    (root / "sys/fs/cgroup/unified").mkdir(parents=True)
    folders = {"memory": "memory/job/memory", "cpu": "cpu,cpuacct/job/cpu"}
    split = {name: name.split("_", 1) for name in files}
    return write(root, {f"sys/fs/cgroup/{folders[kind]}.{rest}": files[name] for name, (kind, rest) in split.items()})


def test_v1_limit_minus_usage_counts_page_cache_as_free(tmp_path: Path) -> None:
    stat = f"inactive_file 5\ntotal_inactive_file {GIB}\ntotal_active_file {GIB}"
    root = v1(tmp_path, memory_limit_in_bytes=6 * GIB, memory_usage_in_bytes=5 * GIB, memory_stat=stat)
    assert Cgroup(root).memory_available_bytes() == 3 * GIB


def test_v1_writes_unlimited_as_a_huge_number(tmp_path: Path) -> None:
    root = v1(tmp_path, memory_limit_in_bytes=V1_UNLIMITED, memory_usage_in_bytes=GIB, cpu_cfs_quota_us=-1)
    assert Cgroup(root).memory_available_bytes() is None
    assert Cgroup(root).cpu_quota() is None


def test_cpu_quota_is_cores(tmp_path: Path) -> None:
    assert Cgroup(v2(tmp_path / "two", cpu_max="150000 100000")).cpu_quota() == 1.5
    assert Cgroup(v1(tmp_path / "one", cpu_cfs_quota_us=50000, cpu_cfs_period_us=100000)).cpu_quota() == 0.5


@pytest.mark.parametrize(("quota", "cores"), [("50000 100000", 1), ("100000 100000", 1), ("150000 100000", 2)])
def test_usable_cores_round_the_quota_up_to_at_least_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quota: str, cores: int
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(8)))
    assert usable_cores(Cgroup(v2(tmp_path, cpu_max=quota))) == cores


def test_usable_cores_never_exceed_the_affinity_mask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {3, 5})
    assert usable_cores(Cgroup(v2(tmp_path, cpu_max="800000 100000"))) == 2
