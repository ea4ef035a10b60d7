#!/usr/bin/env bash
# Correctness and all GPU figures of docs/benchmarks.md, in order of importance, on one GPU of 80 GB or more:
#
#     bash scripts/benchmarks/bench_gpu.sh [seconds]     default 570
#     bash scripts/benchmarks/bench_gpu.sh rehearse      the same at toy size on a CPU, into a temporary folder: does it work?
#
# It stops in time and exits 3 while something is missing or has failed: run it again (some 12 minutes in all). What
# stands in docs/results (or the folder RESULTS) is kept; delete a file to measure it anew. ARCHIVE=FILE.tgz puts all
# of them into one file, too, after every part. PYTHON names the interpreter (default python3); it needs torch with
# triton, transformers and peft. `scripts/benchmarks/report_benchmarks.py` turns the files into the tables of the page.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
export PYTHONPATH=".${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false
python=${PYTHON:-python3}
limit=${1:-570}
results=${RESULTS:-docs/results}
tests=(-m gpu) toy=() toy_ops=()
if [[ $limit == rehearse ]]; then
    limit=100000
    results=$(mktemp -d)
    trap 'rm -r "$results"' EXIT
    tests=(-k cpu) toy=(--rehearse) toy_ops=(--device cpu --seconds 0.01)
else
    "$python" -c 'import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else exit("No GPU here."))' || exit 1
fi
mkdir -p "$results"
missing=0

# part LEAST MOST COMMAND...: runs it for at most MOST seconds, unless fewer than LEAST are left.
part() {
    local left=$((limit - SECONDS)) least=$1 most=$2
    shift 2
    if ((left < least)); then
        echo "--- no time is left: $*"
        missing=1
        return
    fi
    echo "--- $* (at $SECONDS s)"
    timeout --kill-after 10 $((left < most ? left : most)) "$python" "$@" || missing=1
    if [[ -n ${ARCHIVE:-} ]]; then
        (cd "$results" && tar cz $(ls gpu_tests.txt {training,ops,inference}*.json 2>/dev/null)) >"$ARCHIVE"
    fi
}

# training RESERVE SETTING...: leaves RESERVE seconds to what comes later.
training() {
    local reserve=$1
    shift
    part $((reserve + 45)) 100000 scripts/benchmarks/bench_training.py --setting "$@" --results "$results" \
        --seconds 100 --total_seconds $((limit - SECONDS - reserve - 25)) "${toy[@]}"
}

correctness() {
    local log=$results/gpu_tests.txt parallel=()
    "$python" -c 'import pytest' 2>/dev/null || { echo "--- no pytest here: correctness is not checked"; return; }
    if [[ ${#toy[@]} == 0 ]] && "$python" -c 'import xdist' 2>/dev/null; then parallel=(-n 8 --dist worksteal); fi
    grep -qsE '[0-9]+ passed' "$log" ||
        OMP_NUM_THREADS=1 part 30 120 -m pytest tests/test_gpu.py "${tests[@]}" "${parallel[@]}" \
            -v --durations 5 -p no:cacheprovider -W ignore >"$log" 2>&1
    grep -E '^(FAILED|ERROR|E  )|passed|failed|no time|s (call|setup)' "$log"
}

ops() {
    local file=$results/ops_cuda.json
    grep -qs selection_of_a_million "$file" || part 20 75 scripts/benchmarks/bench_ops.py --output "$file" "${toy_ops[@]}"
}

correctness
training 0 peft linear 7b-paper
ops
training 50 compile context budgets blocks checkpointing sizes
part 25 90 scripts/benchmarks/bench_inference.py --output "$results/inference.json" --seconds 50 "${toy[@]}" >/dev/null
echo
"$python" scripts/benchmarks/report_benchmarks.py --summary "$results"
if ((missing)); then
    echo "Something is missing or failed: run this again."
    exit 3
fi
