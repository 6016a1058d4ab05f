"""How much of the machine others used while something was measured.

`CpuMeter` compares the machine's busy time (/proc/stat, over the CPUs this process may use) with that of this process
and its descendants. It sees CPU time only: a neighbour that saturates the memory bus from another socket, or another
virtual machine, shows at most as steal. Where there is no /proc, nothing is claimed.
"""

import os
import time
from dataclasses import dataclass
from pathlib import Path

NOISE_LIMIT = 0.08
"""Share of the CPUs used by others above which figures are not to be believed without a second look."""

_PROC = Path("/proc")
_MIN_TICKS = 20
"""Shorter spans are all rounding: /proc counts in ticks, usually of 10 ms."""


@dataclass(frozen=True)
class NoiseReport:
    """Shares of the CPUs this process may use, over the time that was metered; None where they cannot be known."""

    seconds: float
    others_share: float | None
    steal_share: float | None
    own_share: float | None

    @property
    def noisy(self) -> bool:
        return (self.others_share or 0.0) + (self.steal_share or 0.0) > NOISE_LIMIT


@dataclass(frozen=True)
class _Sample:
    when: float
    busy: float
    steal: float
    own: float


class CpuMeter:
    """`start()`, then `stop()` for the report. Costs about a millisecond each."""

    def __init__(self) -> None:
        self._begin: _Sample | None = None
        self._began = 0.0

    def start(self) -> "CpuMeter":
        self._began = time.perf_counter()
        self._begin = _sample()
        return self

    def stop(self) -> NoiseReport:
        seconds = time.perf_counter() - self._began
        return noise_between(self._begin, _sample(), seconds, len(usable_cpus()))


def noise_between(begin: _Sample | None, end: _Sample | None, seconds: float, num_cpus: int) -> NoiseReport:
    """What happened between two samples on `num_cpus` CPUs."""
    if begin is None or end is None or seconds < _MIN_TICKS * _tick():
        return NoiseReport(seconds, None, None, None)
    capacity = num_cpus * (end.when - begin.when)
    own = end.own - begin.own
    others = max(end.busy - begin.busy - own, 0.0)
    return NoiseReport(seconds, others / capacity, (end.steal - begin.steal) / capacity, own / capacity)


def usable_cpus() -> set[int]:
    """The CPUs this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return set(os.sched_getaffinity(0))
    return set(range(os.cpu_count() or 1))


def _tick() -> float:
    return 1.0 / os.sysconf("SC_CLK_TCK")


def _sample() -> _Sample | None:
    try:
        stat = (_PROC / "stat").read_text()
    except OSError:
        return None
    busy, steal = busy_ticks(stat, usable_cpus())
    return _Sample(time.perf_counter(), busy * _tick(), steal * _tick(), _own_ticks(os.getpid()) * _tick())


def busy_ticks(proc_stat: str, cpus: set[int]) -> tuple[int, int]:
    """(busy, stolen) ticks of `cpus` in the text of /proc/stat: user, nice, system, irq and softirq are busy."""
    busy = steal = 0
    for line in proc_stat.splitlines():
        name, *fields = line.split()
        if not (name.startswith("cpu") and name[3:].isdigit() and int(name[3:]) in cpus):
            continue
        user, nice, system, _idle, _iowait, irq, softirq, stolen = (int(field) for field in fields[:8])
        busy += user + nice + system + irq + softirq
        steal += stolen
    return busy, steal


def process_ticks(proc_pid_stat: str) -> tuple[int, int]:
    """(parent, ticks used by itself and by children it waited for) from the text of /proc/<pid>/stat."""
    fields = proc_pid_stat.rpartition(")")[2].split()  # the name before it may hold spaces and brackets
    return int(fields[1]), sum(int(field) for field in fields[11:15])


def _own_ticks(pid: int) -> int:
    """Ticks of process `pid` and its living descendants."""
    ticks: dict[int, int] = {}
    children: dict[int, list[int]] = {}
    for entry in _PROC.iterdir():
        if not entry.name.isdigit():
            continue
        try:
            parent, used = process_ticks((entry / "stat").read_text())
        except OSError:
            continue  # it ended meanwhile
        ticks[int(entry.name)] = used
        children.setdefault(parent, []).append(int(entry.name))
    total, family = 0, [pid]
    while family:
        member = family.pop()
        total += ticks.get(member, 0)
        family += children.get(member, [])
    return total
