"""Which tokens of a chat are targets, for the templates of public models."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import render_jinja_template

from paceline.errors import EngineError
from paceline.target import template_worker
from paceline.target.chat import Written, exact_spans
from paceline.target.chat_encoder import ChatEncoder
from paceline.target.template import ChatTemplate, TemplateError
from paceline.target.tokenizer import PromptEncoder

TEMPLATES = Path(__file__).parent / "templates"
# The special tokens of each family's templates; the first ends a document, the others end an answer.
FAMILIES: dict[str, tuple[list[str], list[str]]] = {
    "llama3": (["<|end_of_text|>", "<|eot_id|>"], ["<|start_header_id|>", "<|end_header_id|>"]),
    "qwen2_5": (["<|endoftext|>", "<|im_end|>"], ["<|im_start|>"]),
    "qwen3": (["<|endoftext|>", "<|im_end|>"], ["<|im_start|>", "<think>", "</think>", "<tool_call>"]),
    "smollm2": (["<|im_end|>"], ["<|im_start|>"]),
    "mistral": (["</s>"], ["[INST]", "[/INST]", "[TOOL_CALLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]"]),
    "gemma": (["<eos>", "<end_of_turn>"], ["<start_of_turn>"]),
    "phi3": (["<|endoftext|>", "<|end|>"], ["<|user|>", "<|assistant|>", "<|system|>"]),
    "gptoss": (
        ["<|endoftext|>", "<|return|>", "<|call|>"],
        ["<|start|>", "<|end|>", "<|message|>", "<|channel|>"],
    ),
}
CHAT = [
    {"role": "user", "content": "the wind turns"},
    {"role": "assistant", "content": "a wheel and every rider"},
    {"role": "user", "content": "until when"},
    {"role": "assistant", "content": "until one lets go"},
]
SYSTEM = {"role": "system", "content": "be brief"}
THOUGHTS = "<think>\nlet me see\n</think>\n\n"
Make = Callable[..., ChatEncoder]


class InThisProcess(ChatTemplate):
    """Renders without a worker, whose start costs more than all the rest of these tests."""

    def __init__(self) -> None:
        self._process = None

    def _tell(self, what: object) -> None:
        """Nobody listens."""

    def _ask(self, chat: Mapping[str, Any]) -> dict[str, Any]:
        try:
            return template_worker._rendered(render_jinja_template, self._setting, chat)
        except Exception as error:  # noqa: BLE001
            return {"error": str(error)}


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Make:
    """An encoder of a family's template over bytes, each special token one token."""
    monkeypatch.setattr("paceline.target.tokenizer.ChatTemplate", InThisProcess)

    def make(family: str, template: str = "", **variables: Any) -> ChatEncoder:
        ends, others = FAMILIES[family]
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        tokenizer = Tokenizer(models.BPE({letter: n for n, letter in enumerate(alphabet)}, []))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        fast = PreTrainedTokenizerFast(
            tokenizer_object=tokenizer,
            bos_token="<bos>",  # noqa: S106
            eos_token=ends[0],
            additional_special_tokens=[*ends[1:], *others],
            chat_template=(TEMPLATES / f"{template or family}.jinja").read_text(),
        )
        fast.save_pretrained(tmp_path)
        eos = [fast.convert_tokens_to_ids(token) for token in ends]
        config = {"model_type": "llama", "vocab_size": len(fast), "eos_token_id": eos}
        (tmp_path / "config.json").write_text(json.dumps(config))
        return ChatEncoder(PromptEncoder(tmp_path, variables=variables), tmp_path)

    return make


def targets(chats: ChatEncoder, messages: list[dict[str, Any]], tools: tuple[Any, ...] = ()) -> list[str]:
    """The text of each span of targets."""
    encoded = chats.answered(messages, tools)
    assert encoded.spans[-1][1] == len(encoded.ids), "nothing follows the last answer"
    return [chats._tokenizer.decode(encoded.ids[start:stop]) for start, stop in encoded.spans]


@pytest.mark.parametrize(
    ("family", "end"),
    [
        ("llama3", "<|eot_id|>"),
        ("qwen2_5", "<|im_end|>"),
        ("smollm2", "<|im_end|>"),
        ("mistral", "</s>"),
        ("gemma", "<end_of_turn>"),
        ("phi3", "<|end|>"),
    ],
)
def test_every_answer_and_its_end_are_targets(make: Make, family: str, end: str) -> None:
    """Nothing else is: no prompt, no header of a turn, no line break after its end."""
    assert targets(make(family), CHAT) == [f"a wheel and every rider{end}", f"until one lets go{end}"]


