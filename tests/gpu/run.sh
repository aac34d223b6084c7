#!/bin/sh
# The torch engine on a GPU: families, types, the stepper, and KV pulled with NIXL from one process's
# GPU memory into another's. Not part of `make test`: it needs a GPU, a CUDA build of torch and
# nixl-cu13 (or nixl-cu12) in the environment of $PYTHON.
#
#   tests/gpu/run.sh [pytest arguments]
#   BATON_TEST_DEVICE=cpu tests/gpu/run.sh      the same checks in host memory, to test the tests
set -eu
cd "$(dirname "$0")/../.."
: "${PYTHON:=.venv/bin/python}"
: "${BATON_TEST_DEVICE:=cuda}"
export BATON_TEST_DEVICE
exec "$PYTHON" -m pytest tests/gpu -o python_files='gpu_*.py' --timeout 300 "$@"
