#!/usr/bin/env bash
# Correctness and all GPU figures of docs/benchmarks.md, in order of importance, on one GPU of 80 GB or more:
#
#     bash scripts/benchmarks/bench_gpu.sh [seconds]     default 580
#     bash scripts/benchmarks/bench_gpu.sh rehearse      the same at toy size on a CPU, into a temporary folder: does it work?
#
# The parts take 12 minutes at most, in all. No part starts that may not end in time; exit status 3 says that some are
# missing or have failed: run it again, and what failed has its turn after what did not run yet. Results go to the
# folder RESULTS (default runs/bench_gpu), which is kept for one GPU and commit; move the JSON files to docs/results and
# `scripts/benchmarks/report_benchmarks.py` turns them into the tables of the page. ARCHIVE=FILE.tgz puts the folder into
# one file after every part. PYTHON names the interpreter (default python3); it needs torch with triton, transformers,
# peft and, for the first part, pytest. COMMIT says what is measured where a copy has no history.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
limit=${1:-580}
[[ $limit =~ ^([0-9]+|rehearse)$ ]] || { sed -n '2,12s/^# \{0,1\}//p' scripts/benchmarks/bench_gpu.sh; exit 2; }
export PYTHONPATH=".${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false
python=${PYTHON:-python3}
[[ -v COMMIT ]] || COMMIT=$(PYTHONPATH=scripts/benchmarks "$python" -c 'from results import commit; print(commit() or "")')
export COMMIT
results=${RESULTS:-runs/bench_gpu}
tests=(-m gpu -n 8 --dist worksteal) toy=() toy_ops=() gpu=none
if [[ $limit == rehearse ]]; then
    limit=100000
    results=$(mktemp -d)
    trap 'rm -r "$results"' EXIT
    tests=(-k cpu) toy=(--rehearse) toy_ops=(--device cpu --seconds 0.01)
else
    name='import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else exit("No GPU here."))'
    gpu=$("$python" -c "$name") || exit 1
    "$python" -c 'import xdist' 2>/dev/null || tests=(-m gpu)
fi
mkdir -p "$results"
progress=$results/progress.txt # what it is of, and which parts have begun and ended well
[[ -f $progress && $(head -1 "$progress") == "$gpu, $COMMIT" ]] || echo "$gpu, $COMMIT" >"$progress"
earlier=$(cat "$progress")
parts=() missing=()

ended() { grep -qx "ended $1" "$progress"; }

# part NAME SECONDS COMMAND...: runs it, unless it has ended well before, or its seconds are not left.
part() {
    local name=$1 most=$2 has_its=new
    shift 2
    [[ $turn == old ]] || parts+=("$name")
    ! grep -qx "begun $name" <<<"$earlier" || has_its=old
    if ended "$name" || [[ $turn != "$has_its" ]] || ((limit - SECONDS < most)); then return; fi
    echo "begun $name" >>"$progress"
    echo "--- $name (at $SECONDS s, $most s at most)"
    timeout --kill-after 5 "$most" "$python" "$@" && echo "ended $name" >>"$progress"
    [[ -z ${ARCHIVE:-} ]] || tar cz -C "$results" . >"$ARCHIVE"
}

# training SECONDS SETTING...: in one process, which ends itself some seconds before it would be ended.
training() {
    local seconds=$1
    shift
    part "$*" "$seconds" scripts/benchmarks/bench_training.py --setting "$@" --results "$results" \
        --seconds $(((seconds - 15) / $#)) "${toy[@]}"
}

correctness() {
    local log=$results/gpu_tests.txt
    OMP_NUM_THREADS=1 part correctness 100 -m pytest tests/test_gpu.py "${tests[@]}" -v --durations 5 \
        -p no:cacheprovider -W ignore >"$log.part" 2>&1
    [[ ! -s $log.part ]] || { mv "$log.part" "$log" && grep -E '^(---|FAILED|ERROR|E  )|passed|failed|No module|s (call|setup)' "$log"; }
    rm -f "$log.part"
}

for turn in new old; do # what an earlier start has begun in vain comes last
    correctness
    training 100 peft
    training 75 linear
    training 60 7b-paper
    part ops 65 scripts/benchmarks/bench_ops.py --output "$results/ops_cuda.json" --limit_s 48 "${toy_ops[@]}"
    training 60 compile
    training 90 context budgets blocks
    part inference 45 scripts/benchmarks/bench_inference.py --output "$results/inference.json" --seconds 30 "${toy[@]}"
    training 90 sizes checkpointing host-gpu
done
echo
"$python" scripts/benchmarks/report_benchmarks.py --summary "$results"
for name in "${parts[@]}"; do
    ended "$name" || missing+=("$name")
done
if ((${#missing[@]})); then
    echo "Missing or failed: ${missing[*]}. Run this again."
    exit 3
fi
