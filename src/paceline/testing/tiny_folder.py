"""A tiny random target as a plain Hugging Face folder, tokenizer and chat template included."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from paceline.testing.tiny_target import VOCAB, save_target, tiny_target

SPECIALS = ["<pad>", "<bos>", "<eos>", "<unk>"]
CHARACTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ .,?!"
TEMPLATE = (
    "{% for message in messages %}<bos>{{ message['content'] }}<eos>{% endfor %}"
    "{% if add_generation_prompt %}<bos>{% endif %}"
)


def make_tiny_folder(folder: Path, *, seed: int = 0) -> Path:
    """Write the folder: 8 layers, hidden size 32, one token a character. Under a second."""
    save_target(tiny_target(seed), folder)
    return write_tokenizer(folder)


def write_tokenizer(folder: Path, template: str | None = TEMPLATE) -> Path:
    """The tokenizer alone, for a model of `VOCAB` tokens."""
    tokens = SPECIALS + list(CHARACTERS[: VOCAB - len(SPECIALS)])
    vocab = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))  # noqa: S106 (a token of text)
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",  # noqa: S106
        bos_token="<bos>",  # noqa: S106
        eos_token="<eos>",  # noqa: S106
        unk_token="<unk>",  # noqa: S106
        chat_template=template,
    )
    fast.save_pretrained(folder)
    return folder
