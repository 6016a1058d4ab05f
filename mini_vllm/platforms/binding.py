"""Which cores threads are bound to: vLLM's variable `VLLM_CPU_OMP_THREADS_BIND`, and giving threads their cores.

`nobind` (the default) leaves threads to the system. `auto` takes the cores that this process may use, one hardware
thread of each before the second ones. A list such as `0-3,8` takes these. Linux only: elsewhere anything but `nobind`
is refused.
"""

import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from mini_vllm.exceptions import ConfigError

BIND_VARIABLE = "VLLM_CPU_OMP_THREADS_BIND"
_SIBLINGS = "sys/devices/system/cpu/cpu{}/topology/thread_siblings_list"


def cores_to_bind(
    environment: Mapping[str, str], allowed: Iterable[int] | None = None, root: str | Path = "/"
) -> list[int] | None:
    """The cores to bind to, in order; None to bind nothing. allowed: this process's affinity mask unless given.

    Raises `ConfigError` for what is no list of cores, and for cores outside the mask.
    """
    asked = environment.get(BIND_VARIABLE, "").strip()
    if asked in ("", "nobind"):
        return None
    if not hasattr(os, "sched_setaffinity"):
        raise ConfigError(f"{BIND_VARIABLE}: {asked!r} needs Linux; use nobind")
    mask = sorted(os.sched_getaffinity(0) if allowed is None else allowed)
    if asked == "auto":
        return _one_of_each_core_first(mask, Path(root))
    cores = parse_cores(asked)
    if outside := [core for core in cores if core not in mask]:
        raise ConfigError(
            f"{BIND_VARIABLE}: this process may not run on {_listed(outside)} of {asked!r}, only on {_listed(mask)}"
        )
    return cores


def parse_cores(text: str) -> list[int]:
    """'0-2,8' -> [0, 1, 2, 8]. Raises `ConfigError`."""
    cores: list[int] = []
    if "|" in text:
        raise ConfigError(f"{BIND_VARIABLE}: {text!r} has cores for several ranks, and there is one")
    for part in text.split(","):
        first, dash, last = (word.strip() for word in part.partition("-"))
        if not first.isdecimal() or (dash and not last.isdecimal()) or (dash and int(last) < int(first)):
            raise ConfigError(f"{BIND_VARIABLE}: must be auto, nobind or a list of cores such as 0-3,8, got {text!r}")
        cores += range(int(first), int(last or first) + 1)
    if len(set(cores)) < len(cores):
        raise ConfigError(f"{BIND_VARIABLE}: {text!r} names a core twice")
    return cores


def new_threads(start: Callable[[], object]) -> list[int]:
    """Ids of the threads of this process that `start` starts, oldest first."""
    before = set(os.listdir("/proc/self/task"))
    start()
    return sorted(map(int, set(os.listdir("/proc/self/task")) - before))


def bind(threads: Iterable[int], cores: Iterable[int]) -> None:
    """Each thread to the core beside it in the other list."""
    for thread, core in zip(threads, cores, strict=False):
        os.sched_setaffinity(thread, {core})


def _one_of_each_core_first(mask: list[int], root: Path) -> list[int]:
    seen: set[str] = set()
    first: list[int] = []
    second: list[int] = []
    for core in mask:
        path = root / _SIBLINGS.format(core)
        siblings = path.read_text(encoding="ascii").strip() if path.is_file() else str(core)
        (second if siblings in seen else first).append(core)
        seen.add(siblings)
    return first + second


def _listed(cores: list[int]) -> str:
    return ", ".join(map(str, cores))
