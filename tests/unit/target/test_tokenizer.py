"""Prompts become token ids exactly as the library renders them; no template can hang or kill a role."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from paceline.errors import ConfigError, EngineError
from paceline.target import template_worker
from paceline.target.template import ChatTemplate, TemplateError
from paceline.target.tokenizer import PromptEncoder
from paceline.testing.forked_templates import ForkedTemplates

PROMPT = "the wind turns a wheel"


def with_template(folder: Path, template: str) -> Path:
    (folder / "chat_template.jinja").write_text(template)
    return folder


@pytest.mark.parametrize(
    "template",
    [
        None,
        "{%- for m in messages %}{{ bos_token }}{{ m.content | trim }}{{ eos_token }}{% endfor %}",
        "{% set ns = namespace(n=0) %}{% for m in messages %}{% generation %}{{ m['content'] }}"
        "{% endgeneration %}{% endfor %}{% if add_generation_prompt %}{{ bos_token }}{% endif %}",
    ],
)
def test_ids_are_those_of_the_librarys_own_rendering(folder: Path, template: str | None) -> None:
    """Rendering in another process changes no token, specials and generation prompt included."""
    if template:
        with_template(folder, template)
    own = AutoTokenizer.from_pretrained(folder).apply_chat_template(
        [{"role": "user", "content": PROMPT}], add_generation_prompt=True, return_dict=False
    )
    encoder = PromptEncoder(folder)
    assert list(encoder.encode(PROMPT)) == list(own)


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ raise_exception('no user turns') }}", "no user turns"),
        ("{% for %}", "TemplateSyntaxError"),
        ("{{ ''.__class__.__mro__ }}", "SecurityError"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{% for m in messages %}{{ m.content * 4000000000 }}{% endfor %}", "memory|process ended"),
        ("{% for m in messages %}{{ m.content * 1000000 }}{% endfor %}", "characters"),
    ],
)
def test_a_template_that_fails_is_one_clear_error(folder: Path, template: str, reason: str) -> None:
    """At the start, before anything is leased, with what it raised."""
    with pytest.raises(TemplateError, match=reason) as caught:
        PromptEncoder(with_template(folder, template))
    assert "Next: correct the chat template" in str(caught.value)
    assert caught.value.exit_code == 4


def test_a_template_without_end_is_stopped(
    folder: Path, forked_templates: ForkedTemplates, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its process is killed at the limit; the role lives on with an error."""
    loops = "".join(f"{{% for i{n} in range(99999) %}}" for n in range(4)) + "{% endfor %}" * 4
    script = Path(template_worker.__file__)
    quick = folder / "worker.py"
    quick.write_text(script.read_text().replace("RENDER_S = 10", "RENDER_S = 1"))
    monkeypatch.setattr("paceline.target.template.WORKER", [str(quick)])
    monkeypatch.setattr("paceline.target.template._start", forked_templates.executed)
    with pytest.raises(TemplateError, match="was stopped after"):
        PromptEncoder(with_template(folder, loops))


def test_a_renderer_that_is_killed_says_nothing_of_the_prompt(folder: Path) -> None:
    """A kill from outside fails no prompt: another process renders it, to the same text."""
    template = ChatTemplate()
    template.use("{{ messages[0].content }}", {})
    first = template.render([{"role": "user", "content": "hello"}])
    assert template._process is not None
    template._process.kill()
    template._process.wait()
    assert template.render([{"role": "user", "content": "hello"}]) == first
    template.close()


def test_a_prompt_that_the_template_refuses_leaves_the_others_alone(folder: Path) -> None:
    """One text raises, even one that kills the renderer; the next is rendered as ever."""
    refuses = (
        "{% if messages[0].content == 'no' %}{{ raise_exception('refused') }}{% endif %}"
        "{% if messages[0].content == 'die' %}{{ 'x' * 9000000000 }}{% endif %}{{ messages[0].content }}"
    )
    encoder = PromptEncoder(with_template(folder, refuses))
    before = encoder.encode(PROMPT)
    for bad in ("no", "die"):
        with pytest.raises(TemplateError):
            encoder.encode(bad)
        assert encoder.encode(PROMPT) == before