@pytest.mark.parametrize("family", ["llama3", "qwen2_5", "phi3"])
def test_system_turns_go_through_the_template(make: Make, family: str) -> None:
    """They are context."""
    chats = make(family)
    assert targets(chats, [SYSTEM, *CHAT]) == targets(chats, CHAT)
    assert "be brief" in chats._tokenizer.decode(chats.answered([SYSTEM, *CHAT]).ids)


def test_an_earlier_answer_that_the_template_changes_is_context(make: Make) -> None:
    """Qwen 3 drops the thoughts of earlier turns, so the target would not write those turns as they stand."""
    chats = make("qwen3")
    last = "<think>\n\n</think>\n\nuntil one lets go<|im_end|>"
    assert targets(chats, CHAT) == [last]
    thought = [dict(m, content=THOUGHTS + m["content"]) if m["role"] == "assistant" else m for m in CHAT]
    assert targets(chats, thought) == [f"{THOUGHTS}until one lets go<|im_end|>"]
    assert "let me see" not in chats._tokenizer.decode(chats.answered(thought).ids[: -len(last) - 20])
    assert targets(chats, CHAT[:2]) == ["<think>\n\n</think>\n\na wheel and every rider<|im_end|>"]


def test_what_the_generation_prompt_writes_is_no_target(make: Make) -> None:
    """With its thinking off, Qwen 3 is given empty thoughts: the answer begins after them."""
    chats = make("qwen3", enable_thinking=False)
    assert targets(chats, CHAT) == ["until one lets go<|im_end|>"]


def test_an_answer_in_another_channel_is_a_target_up_to_where_it_is_the_same(make: Make) -> None:
    """gpt-oss ends an answer with <|return|>, which stands as <|end|> in the history."""
    chats = make("gptoss")
    assert targets(chats, CHAT) == [
        "<|channel|>final<|message|>a wheel and every rider",
        "<|channel|>final<|message|>until one lets go<|return|>",
    ]
    thought = [*CHAT[:3], {**CHAT[3], "thinking": "let me see"}]
    assert targets(chats, thought)[-1] == (
        "<|channel|>analysis<|message|>let me see<|end|><|start|>assistant"
        "<|channel|>final<|message|>until one lets go<|return|>"
    )


def test_a_template_that_moves_the_system_turn_leaves_no_wrong_target(make: Make) -> None:
    """Mistral's puts it before the last user turn, and drops it where an answer follows."""
    with pytest.raises(EngineError, match="renders the last answer otherwise than it begins one"):
        make("mistral").answered([SYSTEM, *CHAT])


CALL = {"id": "abcdefghi", "type": "function", "function": {"name": "look", "arguments": {"at": "it"}}}
TOOLS = ({"type": "function", "function": {"name": "look", "description": "x", "parameters": {}}},)


@pytest.mark.parametrize("family", ["qwen2_5", "qwen3"])
def test_a_call_of_a_tool_is_an_answer_and_its_result_is_not(make: Make, family: str) -> None:
    """The tools go through the template. Qwen 3 would write its thoughts before the call: it is context."""
    messages = [
        CHAT[0],
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "content": "a rider", "tool_call_id": "abcdefghi"},
        CHAT[1],
    ]
    chats = make(family)
    call = '<tool_call>\n{"name": "look", "arguments": {"at": "it"}}\n</tool_call>'
    *calls, answer = targets(chats, messages, TOOLS)
    assert calls == ([f"{call}<|im_end|>"] if family == "qwen2_5" else [])
    assert "a rider" not in answer
    assert answer.endswith("a wheel and every rider<|im_end|>")
    whole = chats._tokenizer.decode(chats.answered(messages, TOOLS).ids)
    assert call in whole
    assert '"description": "x"' in whole


@pytest.mark.parametrize("family", ["llama3", "gemma", "phi3"])
def test_a_template_that_marks_its_answers_is_believed(make: Make, family: str) -> None:
    """And both ways find the same tokens."""
    found = make(family).answered(CHAT)
    assert make(family, f"{family}_training").answered(CHAT) == found


