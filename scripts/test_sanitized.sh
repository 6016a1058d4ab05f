#!/bin/sh
# The native kernels under sanitizers. First a library for each level that this machine runs, built with the address and
# undefined-behaviour sanitizers, runs the kernels' tests; then the thread pool alone runs under the thread sanitizer.
# An interpreter never frees everything, so leaks are not looked for. A finding ends the process: its output is not
# captured, or the report would be lost.
set -eu
cd "$(dirname "$0")/.."
python=${PYTHON_BIN:-.venv/bin/python}
cxx=${CXX:-g++}
tests=${SANITIZED_TESTS:-tests/ops tests/attention tests/quantization}
flags="-fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer -g1 -O1"
levels=$($python - <<'PY'
from mini_vllm.ops.cpu.build import REQUIRED_CPU_FLAGS
from mini_vllm.platforms import current_platform
print(*[isa for isa, needed in REQUIRED_CPU_FLAGS.items() if needed <= current_platform.cpu_flags()])
PY
)
for level in ${SANITIZED_LEVELS:-$levels}; do
    echo "==> address and undefined behaviour: $level"
    # compiled before the sanitizer is preloaded: the compiler would run under it, too
    env MINI_VLLM_CPU_CXXFLAGS="$flags" $python -c "from mini_vllm.ops.cpu import build
build.build_library('$level', build.PACKAGE_LIBRARY_DIR)"
    env MINI_VLLM_CPU_ISA="$level" MINI_VLLM_CPU_CXXFLAGS="$flags" \
        LD_PRELOAD="$($cxx -print-file-name=libasan.so):$($cxx -print-file-name=libubsan.so)" \
        ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
        $python -m pytest -q --capture=no -p no:cacheprovider -m "not slow and not gpu" $tests ${PYTEST_ARGS:-}
done
echo "==> threads: the pool"
program=$(mktemp)
trap 'rm -f "$program"' EXIT
$cxx -std=c++17 -O1 -g1 -pthread -fsanitize=thread -Imini_vllm/ops/cpu/csrc \
    tests/ops/pool_threads.cpp mini_vllm/ops/cpu/csrc/pool.cpp -o "$program"
"$program"
