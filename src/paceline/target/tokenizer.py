"""Encodes a prompt's text into the token ids that the target sees, through its own chat template."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from paceline.errors import ConfigError, EngineError
from paceline.target.folder import read_config, read_json
from paceline.target.template import ChatTemplate, TemplateError

TRIAL_TEXT = "Riders in a paceline take turns at the front."


class PromptEncoder:
    """The tokenizer of a local model folder. Nothing is fetched and no code of the folder is run."""

    def __init__(
        self, model_folder: Path, *, max_prompt_tokens: int | None = None, date: str | None = None
    ) -> None:
        """Raises EngineError or ConfigError if a trial prompt cannot be encoded with the folder's files.

        `date`: the ISO 8601 date that a template sees as the current one.
        """
        self._max_prompt_tokens = max_prompt_tokens
        if not model_folder.is_dir():
            # transformers would take a missing path for a hub id and answer from its cache.
            raise EngineError(
                f"{model_folder} is not a folder.",
                why="The target and its tokenizer are read from a local folder; nothing is fetched.",
                next="run `make model`, or set target.model to a complete Hugging Face model folder.",
            )
        self._template: ChatTemplate | None = ChatTemplate()
        self.tokenizer = _load_tokenizer(model_folder)
        template = self.tokenizer.chat_template
        if isinstance(template, dict):
            template = template.get("default")
        if template:
            self._template.use(template, _plain(self.tokenizer.special_tokens_map), date)
        else:
            self._template.close()
            self._template = None
        vocab_size = read_config(model_folder).get("vocab_size")
        self._vocab_size = vocab_size if isinstance(vocab_size, int) else None
        self._try_once(model_folder)

    def encode(self, prompt: str) -> tuple[int, ...]:
        """Token ids of one user message, generation prompt included; plain text without a template.

        Raises ConfigError for a prompt of more than `max_prompt_tokens` tokens or with a token outside the
        target's vocabulary, EngineError (TemplateError) if the template refuses the prompt.
        """
        ids = self._ids(prompt)
        if self._max_prompt_tokens is not None and len(ids) > self._max_prompt_tokens:
            raise ConfigError(
                f"A prompt has {len(ids)} tokens, more than the {self._max_prompt_tokens} of "
                f"data.max_prompt_tokens: {prompt[:60]!r}...",
                why="Cutting it would change its meaning, and the feature budget is computed from the limit.",
                next=f"set data.max_prompt_tokens to {len(ids)} or more, or shorten the prompt.",
            )
        return ids

    def _ids(self, prompt: str) -> tuple[int, ...]:
        if self._template is None:
            ids = self.tokenizer(prompt).input_ids
        else:
            text = self._template.render([{"role": "user", "content": prompt}])
            ids = self.tokenizer(text, add_special_tokens=False).input_ids
        return tuple(int(token_id) for token_id in ids)

    def _try_once(self, folder: Path) -> None:
        try:
            ids = self._ids(TRIAL_TEXT)
        except TemplateError:
            raise
        except BaseException as error:
            raise _unusable(folder, error) from error
        foreign = [token for token in ids if self._vocab_size is not None and token >= self._vocab_size]
        if foreign or not ids:
            reason = f"a plain prompt gives token {foreign[0]}" if foreign else "it gives no token at all"
            raise EngineError(
                f"The tokenizer in {folder} does not belong to its model: {reason}, and the model has "
                f"{self._vocab_size} tokens.",
                why="The target would read other words than the prompt's.",
                next="put the model's own tokenizer files into that folder.",
            )


def _plain(special_tokens: Mapping[str, Any]) -> dict[str, Any]:
    """The special tokens as text: JSON cannot carry the library's token class."""
    return {
        name: [str(token) for token in value] if isinstance(value, list) else str(value)
        for name, value in special_tokens.items()
    }


def _load_tokenizer(folder: Path) -> Any:
    if (folder / "tokenizer_config.json").exists():
        read_json(folder / "tokenizer_config.json")
    try:
        return AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except BaseException as error:
        raise _unusable(folder, error) from error


def _unusable(folder: Path, error: BaseException) -> BaseException:
    """The error as one of ours, unless it ends the process. (A tokenizers panic is not an Exception.)"""
    if isinstance(error, (KeyboardInterrupt, SystemExit)):
        return error
    reason = str(error).strip().partition("\n")[0][:300] or type(error).__name__
    return EngineError(
        f"{folder} holds no tokenizer that can be loaded ({reason}).",
        why="Prompts must be encoded exactly as the target expects them.",
        next="run `make model`, or set target.model to a complete Hugging Face model folder.",
    )
