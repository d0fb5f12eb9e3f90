#!/bin/sh
# Make a virtual environment with everything Paceline needs: scripts/install.sh PYTHON VENV
#
# torch comes first and on its own. PyPI's torch for Linux carries several GB of CUDA libraries, so
# a machine without an NVIDIA driver gets the CPU build: from pip's own sources if one of them has
# it, else through uv, which knows where PyTorch keeps its builds.
set -eu
python=$1
venv=$2
torch=$(sed -n 's/^torch==//p' constraints.txt)

if [ ! -x "$venv/bin/pip" ]; then
    rm -rf "$venv"
    if ! "$python" -m venv "$venv" 2>"${TMPDIR:-/tmp}/paceline-venv.$$"; then
        # Debian keeps venv in a package of its own.
        if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
            apt-get update -qq && apt-get install -y -qq python3-venv && "$python" -m venv "$venv"
        else
            cat "${TMPDIR:-/tmp}/paceline-venv.$$" >&2
            echo "next: sudo apt-get install python3-venv, then run the same command again" >&2
            exit 1
        fi
    fi
    rm -f "${TMPDIR:-/tmp}/paceline-venv.$$"
fi

pip="$venv/bin/python -m pip --disable-pip-version-check -q"
if ! "$venv/bin/python" -c "import torch; assert torch.__version__.split('+')[0] == '$torch'" 2>/dev/null; then
    if command -v nvidia-smi >/dev/null && nvidia-smi >/dev/null 2>&1; then
        $pip install "torch==$torch"
    elif ! $pip install "torch==$torch+cpu" 2>/dev/null; then
        $pip install uv
        "$venv/bin/uv" pip install -q --python "$venv/bin/python" --torch-backend cpu "torch==$torch"
    fi
fi
$pip install -c constraints.txt -e ".[dev,data]"
touch "$venv/.installed"
