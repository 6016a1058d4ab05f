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

SOURCE_DIR = Path(__file__).parent / "csrc"
PACKAGE_LIBRARY_DIR = Path(__file__).parent / "lib"
COMMON_FLAGS = (
    *("-std=c++17", "-O3", "-fPIC", "-pthread", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast"),
    *("-fvisibility=hidden", "-Wall", "-Wno-psabi", "-DNDEBUG"),
)
_AVX2 = ("-mavx2", "-mfma", "-mf16c")
ISA_FLAGS: dict[str, tuple[str, ...]] = {
    "avx512": (
        *_AVX2,
        *("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512vnni", "-mavx512bf16"),
        "-mprefer-vector-width=512",
    ),
    "avx512plain": (
        *_AVX2,
        *("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512"),
    ),
    "avx2": _AVX2,
    "portable": (),
}
"""Levels from fastest to slowest, and what makes the compiler use them."""
REQUIRED_CPU_FLAGS: dict[str, frozenset[str]] = {
    "avx512": frozenset("avx512f avx512bw avx512dq avx512vl avx512_vnni avx512_bf16 avx2 fma f16c".split()),
    "avx512plain": frozenset("avx512f avx512bw avx512dq avx512vl avx2 fma f16c".split()),
    "avx2": frozenset("avx2 fma f16c".split()),
    "portable": frozenset(),
}
"""What /proc/cpuinfo must list for a level to run."""


class BuildError(Exception):
    """No compiler, or it failed; the message says which and what it printed."""


def levels_of_machine() -> list[str]:
    """Levels that a wheel built on this machine should carry."""
    return list(ISA_FLAGS) if platform.machine().lower() in ("x86_64", "amd64") else ["portable"]


def library_name(isa: str) -> str:
    """The file name that a library of today's sources has."""
    digest = hashlib.sha256(" ".join((*COMMON_FLAGS, *ISA_FLAGS[isa], platform.machine())).encode())
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
    flags = [*COMMON_FLAGS, *ISA_FLAGS[isa]]
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
