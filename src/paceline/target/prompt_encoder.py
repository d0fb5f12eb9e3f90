"""From a prompt's text to the token ids the target sees, through its own chat template."""

from __future__ import annotations

import hashlib
from pathlib import Path

from transformers import AutoTokenizer

from paceline.errors import ConfigError, EngineError

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


class PromptEncoder:
    """The tokenizer of a local model folder. Nothing is fetched and no code of the folder is run."""

    def __init__(self, model_folder: Path, *, max_prompt_tokens: int) -> None:
        self._max_prompt_tokens = max_prompt_tokens
        if not model_folder.is_dir():
            # transformers would take a path that is not there for a hub id and answer from its cache.
            raise EngineError(
                f"{model_folder} is not a folder.",
                why="The target and its tokenizer are read from a local folder; nothing is fetched.",
                next="run `make model`, or set target.model to a complete Hugging Face model folder.",
            )
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(
                str(model_folder), local_files_only=True, trust_remote_code=False
            )
        except (OSError, ValueError) as error:
            raise EngineError(
                f"{model_folder} holds no tokenizer that can be loaded ({error}).",
                why="Prompts must be encoded exactly as the target expects them.",
                next="run `make model`, or set target.model to a complete Hugging Face model folder.",
            ) from error
        self.version = _digest(model_folder)

    def encode(self, prompt: str) -> tuple[int, ...]:
        """Token ids of one user message, generation prompt included; plain text without a template.

        Raises ConfigError for a prompt of more than `max_prompt_tokens` tokens.
        """
        if self.tokenizer.chat_template is None:
            ids = list(self.tokenizer(prompt)["input_ids"])
        else:
            message = [{"role": "user", "content": prompt}]
            ids = list(
                self.tokenizer.apply_chat_template(message, add_generation_prompt=True, return_dict=False)
            )
        if len(ids) > self._max_prompt_tokens:
            raise ConfigError(
                f"A prompt has {len(ids)} tokens, more than the {self._max_prompt_tokens} of "
                f"prompts.max_prompt_tokens: {prompt[:60]!r}...",
                why="Cutting it would change its meaning, and the feature budget is computed from the limit.",
                next=f"set prompts.max_prompt_tokens to {len(ids)} or more, or shorten the prompt.",
            )
        return tuple(int(token_id) for token_id in ids)


def _digest(model_folder: Path) -> str:
    digest = hashlib.sha256()
    for name in TOKENIZER_FILES:
        path = model_folder / name
        if path.exists():
            digest.update(name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]
