"""What a container may use, read from Linux control groups, version 1 and 2.

A limit may sit on any ancestor of the process's own group, so all of them are looked at. Files that are missing
(another system, an unmounted controller) mean no limit.
"""

from collections.abc import Iterator
from pathlib import Path

_NO_LIMIT = 1 << 60
"""Version 1 writes 'unlimited' as the largest page-aligned number."""


class Cgroup:
    """The control groups of this process. `root` is '/' except in tests."""

    def __init__(self, root: str | Path = "/") -> None:
        self._root = Path(root)

    def memory_limit_bytes(self) -> int | None:
        """The smallest memory limit of any group above this process; None without one."""
        limits = [limit for limit, _ in self._memory_groups()]
        return min(limits, default=None)

    def memory_available_bytes(self) -> int | None:
        """What the tightest limit leaves, page cache counted as free; None without a limit."""
        rooms = [max(0, limit - used) for limit, used in self._memory_groups()]
        return min(rooms, default=None)

    def cpu_quota(self) -> float | None:
        """CPU time per time granted, in cores (1.5 is one and a half); None without a limit."""
        quotas = []
        for folder in self._folders("cpu"):
            words = _read(folder / "cpu.max").split()
            if not words:
                words = [_read(folder / "cpu.cfs_quota_us").strip(), _read(folder / "cpu.cfs_period_us").strip()]
            quota, period = (_number(word) for word in (*words, "", "")[:2])
            if quota and period:
                quotas.append(quota / period)
        return min(quotas, default=None)

    def _memory_groups(self) -> Iterator[tuple[int, int]]:
        """(limit, bytes in use that cannot be dropped) of every group that has a limit."""
        for folder in self._folders("memory"):
            limit = _number(_read(folder / "memory.max") or _read(folder / "memory.limit_in_bytes"))
            if limit is None or limit >= _NO_LIMIT:
                continue
            used = _number(_read(folder / "memory.current") or _read(folder / "memory.usage_in_bytes")) or 0
            yield limit, max(0, used - _file_cache(folder))

    def _folders(self, controller: str) -> Iterator[Path]:
        """The folders of `controller` from this process's group up to the mounted root, in both versions."""
        mounts = self._root / "sys/fs/cgroup"
        for line in _read(self._root / "proc/self/cgroup").splitlines():
            _, names, path = line.split(":", 2)
            if names and controller not in names.split(","):
                continue
            # Version 2 has no name; beside version 1 it is mounted in a folder of its own.
            bases = [mounts / names, mounts / controller] if names else [mounts, mounts / "unified"]
            base = next((base for base in bases if base.is_dir()), None)
            if base is not None:
                yield from _ancestors(base, path)


def _ancestors(base: Path, path: str) -> Iterator[Path]:
    """The group's folder and those above it. In a container the path may be the host's and not exist here."""
    parts = [part for part in path.split("/") if part not in ("", "..")]
    for count in range(len(parts), -1, -1):
        folder = base.joinpath(*parts[:count])
        if folder.is_dir():
            yield folder


def _file_cache(folder: Path) -> int:
    """Bytes of the group's page cache, which the kernel drops when it needs memory."""
    counts = dict(line.split() for line in _read(folder / "memory.stat").splitlines() if len(line.split()) == 2)
    prefix = "total_" if "total_inactive_file" in counts else ""  # version 1: with the groups below
    return sum(_number(counts.get(f"{prefix}{name}", "")) or 0 for name in ("inactive_file", "active_file"))


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return ""


def _number(text: str) -> int | None:
    """A count; None for 'max', -1 and whatever else means no limit."""
    text = text.strip()
    return int(text) if text.isdecimal() else None
