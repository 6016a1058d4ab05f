"""Compiles `csrc/*.cpp` into one shared library for each instruction-set level.

It needs nothing but the standard library, because `setup.py` runs it before anything is installed. A library's name
holds a hash of all sources and flags, so that a stale one is never loaded, and it appears under that name only when it
is complete.
"""

import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

FLAGS_VARIABLE = "MINI_VLLM_CPU_CXXFLAGS"
SOURCE_DIR = Path(__file__).parent / "csrc"
ISA_VARIABLE = "MINI_VLLM_CPU_ISA"
PACKAGE_LIBRARY_DIR = Path(__file__).parent / "lib"
COMMON_FLAGS = (
    *("-std=c++17", "-O3", "-fPIC", "-pthread", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast"),
    *("-fvisibility=hidden", "-Wall", "-Wno-psabi", "-DNDEBUG"),
)
_AVX2 = ("-mavx2", "-mfma", "-mf16c")
_AVX512 = (*_AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512")
ISA_FLAGS: dict[str, tuple[str, ...]] = {
    "avx512_bf16": (*_AVX512, "-mavx512vnni", "-mavx512bf16"),
    "avx512": _AVX512,
    "avx2": _AVX2,
    "portable": (),
}
"""Levels from fastest to slowest, and what makes the compiler use them. Only 'avx512_bf16' has dot products of bytes
(VNNI) and of bfloat16 numbers."""
_AVX2_FLAGS = frozenset("avx2 fma f16c".split())
_AVX512_FLAGS = _AVX2_FLAGS | frozenset("avx512f avx512bw avx512dq avx512vl".split())
REQUIRED_CPU_FLAGS: dict[str, frozenset[str]] = {
    "avx512_bf16": _AVX512_FLAGS | {"avx512_vnni", "avx512_bf16"},
    "avx512": _AVX512_FLAGS,
    "avx2": _AVX2_FLAGS,
    "portable": frozenset(),
}
"""What /proc/cpuinfo must list for a level to run."""


class BuildError(Exception):
    """No compiler, or it failed; the message says which and what it printed."""


def levels_of_machine() -> list[str]:
    """Levels that a wheel built on this machine should carry."""
    return list(ISA_FLAGS) if platform.machine().lower() in ("x86_64", "amd64") else ["portable"]


def compiler_flags(isa: str) -> list[str]:
    """Of one level, and after them what $MINI_VLLM_CPU_CXXFLAGS adds (sanitizers, say)."""
    return [*COMMON_FLAGS, *ISA_FLAGS[isa], *os.environ.get(FLAGS_VARIABLE, "").split()]


def level_of_machine(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """The best level that this machine runs, as far as the file says."""
    lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines() if cpuinfo.is_file() else []
    flags = frozenset(next((line for line in lines if line.startswith("flags")), "").split())
    return next(isa for isa, needed in REQUIRED_CPU_FLAGS.items() if needed <= flags)


def library_name(isa: str) -> str:
    """The file name that a library of today's sources has."""
    digest = hashlib.sha256(" ".join((*compiler_flags(isa), platform.machine())).encode())
    for path in sorted(SOURCE_DIR.iterdir()):
        if path.suffix in (".h", ".cpp"):
            digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return f"mini_vllm_cpu-{isa}-{digest.hexdigest()[:16]}.so"


def find_compiler() -> str | None:
    """`$CXX`, or the first of g++, clang++ and c++ that is there."""
    for name in (os.environ.get("CXX"), "g++", "clang++", "c++"):
        if name and shutil.which(name.split()[0]):
            return name
    return None


def cache_dir() -> Path:
    """Where libraries go that cannot lie in the package."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "mini_vllm" / "native"


def has_vector_kernels(cpu_flags: frozenset[str]) -> bool:
    """Whether a library with vector instructions is there or can be compiled; asked without loading it, nor torch."""
    asked = os.environ.get(ISA_VARIABLE, "")
    levels = [isa for isa, needed in REQUIRED_CPU_FLAGS.items() if needed and needed <= cpu_flags]
    if not levels or (asked and asked not in levels):
        return False
    name = library_name(asked or levels[0])
    return find_compiler() is not None or any((f / name).is_file() for f in (PACKAGE_LIBRARY_DIR, cache_dir()))


def build_library(isa: str, folder: Path) -> Path:
    """Compile into `folder` unless it is there already; returns its path. Raises `BuildError` or `OSError`."""
    target = folder / library_name(isa)
    if target.is_file():
        return target
    compiler = find_compiler()
    if compiler is None:
        raise BuildError("no C++ compiler was found ($CXX, g++, clang++, c++)")
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".build-") as scratch:
        compile_all(compiler.split(), isa, Path(scratch) / target.name)
        os.replace(Path(scratch) / target.name, target)
    return target


def compile_all(compiler: list[str], isa: str, target: Path) -> None:
    """Every source to an object, as many at once as there are cores, then all into `target`."""
    flags = compiler_flags(isa)
    sources = sorted(SOURCE_DIR.glob("*.cpp"))
    objects = [target.with_name(f"{source.stem}.o") for source in sources]
    commands = [
        [*compiler, *flags, "-c", str(s), "-o", str(o)] for s, o in zip(sources, objects, strict=True)
    ]  # fmt: skip
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(_run, commands))
    _run([*compiler, *flags, "-shared", *map(str, objects), "-o", str(target)])


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise BuildError(f"{' '.join(command[:1])} failed: {done.stderr.strip()[-2000:]}")
