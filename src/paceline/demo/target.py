"""A tiny target with random weights as a plain Hugging Face folder, tokenizer and chat template included.

`python -m paceline.demo.target FOLDER` makes it without a network. The weights are large enough for a peaked,
varied output, so that what is captured and learnt differs from prompt to prompt.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

VOCAB, HIDDEN, LAYERS = 61, 32, 8
SPECIALS = ["<pad>", "<bos>", "<eos>", "<unk>"]
CHARACTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ .,?!"
TEMPLATE = (
    "{% for message in messages %}<bos>{{ message['content'] }}<eos>{% endfor %}"
    "{% if add_generation_prompt %}<bos>{% endif %}"
)


def tiny_target(seed: int = 0, tied: bool = False, head_dim: int = 8) -> LlamaForCausalLM:
    """A float32 Llama of `LAYERS` blocks; the same weights for the same seed."""
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=48,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=head_dim,
        max_position_embeddings=256,
        rms_norm_eps=1e-5,
        tie_word_embeddings=tied,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )
    torch.manual_seed(seed)
    model: LlamaForCausalLM = LlamaForCausalLM(config)
    model.train(False)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2:
                parameter.normal_(0.0, 0.15)
            else:
                parameter.uniform_(0.5, 1.5)
            if name == "lm_head.weight":
                parameter.mul_(4.0)
    return model


def write_tokenizer(folder: Path, template: str | None = TEMPLATE) -> Path:
    """The tokenizer alone, one token a character, for a model of `VOCAB` tokens."""
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


def make_target(folder: Path, *, seed: int = 0, head_dim: int = 8) -> Path:
    """Write the folder, in under a second."""
    tiny_target(seed, head_dim=head_dim).save_pretrained(folder)
    return write_tokenizer(folder)


if __name__ == "__main__":
    make_target(Path(sys.argv[1]))
