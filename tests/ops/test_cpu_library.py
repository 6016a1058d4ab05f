"""How the kernel library is chosen, built, loaded, and what runs without it; its thread pool."""

import ctypes
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from mini_vllm.exceptions import ConfigError
from mini_vllm.ops.cpu import build, library

native = pytest.mark.skipif(not library.available(), reason="no native kernels here")

AVX2 = build.REQUIRED_CPU_FLAGS["avx2"]
AVX512 = build.REQUIRED_CPU_FLAGS["avx512"]
AVX512_BF16 = build.REQUIRED_CPU_FLAGS["avx512_bf16"]


def test_the_best_level_that_the_processor_runs_is_chosen():
    assert library.choose_isa("", AVX512_BF16 | {"sse2"}) == "avx512_bf16"
    assert library.choose_isa("", AVX512_BF16 - {"avx512_bf16"}) == "avx512"
    assert library.choose_isa("", AVX512 - {"avx512vl"}) == "avx2"
    assert library.choose_isa("", frozenset()) == "portable"


def test_a_level_can_be_forced_or_refused_with_the_reason():
    assert library.choose_isa("portable", AVX512) == "portable"
    assert library.choose_isa("off", AVX512) is None
    with pytest.raises(ConfigError, match="MINI_VLLM_CPU_ISA: 'sse9' is unknown; use one of avx512_bf16, avx512"):
        library.choose_isa("sse9", AVX512)
    with pytest.raises(ConfigError, match="cannot run 'avx512_bf16', it lacks avx512_bf16"):
        library.choose_isa("avx512_bf16", AVX512_BF16 - {"avx512_bf16"})


@pytest.mark.parametrize(
    ("cpuinfo", "level"),
    [
        ("processor : 0\nflags\t\t: fpu avx2 fma f16c\n\nprocessor : 1\nflags : fpu\n", "avx2"),
        ("flags : " + " ".join(sorted(AVX512_BF16)), "avx512_bf16"),
        ("flags : " + " ".join(sorted(AVX512_BF16 - {"avx512_vnni"})), "avx512"),
        ("Features : asimd bf16\n", "portable"),
    ],
)
def test_an_editable_install_compiles_for_this_machine(tmp_path, cpuinfo, level):
    (tmp_path / "cpuinfo").write_text(cpuinfo)
    assert build.level_of_machine(tmp_path / "cpuinfo") == level
    assert build.level_of_machine(tmp_path / "none") == "portable"


def test_a_library_is_named_after_its_sources_and_flags(tmp_path, monkeypatch):
    (tmp_path / "a.cpp").write_text("int a;")
    monkeypatch.setattr(build, "SOURCE_DIR", tmp_path)
    names = {build.library_name(isa) for isa in build.ISA_FLAGS}
    assert len(names) == len(build.ISA_FLAGS)
    (tmp_path / "a.cpp").write_text("int b;")
    assert not names & {build.library_name(isa) for isa in build.ISA_FLAGS}


@pytest.mark.skipif(build.find_compiler() is None, reason="no compiler")
def test_a_library_appears_whole_or_not_at_all(tmp_path, monkeypatch):
    sources, folder = tmp_path / "csrc", tmp_path / "lib"
    sources.mkdir()
    monkeypatch.setattr(build, "SOURCE_DIR", sources)
    (sources / "bad.cpp").write_text("int broken(")
    with pytest.raises(build.BuildError, match=r"failed: .*bad\.cpp"):
        build.build_library("portable", folder)
    assert list(folder.iterdir()) == []
    (sources / "bad.cpp").write_text('extern "C" __attribute__((visibility("default"))) int answer() { return 42; }')
    path = build.build_library("portable", folder)
    assert ctypes.CDLL(str(path)).answer() == 42
    assert list(folder.iterdir()) == [path]
    assert build.build_library("portable", folder) == path


def test_without_a_compiler_the_reason_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(build, "find_compiler", lambda: None)
    with pytest.raises(build.BuildError, match=r"no C\+\+ compiler was found"):
        build.build_library("portable", tmp_path)


def test_switched_off_nothing_is_loaded_and_the_log_says_so():
    code = (
        "import torch; from mini_vllm.ops.cpu import library; from mini_vllm.ops.norm import rms_norm;"
        "from mini_vllm.attention.selector import get_attn_backend;"
        "assert library.library() is None and library.loaded_isa() is None;"
        "rms_norm(torch.ones(2, 4), None, torch.ones(4), 1e-6);"
        "assert get_attn_backend(None, 64, torch.float32).name == 'TORCH_REF'"
    )
    environment = {**os.environ, "MINI_VLLM_CPU_ISA": "off", "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("CPU kernels: off") == 1


# --- the pool ------------------------------------------------------------------------------------------------


def probe(count: int) -> int:
    return int(library.function("mv_pool_probe", [ctypes.c_int64], ctypes.c_int64)(count))


@native
def test_every_item_runs_once_whatever_the_number_of_threads():
    before = library.library().mv_num_threads()
    for threads in (1, 2, 3, 2):
        library.set_num_threads(threads)
        assert library.library().mv_num_threads() == threads
        assert all(probe(n) == n * (n - 1) // 2 for n in (0, 1, 2, 3, 17, 1000) for _ in range(50))
    library.set_num_threads(before)


@native
def test_callers_in_several_threads_do_not_meet():
    library.set_num_threads(2)
    wrong = []

    def call() -> None:
        wrong.extend(n for n in range(2, 400) if probe(n) != n * (n - 1) // 2)

    threads = [threading.Thread(target=call) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    library.set_num_threads(1)
    assert wrong == []


@native
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_forked_child_computes_alone():
    code = (
        "import ctypes, os; from mini_vllm.ops.cpu import library; library.set_num_threads(2);"
        "probe = library.function('mv_pool_probe', [ctypes.c_int64], ctypes.c_int64); assert probe(9) == 36;"
        "child = os.fork();\n"
        "if not child: os._exit(int(probe(9) != 36 or library.library().mv_num_threads() != 1))\n"
        "assert os.waitpid(child, 0)[1] == 0"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True, timeout=60)