@pytest.mark.parametrize("is_rewritten", [False, True])
@pytest.mark.parametrize("last", [CHAT[3], {"role": "assistant", "content": ""}])
def test_a_chat_whose_last_answer_is_not_marked_does_not_end_with_an_earlier_one(
    make: Make, tmp_path: Path, last: dict[str, Any], is_rewritten: bool
) -> None:
    """Also if the template renders the question otherwise where an answer follows it."""
    make("smollm2")
    question = "m.content | upper if loop.last else m.content" if is_rewritten else "m.content"
    template = (
        "{% for m in messages %}{% if m.role == 'user' %}<|im_start|>{{ QUESTION }}{% elif MARKED %}"
        "{% generation %}{{ m.content }}{% endgeneration %}<|im_end|>"
        "{% else %}{{ m.content }}<|im_end|>{% endif %}{% endfor %}"
    ).replace("QUESTION", question)

    def with_marks(which: str) -> ChatEncoder:
        (tmp_path / "chat_template.jinja").write_text(template.replace("MARKED", which))
        return ChatEncoder(PromptEncoder(tmp_path), tmp_path)

    for which in ("not loop.last", *(["true"] if not last["content"] else [])):
        with pytest.raises(EngineError, match="marks no token of the last answer"):
            with_marks(which).answered([*CHAT[:3], last])
    assert targets(with_marks("true"), CHAT) == [CHAT[1]["content"], CHAT[3]["content"]]
    assert targets(with_marks("loop.last"), CHAT) == [CHAT[3]["content"]]


@pytest.mark.parametrize("merges", [["ĊĊ"], ["ĊĊ", "tĊ"]])
def test_an_answer_that_merges_with_its_prompt_is_a_target_from_its_next_token_on(
    make: Make, tmp_path: Path, merges: list[str]
) -> None:
    """A token that also holds the end of the generation prompt is none that anybody would write.

    With the second merge the prompt's own last token is another one too: the tokens differ from before it on.
    """
    make("smollm2")
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    content["model"]["vocab"] |= {pair: number for number, pair in enumerate(merges, start=998)}
    content["model"]["merges"] = [list(pair) for pair in merges]
    content["pre_tokenizer"]["use_regex"] = False
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "vocab_size": 1000}))
    chats = ChatEncoder(PromptEncoder(tmp_path), tmp_path)
    assert targets(chats, [CHAT[0], {"role": "assistant", "content": "\nso it turns"}]) == [
        "so it turns<|im_end|>"
    ]


@pytest.mark.parametrize("chat", [CHAT[:2], CHAT])
def test_an_answer_without_the_thoughts_that_its_prompt_opens_is_no_target(
    make: Make, tmp_path: Path, chat: list[dict[str, Any]]
) -> None:
    """QwQ and DeepSeek R1 open the thoughts in the generation prompt, and drop them from the history."""
    make("qwen3")
    template = (tmp_path / "chat_template.jinja").read_text()
    opened = template.replace("'<|im_start|>assistant\\n'", "'<|im_start|>assistant\\n<think>\\n'")
    bare = opened.replace(
        "+ '\\n<think>\\n' + reasoning_content.strip('\\n') + '\\n</think>\\n\\n' +", "+ '\\n' +"
    )
    assert len({template, opened, bare}) == 3
    (tmp_path / "chat_template.jinja").write_text(bare)
    chats = ChatEncoder(PromptEncoder(tmp_path), tmp_path)
    assert chats._tokenizer.decode(chats.prompt(chat[:1])).endswith("assistant\n<think>\n")
    with pytest.raises(EngineError, match=r"renders the last answer otherwise.*its thoughts included"):
        chats.answered(chat)


def test_a_rewritten_question_does_not_cut_the_chat_after_an_earlier_answer(
    make: Make, tmp_path: Path
) -> None:
    """It differs from its prompt right after the first answer, whose tokens are not the whole sample."""
    make("smollm2")
    (tmp_path / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m.content | upper if loop.index > 2 and loop.last else m.content }}"
        "{% if m.role == 'assistant' %}<|im_end|>{% endif %}{% endfor %}"
    )
    with pytest.raises(EngineError, match="renders the last answer otherwise"):
        ChatEncoder(PromptEncoder(tmp_path), tmp_path).answered(CHAT)


