#!/usr/bin/env bash
# Runs the tests, two files at a time: what is started for the tests of a file is started once.
#
#     bash scripts/test.sh [pytest's options]        for example: -k merge, -n 8, -x
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
if [[ " $* " =~ " "(-h|--help)" " && ! -d .venv ]]; then # to help needs no environment
    sed -n '2,4s/^# \{0,1\}//p' scripts/test.sh
    exit
fi
bash scripts/setup.sh test
export OMP_NUM_THREADS=1 # the tests run beside one another, and their models are too small to share out
exec .venv/bin/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder "$@"