@pytest.mark.parametrize(
    "content", ["", "{", "{}", "[]", "null", '{"model": {"type": "x"}}', '{"version": 3}']
)
def test_a_damaged_tokenizer_is_one_clear_error(folder: Path, content: str) -> None:
    """Whatever stands in tokenizer.json, the error names the folder and says what to do."""
    (folder / "tokenizer.json").write_text(content)
    with pytest.raises((EngineError, ConfigError), match="tokenizer") as caught:
        PromptEncoder(folder)
    assert str(folder) in str(caught.value)
    assert "Next: " in str(caught.value)


@pytest.mark.parametrize(
    ("file", "values", "reason"),
    [
        ("config.json", {"vocab_size": 20}, "it has the token 60, and the model has 20 tokens"),
        ("generation_config.json", {"eos_token_id": [70, 71]}, "answers of the model end with token 70"),
    ],
)
def test_the_tokenizer_of_another_model_is_refused(
    folder: Path, file: str, values: dict[str, Any], reason: str
) -> None:
    """It has tokens that the model lacks, or lacks those that end every answer of the model."""
    config = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps({**config, **values}))
    with pytest.raises(EngineError, match=f"does not belong to its model: .*{reason}"):
        PromptEncoder(folder)


def test_a_model_may_have_more_rows_than_its_tokenizer_has_tokens(folder: Path) -> None:
    """Rows are padded to round numbers, and one known end of answers is enough."""
    for file, values in (
        ("config.json", {"vocab_size": 4096}),
        ("generation_config.json", {"eos_token_id": [70, 2]}),
    ):
        config = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps({**config, **values}))
    assert PromptEncoder(folder).encode(PROMPT)


def test_a_template_that_writes_the_date_writes_the_runs_own(folder: Path) -> None:
    """One run has one rendering, whenever it is resumed."""
    writes = "{{ strftime_now('%d %b %Y') }} {% for m in messages %}{{ m.content }}{% endfor %}"
    pinned = PromptEncoder(with_template(folder, writes), date="2001-02-03T04:05:06+01:00")
    expected = pinned.tokenizer("03 Feb 2001 " + PROMPT, add_special_tokens=False).input_ids
    assert list(pinned.encode(PROMPT)) == list(expected)
    assert pinned.encode(PROMPT) != PromptEncoder(folder).encode(PROMPT)


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"rms_norm_eps": "x"}, "'rms_norm_eps': TypeError: Field 'rms_norm_eps' expected float"),
        ({"max_position_embeddings": "x"}, "'max_position_embeddings': TypeError"),
        ({"vocab_size": None}, "'vocab_size': TypeError"),
        ({"num_attention_heads": 3}, "'validate_architecture': ValueError: The hidden size"),
        ({"dtype": "zorg"}, "AttributeError: module 'torch' has no attribute 'zorg'"),
        ({"quantization_config": 7}, "AttributeError: 'int' object"),
    ],
)
def test_a_fault_of_the_configuration_is_not_called_the_tokenizers(
    folder: Path, values: dict[str, Any], reason: str
) -> None:
    """The library reads it before the tokenizer. Its whole reason is told."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **values}))
    with pytest.raises(ConfigError, match=re.escape(reason)) as caught:
        PromptEncoder(folder)
    assert "tokenizer" not in caught.value.what


def test_a_key_that_a_tokenizer_lacks_is_told_with_the_kind_of_error(folder: Path) -> None:
    """The key alone would be no reason."""
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    del tokenizer["added_tokens"]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(EngineError, match="KeyError: 'added_tokens'"):
        PromptEncoder(folder)


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        (7, "of the type int"),
        ([{"name": "default", "template": 3}], "of the type int"),
        ([{"name": "tool_use", "template": "{{ messages }}"}], "the names tool_use, and none is default"),
    ],
)
def test_a_template_that_is_none_is_refused(folder: Path, given: object, reason: str) -> None:
    """Prompts would be read as plain text, without a word."""
    (folder / "chat_template.jinja").unlink()
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": given}))
    with pytest.raises(TemplateError, match=reason) as caught:
        PromptEncoder(folder)
    assert "Next: correct the chat template" in str(caught.value)