def test_a_prompt_may_not_end_differently_in_the_answered_chat(make: Make, tmp_path: Path) -> None:
    """A template that rewrites what was asked gives no target."""
    make("smollm2")
    (tmp_path / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m.content if loop.last else m.content | upper }}<|im_end|>{% endfor %}"
    )
    with pytest.raises(EngineError, match="renders the last answer otherwise"):
        ChatEncoder(PromptEncoder(tmp_path), tmp_path).answered(CHAT)


@pytest.mark.parametrize("messages", [[SYSTEM, CHAT[0], CHAT[1]], [CHAT[0], CHAT[0], CHAT[1]]])
def test_what_a_template_refuses_is_told(make: Make, messages: list[dict[str, Any]]) -> None:
    """In its own words."""
    with pytest.raises(TemplateError, match=r"System role not supported|roles must alternate"):
        make("gemma").answered(messages)


@pytest.mark.parametrize("family", ["llama3", "qwen2_5", "smollm2", "gemma", "phi3", "mistral"])
def test_a_written_answer_becomes_the_message_that_renders_to_it(make: Make, family: str) -> None:
    """So the next turn's prompt holds exactly the tokens that the target wrote."""
    chats = make(family)
    encoded = chats.answered(CHAT[:2])
    start, stop = encoded.spans[0]
    message = chats.message(encoded.ids[start:stop], encoded.ids[:start])
    assert message == CHAT[1]
    assert chats.prompt([CHAT[0], message, CHAT[2]])[:stop] == encoded.ids


def test_an_answer_in_channels_becomes_the_message_that_its_template_takes(make: Make) -> None:
    """gpt-oss: the final message, whose thoughts the next turn drops; one without a final message is none."""
    chats = make("gptoss")
    prompt = chats.prompt(CHAT[:1])
    final = "<|channel|>final<|message|>a wheel<|return|>"
    thought = chats._encoder.ids(f"<|channel|>analysis<|message|>let me see<|end|><|start|>assistant{final}")
    message = chats.message(thought, prompt)
    assert message == {"role": "assistant", "content": "a wheel", "thinking": "let me see"}
    plain = chats.message(chats._encoder.ids(final), prompt)
    assert plain == {"role": "assistant", "content": "a wheel"}
    following = chats.prompt([CHAT[0], message, CHAT[2]])
    assert following == chats.prompt([CHAT[0], plain, CHAT[2]])
    assert "let me see" not in chats._tokenizer.decode(following)
    written = Written((*prompt, *chats._encoder.ids(final)), len(prompt))
    [(start, stop)] = exact_spans([written], following)
    assert chats._tokenizer.decode(following[start:stop]) == final.removesuffix("<|return|>")
    [(start, stop)] = exact_spans([Written((*prompt, *thought), len(prompt))], following)
    assert chats._tokenizer.decode(following[start:stop]) == "<|channel|>"
    call = "<|channel|>commentary to=functions.look <|constrain|>json<|message|>{}<|call|>"
    for text in (call, "<|channel|>analysis<|message|>let me"):
        with pytest.raises(ValueError, match="no final message"):
            chats.message(chats._encoder.ids(text), prompt)


@pytest.mark.parametrize("template", ["", "llama3_training"])
def test_an_answer_of_weight_0_is_context(make: Make, template: str) -> None:
    """As in OpenAI's files; the others are learnt."""
    chats = make("llama3", template)
    weighted = [CHAT[0], {**CHAT[1], "weight": 0}, CHAT[2], {**CHAT[3], "weight": 1}]
    assert targets(chats, weighted) == ["until one lets go<|eot_id|>"]
    assert chats.answered(weighted).ids == chats.answered(CHAT).ids


def test_a_chat_has_the_tokens_of_the_runs_own_date(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whenever it is rendered, and in the process that renders for a run."""
    make("gptoss")
    monkeypatch.undo()
    chats = ChatEncoder(PromptEncoder(tmp_path, date="2026-01-02T03:04:05+00:00"), tmp_path)
    assert "Current date: 2026-01-02" in chats._tokenizer.decode(chats.answered(CHAT).ids)


def test_a_target_without_a_chat_template_cannot_be_given_a_chat(make: Make, tmp_path: Path) -> None:
    """It is told what to add."""
    make("llama3")
    (tmp_path / "chat_template.jinja").unlink()
    with pytest.raises(EngineError, match=r"has no chat template.*Next: add chat_template.jinja"):
        ChatEncoder(PromptEncoder(tmp_path), tmp_path).prompt(CHAT[:1])
