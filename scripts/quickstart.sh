#!/usr/bin/env bash
# Fine-tunes the tiny LLaMA of this repository with SMT, from the warm-up to merged weights, beside LoRA.
#
#     bash scripts/quickstart.sh [--key value ...]        (options: configs/quickstart.yaml)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/setup.sh
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" # for so small a model, threads cost more than they bring
exec .venv/bin/python scripts/finetune.py --config configs/quickstart.yaml "$@"
