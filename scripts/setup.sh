#!/usr/bin/env bash
# Makes .venv beside this folder, with this package and the versions it was tested with. Does nothing where it stands.
#
#     bash scripts/setup.sh              (PYTHON=python3.12 chooses the interpreter)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

wanted=$(cat pyproject.toml scripts/constraints.txt scripts/setup.sh; pwd)
if [[ -f .venv/installed && $(< .venv/installed) == "$wanted" ]]; then
    exit 0
fi

echo "Setting up .venv (once; some minutes, mostly PyTorch)"
"${PYTHON:-python3}" -m venv .venv || {
    echo "No virtual environment could be made. On Debian and Ubuntu: apt install python3-venv" >&2
    exit 1
}
pip=(.venv/bin/python -m pip install --quiet --disable-pip-version-check --constraint scripts/constraints.txt)

# Without an NVIDIA GPU the CPU build of PyTorch will do; PyPI's for Linux brings gigabytes of CUDA libraries.
cpu_builds=https://download.pytorch.org/whl/cpu
torch=(torch)
if ! command -v nvidia-smi > /dev/null &&
    .venv/bin/python -c "import urllib.request as u; u.urlopen('$cpu_builds/torch/', timeout=10)" 2> /dev/null; then
    torch+=(--index-url "$cpu_builds" --extra-index-url https://pypi.org/simple)
fi
echo "  PyTorch"
"${pip[@]}" "${torch[@]}"
echo "  smt-peft, Transformers, PEFT and what the scripts and tests need"
"${pip[@]}" --editable ".[test]"
printf '%s\n' "$wanted" > .venv/installed
