#!/usr/bin/env bash
# All GPU figures of docs/benchmarks.md, on one GPU of 80 GB or more:
#
#     bash scripts/bench_gpu.sh [seconds]
#     bash scripts/bench_gpu.sh rehearse      the same at toy size on a CPU, into a temporary folder: does it work?
#
# Stops before `seconds` (default 570) and exits 3 while figures are missing: run it again until it exits 0. Figures
# that exist in docs/results are kept; delete a file to measure it anew. PYTHON names the interpreter (default python3);
# it needs torch >= 2.11 with triton, transformers and peft, and matplotlib for the tables and pictures at the end.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export PYTHONPATH=".${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1
python=${PYTHON:-python3}
limit=${1:-570}
docs=docs
toy=()
toy_ops=()
if [[ $limit == rehearse ]]; then
    limit=100000
    docs=$(mktemp -d)
    trap 'rm -r "$docs"' EXIT
    mkdir "$docs/results"
    cp docs/benchmarks.md "$docs"
    toy=(--rehearse)
    toy_ops=(--device cpu --seconds 0.01)
else
    "$python" -c 'import torch, transformers, peft, triton; torch.cuda.is_available() or exit("No GPU here."); print(torch.cuda.get_device_name())'
fi
results=$docs/results
missing=0

# measure NAME SECONDS COMMAND...: runs it unless its figures exist or too little time (of the run's usual need) is left.
measure() {
    local name=$1 need=$2
    shift 2
    if [[ -e $results/$name.json ]]; then return; fi
    if ((SECONDS + need > limit)); then
        missing=1
        return
    fi
    echo "--- $name (at $SECONDS s)"
    timeout $((limit - SECONDS)) "$python" "$@" --output "$results/$name.json" || { echo "$name failed"; missing=1; }
}

measure ops_cuda 90 scripts/bench_ops.py "${toy_ops[@]}"
for setting in peft 7b 7b-checkpointing 7b-paper; do
    measure "training_$setting" 150 scripts/bench_training.py --setting "$setting" "${toy[@]}"
done
for setting in context budgets blocks sizes; do
    measure "training_$setting" 240 scripts/bench_training.py --setting "$setting" "${toy[@]}"
done
if ((missing)); then
    echo "Figures are missing: run this again." >&2
    exit 3
fi
"$python" scripts/report_benchmarks.py "$docs"
