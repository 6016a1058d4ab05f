#!/usr/bin/env bash
# Make .venv ready: scripts/setup_venv.sh run|dev
#
# "run" holds what the engine needs, "dev" also what its tests need. Does nothing when a stamp says that the
# environment was made for this folder from these pyproject.toml and constraints.txt; builds it again when its
# interpreter is gone, the folder moved, or the stamp is of another state. Nothing outside .venv is touched.
set -euo pipefail
cd "$(dirname "$0")/.."

profile="${1:-run}"
venv="${VENV:-.venv}"
stamp="$venv/.ready"
case "$profile" in
run) extras="" ;;
dev) extras="[dev]" ;;
*) echo "usage: $0 run|dev" >&2 && exit 2 ;;
esac

supported='import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))'

find_python() {
    local name
    for name in ${PYTHON:-} python3 python3.13 python3.12 python3.11; do
        if command -v "$name" >/dev/null 2>&1 && "$name" -c "$supported" >/dev/null 2>&1; then
            echo "$name"
            return
        fi
    done
    echo "mini_vllm needs Python 3.11, 3.12 or 3.13; found: $(python3 --version 2>&1 || true)." >&2
    echo "Name another one with: make PYTHON=/path/to/python3.12 ..." >&2
    return 1
}

case "$venv" in
/*) home="$venv" ;;
*) home="$PWD/$venv" ;;
esac
wanted="$home $(cat pyproject.toml constraints.txt scripts/setup_venv.sh | cksum)"
ready="$(cat "$stamp" 2>/dev/null || true)"

# Its scripts name the folder they were made for: an environment that moved with its folder is as dead as one
# whose interpreter is gone.
if "$venv/bin/python" -c "$supported" >/dev/null 2>&1 && grep -qF "$home/bin" "$venv/bin/pip" 2>/dev/null; then
    [ "$ready" = "dev $wanted" ] && exit 0
    [ "$ready" = "$profile $wanted" ] && exit 0
else
    ready="stale"
fi

if [ "$ready" = "stale" ]; then
    python="$(find_python)"
    echo "==> Making $venv with $("$python" --version)"
    rm -rf "$venv"
    "$python" -m venv "$venv" || {
        echo "'$python -m venv' failed; on Debian and Ubuntu it needs the package python3-venv." >&2
        exit 1
    }
fi

echo "==> Installing mini_vllm${extras} and its dependencies into $venv (the first time takes minutes: torch is large)"
rm -f "$stamp"
log="$venv/pip.log"
: >"$log"
"$venv/bin/python" -m pip install --disable-pip-version-check --progress-bar off -c constraints.txt -e ".$extras" 2>&1 |
    tee -a "$log" | { grep --line-buffered -E '^ *(Downloading|Building|Installing)' || true; } | cut -c 1-110 || {
    echo "==> pip failed; the end of $log:" >&2
    tail -n 25 "$log" >&2
    exit 1
}
echo "$profile $wanted" >"$stamp"
echo "==> $venv is ready"
