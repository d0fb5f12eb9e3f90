"""The answers that a run's prompts were first given: kept before a commit, given to a lost sample again.

A committed sample keeps its tokens when it is captured again, whatever the engine would write. Until a
sample is committed nothing depends on its answer, and settings or target may still change: a kept answer is
used then only if the same conditions would decide it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import msgspec

from paceline.capture.encoding import EncodedPrompt, rendering_of
from paceline.capture.settings import CaptureSettings
from paceline.data.answers import Answer, AnswerFiles
from paceline.engines.engine import Captured
from paceline.errors import ConfigError, EngineError
from paceline.target.facts import TargetFacts
from paceline.types import Feature, Tokens, name_of


@dataclass(frozen=True)
class CapturedPrompt:
    """A sample, and the prompt as the target was asked at last: of a chat, with its earlier answers."""

    prompt: EncodedPrompt
    sample: Captured


class FirstAnswers:
    def __init__(self, files: AnswerFiles, settings: CaptureSettings, facts: TargetFacts) -> None:
        self._files = files
        self._settings = settings
        self._facts = facts

    def of(self, prompt: EncodedPrompt, *, is_lost: bool) -> EncodedPrompt | None:
        """The prompt with its kept answer; None if none is kept, or none that it would have today.

        `is_lost`: its sample was committed before, so it must have that answer. Raises ConfigError if the
        lost sample was captured of other token ids than the prompt's.
        """
        answer = self._files.get(prompt.ordinal, anew=is_lost)
        if answer is None:
            return None
        has_same_ids = answer.prompt == rendering_of([prompt])
        if is_lost and not has_same_ids:
            raise other_rendering(prompt.task_id)
        if not is_lost and not (has_same_ids and self._would_be(answer, prompt)):
            return None
        kept = replace(prompt, token_ids=answer.token_ids, spans=answer.spans, turns=answer.turns)
        return replace(kept, is_whole=True, is_kept=True, chat=None)

    def changed(
        self, lost: Sequence[EncodedPrompt], captured: Sequence[CapturedPrompt]
    ) -> list[EncodedPrompt]:
        """The lost prompts that came back with another answer than they had, with the one they had."""
        by_id = {one.prompt.task_id: one for one in captured}
        changed = []
        for prompt in lost:
            kept = None if prompt.is_kept else self.of(prompt, is_lost=True)
            if kept is None:
                continue
            new = self._answer(prompt, by_id[prompt.task_id])
            if (new.token_ids, new.spans, new.turns) != (kept.token_ids, kept.spans, kept.turns):
                changed.append(kept)
        return changed

    def keep(
        self,
        wanted: Sequence[EncodedPrompt],
        captured: Sequence[CapturedPrompt],
        refuse_if_replaced: Callable[[], None],
        generations: Mapping[str, int],
    ) -> None:
        """Write the answers to disk. Raises EngineError if given tokens came back as others.

        A producer that was replaced must not write after its successor: `refuse_if_replaced` raises then.
        `generations`: of the captures, by sample id.
        """
        by_id = {prompt.task_id: prompt for prompt in wanted}
        new = []
        for one in captured:
            asked, answer = one.prompt, self._answer(by_id[one.prompt.task_id], one)
            ids, given = answer.token_ids, len(asked.token_ids)
            if ids[:given] != asked.token_ids or (asked.is_whole and len(ids) > given):
                raise _other_tokens(asked.task_id)
            kept = self._files.get(answer.ordinal) if asked.is_kept else None
            conditions = answer.conditions if kept is None else kept.conditions
            generation = generations[one.sample.sample_id]
            new.append(msgspec.structs.replace(answer, generation=generation, conditions=conditions))
        self._files.keep(new, refuse_if_replaced)

    def _answer(self, prompt: EncodedPrompt, captured: CapturedPrompt) -> Answer:
        asked, ids = captured.prompt, token_ids(captured.sample, self._settings.features)
        spans = asked.spans if asked.is_whole else (*asked.spans, (len(asked.token_ids), len(ids)))
        source, conditions = rendering_of([prompt]), self._conditions(prompt)
        return Answer(prompt.ordinal, prompt.task_id, ids, spans, source, asked.turns, conditions)

    def _would_be(self, answer: Answer, prompt: EncodedPrompt) -> bool:
        """Whether nothing that decides the answer has changed; of a chat's later turns nothing is known."""
        return prompt.chat is None and answer.conditions == self._conditions(prompt)

    def _conditions(self, prompt: EncodedPrompt) -> str:
        """Digest of what decides an answer beside the prompt's token ids."""
        s, facts = self._settings, self._facts
        target = [facts.model_version, facts.tokenizer_version, facts.dtype]
        whole = [*target, s.temperature_in(prompt.round), s.seed, s.max_answer_tokens]
        return hashlib.sha256(json.dumps(whole).encode()).hexdigest()[:16]


def token_ids(sample: Captured, features: Sequence[Feature]) -> tuple[int, ...]:
    tokens: Any = sample.tensors[name_of(Tokens, features)]
    return tuple(int(token) for token in tokens.tolist())


def other_rendering(which: str) -> ConfigError:
    return ConfigError(
        f"The prompts of {which} now have other token ids than the run captured.",
        why="The chat template (perhaps one that writes the date), the tokenizer or their libraries have "
        "changed; the draft would be trained on two renderings of its prompts. Nothing was captured.",
        next="restore the target's template and tokenizer and the earlier transformers and tokenizers, or "
        "set a new run.name and run.directory.",
    )


def _other_tokens(task_id: str) -> EngineError:
    return EngineError(
        f"The engine was asked to prefill the tokens of {task_id}, and returned other tokens.",
        why="The captured states must belong to the tokens that are trained on. Nothing was committed.",
        next="report this with the engine's name and version; another engine can go on with the run.",
    )
