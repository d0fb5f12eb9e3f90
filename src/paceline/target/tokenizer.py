"""Encodes a prompt's text into the token ids that the target sees, through its own chat template."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from paceline.errors import EngineError, reason_of
from paceline.target.folder import eos_token_ids, read_config, read_generation_config, read_json
from paceline.target.model import library_config, text_config
from paceline.target.settings import TargetSection
from paceline.target.template import ChatTemplate, TemplateError

TRIAL_TEXT = "Riders in a paceline take turns at the front."


class PromptEncoder:
    """The tokenizer of a local model folder. Nothing is fetched and no code of the folder is run."""

    def __init__(
        self, model_folder: Path, *, date: str | None = None, variables: Mapping[str, Any] | None = None
    ) -> None:
        """Raises EngineError or ConfigError if a trial prompt cannot be encoded with the folder's files.

        `date`: the ISO 8601 date that a template sees as the current one. `variables`: further values for it.
        """
        if not model_folder.is_dir():
            # transformers would take a missing path for a hub id and answer from its cache.
            raise EngineError(
                f"{model_folder} is not a folder.",
                why="The target and its tokenizer are read from a local folder; nothing is fetched.",
                next="run `make model`, or set target.model to a complete Hugging Face model folder.",
            )
        self.template: ChatTemplate | None = ChatTemplate()
        self.tokenizer = _load_tokenizer(model_folder)
        template = _default_template(self.tokenizer.chat_template, model_folder)
        if template:
            specials = _plain(self.tokenizer.special_tokens_map)
            self.template.use(template, specials, date=date, variables=variables)
        else:
            self.template.close()
            self.template = None
        self._try_once(model_folder)

    @classmethod
    def of(cls, target: TargetSection, *, date: str | None = None) -> PromptEncoder:
        """The encoder of a run's target, with the template's variables that the run file sets."""
        return cls(target.model, date=date, variables=target.template)

    def encode(self, prompt: str) -> tuple[int, ...]:
        """Token ids of one user message, generation prompt included; plain text without a template.

        Raises EngineError (TemplateError) if the template refuses the prompt.
        """
        if self.template is None:
            return tuple(int(token_id) for token_id in self.tokenizer(prompt).input_ids)
        return self.ids(self.template.render([{"role": "user", "content": prompt}]).text)

    def ids(self, rendered: str) -> tuple[int, ...]:
        """Token ids of a text that the template has written."""
        encoded = self.tokenizer(rendered, add_special_tokens=False)
        return tuple(int(token_id) for token_id in encoded.input_ids)

    def _try_once(self, folder: Path) -> None:
        try:
            ids = self.encode(TRIAL_TEXT)
        except TemplateError:
            raise
        except BaseException as error:
            raise _unusable(folder, error) from error
        if reason := self._why_foreign(folder, ids):
            raise EngineError(
                f"The tokenizer in {folder} does not belong to its model: {reason}.",
                why="The target would read other words than the prompt's.",
                next="put the model's own tokenizer files into that folder.",
            )

    def _why_foreign(self, folder: Path, ids: Sequence[int]) -> str:
        config = read_config(folder)
        rows = config.get("vocab_size") or text_config(library_config(folder)).vocab_size
        if not ids:
            return "it gives no token for a plain prompt"
        # Special tokens may lie beyond the model's rows, where only other media use them.
        if (most := max(*ids, self.tokenizer.vocab_size - 1)) >= rows:
            return f"it has the token {most}, and the model has {rows} tokens"
        ends = eos_token_ids(config, read_generation_config(folder))
        if (
            ends
            and min(ends) >= len(self.tokenizer)
            and not set(ends) & set(self.tokenizer.get_vocab().values())
        ):
            return f"it has {len(self.tokenizer)} tokens, and answers of the model end with token {min(ends)}"
        return ""


def _default_template(given: Any, folder: Path) -> str:
    """The template that plain chats are rendered with; "" if the folder has none. Raises TemplateError."""
    if isinstance(given, dict) and given and "default" not in given:
        raise _no_template(
            folder, f"templates have the names {', '.join(map(str, given))}, and none is default"
        )
    template = given.get("default") if isinstance(given, dict) else given
    if template is not None and not isinstance(template, str):
        raise _no_template(folder, f"chat template is of the type {type(template).__name__}, not a text")
    return template or ""


def _no_template(folder: Path, reason: str) -> TemplateError:
    return TemplateError(
        f"The target in {folder} has no chat template that can be used: its {reason}.",
        why="Prompts must be encoded exactly as the target expects them.",
        next="correct the chat template of target.model (chat_template.jinja or tokenizer_config.json).",
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
        if isinstance(error, Exception):
            library_config(folder)  # the library reads it first, and what is wrong there is no tokenizer's
        raise _unusable(folder, error) from error


def _unusable(folder: Path, error: BaseException) -> BaseException:
    """The error as one of ours, unless it ends the process. (A tokenizers panic is not an Exception.)"""
    if isinstance(error, (KeyboardInterrupt, SystemExit)):
        return error
    return EngineError(
        f"{folder} holds no tokenizer that can be loaded ({reason_of(error)}).",
        why="Prompts must be encoded exactly as the target expects them.",
        next="run `make model`, or set target.model to a complete Hugging Face model folder.",
    )
