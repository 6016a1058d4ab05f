#!/bin/sh
# Start (or resume) the training in the background, at the lowest priority.
#
# Large tensors are freed and allocated again at every step. By default the C
# library gives such memory back to the system each time, and the page faults
# cost about a tenth of the speed; the MALLOC_ variables make it keep the memory.
set -eu
cd "$(dirname "$0")/.."
mkdir -p training/run
export MALLOC_MMAP_THRESHOLD_=4000000000 MALLOC_TRIM_THRESHOLD_=8000000000
export OMP_WAIT_POLICY=passive GOMP_SPINCOUNT=0
setsid nohup nice -n 19 "${PYTHON:-.venv/bin/python}" training/train.py "$@" \
    >>training/run/stdout.txt 2>&1 </dev/null &
echo $! >training/run/pid
