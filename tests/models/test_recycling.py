"""Memory that is used again while layers are packed: fewer pages are asked for, and nothing is kept afterwards."""

import subprocess
import sys
from pathlib import Path

import pytest

_PROGRAM = """
import resource, sys
from contextlib import nullcontext
import torch
from mini_vllm.models.recycling import recycled_memory

def anonymous_bytes():
    return next(int(line.split()[1]) << 10 for line in open("/proc/self/status") if line.startswith("RssAnon"))

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

torch.set_num_threads(1)
torch.ones(8 << 20, dtype=torch.uint8)
start, before = anonymous_bytes(), faults()
with recycled_memory() if sys.argv[1] == "recycled" else nullcontext():
    for _ in range(10):
        plain = torch.ones(8 << 20, dtype=torch.uint8)
        del plain
print(faults() - before, anonymous_bytes() - start)
"""


def run(how: str) -> tuple[int, int]:
    environment = {"PYTHONPATH": str(Path(__file__).parents[2]), "PATH": "/usr/bin:/bin"}
    command = [sys.executable, "-c", _PROGRAM, how]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=120)
    faults, kept = done.stdout.split()
    return int(faults), int(kept)


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
def test_freed_weights_are_used_again_and_given_back_in_the_end() -> None:
    faults, kept = run("recycled")
    plain_faults, _ = run("plain")
    assert faults < 2 * 2048 + 500 <= 10 * 2048 * 0.9 <= plain_faults  # pages of 4 KiB in 8 MiB: 2048
    assert kept < 4 << 20
