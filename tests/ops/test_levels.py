"""Every level that this processor runs computes what the references do: the kernels' own tests, once more for each.

A process has one level, so each level has a process of its own here. The machine's best one is the one that the tests
run with anyway.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mini_vllm.ops.cpu import build, library
from mini_vllm.platforms import current_platform

ROOT = Path(__file__).parents[2]
KERNEL_TESTS = ("tests/ops", "tests/attention", "tests/quantization", "tests/worker/test_captured_step.py")
RUNNABLE = [isa for isa, needed in build.REQUIRED_CPU_FLAGS.items() if needed <= current_platform.cpu_flags()]


def run_at(level: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, library.ISA_VARIABLE: level, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, *arguments]
    return subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.skipif(not library.available(), reason="no native kernels here")
@pytest.mark.parametrize("level", [isa for isa in RUNNABLE if isa != RUNNABLE[0]])
def test_the_kernels_tests_pass_at_every_other_level(level: str) -> None:
    asked = run_at(level, "-c", "from mini_vllm.ops.cpu import library; print(library.loaded_isa())")
    assert asked.stdout.split() == [level], asked.stderr
    done = run_at(level, "-m", "pytest", "-x", "-m", "not slow and not gpu", *KERNEL_TESTS)
    assert done.returncode == 0, done.stdout[-4000:]
