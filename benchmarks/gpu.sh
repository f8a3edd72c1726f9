#!/bin/sh
# What raftune does on one GPU, in one table, in under six minutes, offline: see benchmarks/gpu.py.
#
#   benchmarks/gpu.sh                                   a clone's .venv, made by `make` where it is missing
#   PYTHON=/path/to/python benchmarks/gpu.sh --minutes 6 --out gpu.json     an environment that exists; installs nothing
#   benchmarks/gpu.sh --size tiny                       everything in small, on a CPU too
set -eu
cd "$(dirname "$0")/.."
VENV=${VENV:-.venv}
if [ -z "${PYTHON:-}" ]; then
    [ -x "$VENV/bin/python" ] || make --no-print-directory "$VENV/.ready" VENV="$VENV"
    PYTHON=$VENV/bin/python
fi
PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1 exec "$PYTHON" benchmarks/gpu.py "$@"
