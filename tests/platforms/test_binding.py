"""Which cores threads are bound to, and that they are."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mini_vllm.exceptions import ConfigError
from mini_vllm.platforms.binding import BIND_VARIABLE, cores_to_bind, parse_cores

ROOT = Path(__file__).parents[2]
linux = pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="threads are bound on Linux only")


@pytest.mark.parametrize("environment", [{}, {BIND_VARIABLE: ""}, {BIND_VARIABLE: "nobind"}])
def test_nothing_is_bound_unless_asked_for(environment: dict[str, str]) -> None:
    assert cores_to_bind(environment, [0, 1]) is None


@linux
def test_a_list_is_taken_in_its_order() -> None:
    assert cores_to_bind({BIND_VARIABLE: "4-6, 1"}, range(8)) == [4, 5, 6, 1]


@linux
def test_auto_takes_one_hardware_thread_of_each_core_first(tmp_path: Path) -> None:
    for core in range(6):
        folder = tmp_path / f"sys/devices/system/cpu/cpu{core}/topology"
        folder.mkdir(parents=True)
        (folder / "thread_siblings_list").write_text(f"{core // 2 * 2}-{core // 2 * 2 + 1}\n")
    assert cores_to_bind({BIND_VARIABLE: "auto"}, range(1, 6), tmp_path) == [1, 2, 4, 3, 5]
    assert cores_to_bind({BIND_VARIABLE: "auto"}, [3, 7], tmp_path / "nothing") == [3, 7]


@linux
def test_cores_that_the_process_may_not_use_are_named() -> None:
    message = f"{BIND_VARIABLE}: this process may not run on 2, 3 of '0-3', only on 0, 1"
    with pytest.raises(ConfigError, match=message):
        cores_to_bind({BIND_VARIABLE: "0-3"}, [0, 1])


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("all", "must be auto, nobind or a list of cores such as 0-3,8, got 'all'"),
        ("3-1", "must be auto"),
        ("1,,2", "must be auto"),
        ("-1", "must be auto"),
        ("0-2,1", "names a core twice"),
        ("0-3|4-7", "has cores for several ranks, and there is one"),
    ],
)
def test_what_is_no_list_of_cores_is_refused(text: str, why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        parse_cores(text)


def test_elsewhere_than_on_linux_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "sched_setaffinity", raising=False)
    with pytest.raises(ConfigError, match="'auto' needs Linux"):
        cores_to_bind({BIND_VARIABLE: "auto"}, [0])


CHECK = """
import os, torch
from mini_vllm.ops.cpu import library
from mini_vllm.platforms import select_platform
from mini_vllm.platforms.binding import new_threads
from mini_vllm.worker import threads

cores = sorted(os.sched_getaffinity(0))
started = []
threads.new_threads = lambda start: started.append(new_threads(start)) or started[-1]
assert threads.start_threads(select_platform("cpu"), {asked}) == {count}
masks = [[sorted(os.sched_getaffinity(thread)) for thread in found] for found in started]
print(masks == {masks} or masks, sorted(os.sched_getaffinity(0)) == {mine})
"""


def masks_of(asked: str, binding: str, **expected: str) -> str:
    environment = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}
    environment |= {BIND_VARIABLE: binding, "PYTHONPATH": str(ROOT)}
    code = CHECK.format(asked=asked, **expected)
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@linux
@pytest.mark.skipif(hasattr(os, "sched_getaffinity") and len(os.sched_getaffinity(0)) < 2, reason="one core")
def test_workers_of_both_kinds_run_on_their_core_and_the_caller_on_the_list() -> None:
    first, second = sorted(os.sched_getaffinity(0))[:2]
    found = masks_of(
        "None", f"{second},{first}", count="2", masks="[[[cores[0]]], [[cores[0]]]]", mine="cores[:2]"
    )  # fmt: skip
    assert found == "True True"
    assert masks_of("1", str(second), count="1", masks="[[], []]", mine="cores[1:2]") == "True True"


@linux
def test_more_threads_than_cores_are_refused() -> None:
    core = min(os.sched_getaffinity(0))
    code = "from mini_vllm.worker.threads import start_threads; start_threads(None, 2)"
    environment = {**os.environ, BIND_VARIABLE: str(core), "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert "num_threads: 2 is more than the 1 cores of VLLM_CPU_OMP_THREADS_BIND" in done.stderr
