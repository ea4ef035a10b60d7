#!/usr/bin/env bash
# Makes .venv beside this folder, with this package, what an extra of pyproject.toml names, and the versions that were
# tested. What stands there stays; with all of it there, nothing is done.
#
#     bash scripts/setup.sh [scripts|test]        (test has all that scripts has; PYTHON=python3.12 chooses the interpreter)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

extra=${1:-test}
if [[ $# -gt 1 || ! $extra =~ ^(scripts|test)$ ]]; then
    sed -n '2,5s/^# \{0,1\}//p' scripts/setup.sh
    [[ $extra =~ ^(-h|--help)$ ]] && exit 0 || exit 2
fi
wanted=$(cat pyproject.toml scripts/constraints.txt scripts/setup.sh; pwd)
for stamp in .venv/installed-{"$extra",test}; do
    if [[ -f $stamp && $(< "$stamp") == "$wanted" ]]; then
        exit 0
    fi
done

echo "Setting up .venv for $extra (once; some minutes, mostly PyTorch)"
for python in "${PYTHON:-python3}" .venv/bin/python; do
    if command -v "$python" > /dev/null && ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))'; then
        echo "$python is older than Python 3.10: name another (PYTHON=python3.12), and remove .venv if there is one" >&2
        exit 1
    fi
done
"${PYTHON:-python3}" -m venv .venv || {
    echo "No virtual environment could be made. On Debian and Ubuntu: apt install python3-venv" >&2
    exit 1
}
packages=(--quiet --constraint scripts/constraints.txt --editable ".[$extra]")
pip=(.venv/bin/python -m pip install --disable-pip-version-check)

# uv finds the build of PyTorch for this machine's GPU, or for none. Where it can't, it has installed nothing, and pip
# takes PyPI's build, which for Linux brings gigabytes of CUDA libraries.
{ "${pip[@]}" --quiet --constraint scripts/constraints.txt uv &&
    .venv/bin/uv pip install --python .venv/bin/python --torch-backend=auto "${packages[@]}"; } 2> /dev/null ||
    "${pip[@]}" "${packages[@]}"
printf '%s\n' "$wanted" > ".venv/installed-$extra"
