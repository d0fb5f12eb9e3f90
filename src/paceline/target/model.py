"""Builds the library's model of a folder without weights, or loads it whole; every failure is our error.

The functions import the library where they use it: its model classes take two seconds to import, and the
consumer of a target with a known layout (layout.py) needs none of them.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from paceline.errors import ConfigError, EngineError, is_want_of_memory, reason_of
from paceline.target.folder import read_config

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def library_config(folder: Path) -> Any:
    """The folder's configuration as the library reads it. Raises ConfigError."""
    from transformers import AutoConfig

    read_config(folder)
    try:
        config = AutoConfig.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except Exception as error:
        raise ConfigError(
            f"{folder / 'config.json'} is not a configuration that transformers can read "
            f"({reason_of(error)}).",
            why="The target is built by the installed transformers; no code of the folder is run.",
            next="choose a model that the installed transformers knows, or fetch it again.",
        ) from error
    if getattr(text_config(config), "num_hidden_layers", None) is None:
        raise ConfigError(
            f"{folder / 'config.json'} describes no text decoder ({config.model_type}).",
            why="States are captured from the layers of one causal language model.",
            next="set target.model to the folder of a causal language model.",
        )
    return config


def text_config(config: Any) -> Any:
    """The part of the library's configuration that describes the text decoder; often the whole."""
    return config.get_text_config(decoder=True)


def _class_of(config: Any) -> Any:
    """The library's class for a text model; else the one for a model with a text decoder in it."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM, AutoModelForMultimodalLM

    return AutoModelForCausalLM if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING else AutoModelForMultimodalLM


def build_empty(folder: Path) -> PreTrainedModel:
    """The folder's model without weights. Raises ConfigError for one that the library cannot build."""
    config = library_config(folder)
    try:
        with torch.device("meta"):
            model: PreTrainedModel = _class_of(config).from_config(config, trust_remote_code=False)
    except Exception as error:
        raise ConfigError(
            f"transformers builds no causal language model from {folder / 'config.json'} "
            f"({reason_of(error)}).",
            why="States are captured from the layers of one causal language model.",
            next="set target.model to the folder of a text decoder that the installed transformers knows.",
        ) from error
    return model


def load_whole(
    folder: Path, dtype: torch.dtype, device: torch.device, attention: str | None
) -> PreTrainedModel:
    """The folder's model with all its weights. Raises EngineError if any cannot be loaded.

    `attention`: None lets the library choose what suits the family.
    """
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    again = "move the folder away and fetch the model again (`make model` for the recipe's target)"
    config = library_config(folder)
    try:
        model, report = _class_of(config).from_pretrained(
            str(folder),
            dtype=dtype,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            attn_implementation=attention,
            ignore_mismatched_sizes=True,  # so that the loading report names them
            output_loading_info=True,
        )
        loaded: PreTrainedModel = torch.nn.Module.to(model, device).eval()
    except Exception as error:
        if is_want_of_memory(error):
            raise EngineError(
                f"The target in {folder} does not fit into the memory of {device} ({reason_of(error)}).",
                why="The engine holds the whole target.",
                next="free memory, choose another device, or a smaller target.",
            ) from error
        raise unusable(folder, reason_of(error), again) from error
    # transformers fills such weights with noise that differs in every process.
    unfit = sorted({*report["missing_keys"], *(key for key, *_ in report["mismatched_keys"])})
    if unfit:
        reason = f"{len(unfit)} weights are missing or of another shape, first: {unfit[0]}"
        raise unusable(folder, reason, again)
    return loaded


def unusable(folder: Path, reason: str, advice: str) -> EngineError:
    return EngineError(
        f"{folder} holds no model that can be loaded ({reason}).",
        why="The producer needs the target's own weights, all of them, as safetensors, in a local folder.",
        next=f"{advice}, or set target.model to a complete Hugging Face model folder.",
    )
