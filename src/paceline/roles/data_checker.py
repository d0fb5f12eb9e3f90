"""The process of `paceline data check --target`: reads a CheckRequest, writes a CheckResult, both as JSON.

It encodes samples with the settings of the run, exactly as a producer would, so the masks that it shows are
those that would be trained.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from functools import cached_property
from time import monotonic
from typing import Any, cast

from paceline.capture.encoding import EncodedPrompt, Encoding
from paceline.capture.first_answers import token_ids
from paceline.capture.settings import CaptureSection, CaptureSettings
from paceline.capture.sizing import largest_sample_bytes
from paceline.capture.turns import TurnError, TurnWriter
from paceline.data.kept import KeptAnswers
from paceline.data.opening import Data, open_data
from paceline.data.prompts import Prompt
from paceline.engines.engine import CaptureRequest, TargetEngine
from paceline.engines.transformers import TransformersEngine
from paceline.methods.table import METHODS
from paceline.precision import resolve_device, torch_dtype
from paceline.roles.committed import committed_in
from paceline.roles.data_check import (
    LOOKED_AT_MAX,
    SAMPLES_SHOWN,
    CheckRequest,
    CheckResult,
    Part,
    Problem,
    ShownSample,
)
from paceline.roles.question import answer
from paceline.target.chat import Ids
from paceline.target.chat_encoder import ChatEncoder
from paceline.target.facts import TargetFacts
from paceline.target.hub import local_target
from paceline.target.model import library_config, text_config
from paceline.target.settings import TargetSection
from paceline.target.tokenizer import PromptEncoder
from paceline.types import Feature, Tokens

TOKENS_SHOWN = 400
PLACES_NAMED = 3
GROUP_SIZE = 4  # samples of the group that is measured


class Reading:
    """What an encoding needs of an engine, without the target's weights."""

    def __init__(self, target: TargetSection) -> None:
        self._target = target
        text = text_config(library_config(target.model))  # a family's defaults stand in no file
        dtype = str(torch_dtype(target.dtype, resolve_device("auto"))).removeprefix("torch.")
        positions = getattr(text, "max_position_embeddings", None)
        self.facts = TargetFacts.by_sizes(text, dtype, max_positions=positions)
        self.encoder = PromptEncoder.of(target)
        self.encode = self.encoder.encode

    @cached_property
    def chats(self) -> ChatEncoder:
        return ChatEncoder(self.encoder, self._target.model)


def check(request: CheckRequest) -> CheckResult:
    target = local_target(request.target)
    reading = Reading(target)
    method = METHODS.find(str(request.method.get("name"))).parse(request.method).build()
    features = method.features(reading.facts)
    settings = CaptureSettings.of(CaptureSection(), request.data, features=features)
    encoding = Encoding(cast(TargetEngine, reading), settings)
    data = _opened(request)
    if settings.too_long == "refuse":
        encoding.look_for_long(data)  # raises what the run's start would
    prompts = list(_spread(data))
    usable = (prompt for prompt in prompts if not prompt.broken)
    encoded = [encoding.prompt(ordinal, prompt) for ordinal, prompt in enumerate(usable)]
    good = [prompt for prompt in encoded if not prompt.broken]
    seconds, measured = _measured(target, good, encoding, settings) if request.measure and good else (0.0, 0)
    sizes = [_sample_bytes(features, reading.facts, prompt, settings) for prompt in good]
    return CheckResult(
        num_samples=data.size * len(good) // max(1, len(prompts)),
        lengths=tuple(len(prompt.token_ids) for prompt in good),
        num_targets=sum(stop - start for prompt in good for start, stop in prompt.spans),
        samples=tuple(_shown(prompt, reading.encoder.tokenizer) for prompt in good[:SAMPLES_SHOWN]),
        problems=tuple(_problems(encoded)),
        sample_bytes=sum(sizes) / max(1, len(sizes)),
        dtype=reading.facts.dtype,
        group_seconds=seconds,
        group_samples=measured,
    )


def _opened(request: CheckRequest) -> Data | KeptAnswers:
    if request.data.other_run is not None:
        return KeptAnswers(request.data.other_run, committed_in(request.data.other_run))
    return open_data(request.data.sources, seed=request.seed)


def _spread(data: Data | KeptAnswers) -> Iterator[Prompt]:
    """The prompts of a round, or some spread evenly over it if there are more than are looked at."""
    step = max(1, data.size // LOOKED_AT_MAX)
    for ordinal in range(0, data.size, step):
        yield from data.read(ordinal, 1)


def _problems(encoded: Sequence[EncodedPrompt]) -> list[Problem]:
    """Reasons without the particulars of a sample, the most frequent first."""
    found: dict[str, list[str]] = {}
    for prompt in encoded:
        if prompt.broken:
            reason = prompt.broken.partition(": ")[2] or prompt.broken
            words = "".join("N" if c.isdecimal() else c for c in reason[:200])
            kind = " ".join("N" if set(word) == {"N"} else word for word in words.split())
            found.setdefault(kind, []).append(prompt.broken)
    ordered = sorted(found.values(), key=len, reverse=True)
    return [
        Problem(reason=one[0].partition(": ")[2] or one[0], count=len(one), first=tuple(one[:PLACES_NAMED]))
        for one in ordered
    ]


def _shown(prompt: EncodedPrompt, tokenizer: Any) -> ShownSample:
    ids, parts, at = prompt.token_ids[:TOKENS_SHOWN], [], 0
    bounds = [(start, stop) for start, stop in prompt.spans if start < len(ids)]
    for start, stop in [*bounds, (len(ids), len(ids))]:
        for first, last, is_target in ((at, start, False), (start, min(stop, len(ids)), True)):
            if last > first:
                text = tokenizer.decode(list(ids[first:last]), clean_up_tokenization_spaces=False)
                parts.append(Part(text=str(text), is_target=is_target))
        at = stop
    return ShownSample(
        name=prompt.task_id,
        num_tokens=len(prompt.token_ids),
        parts=tuple(parts),
        rest=len(prompt.token_ids) - len(ids),
        is_open=not prompt.is_whole,
    )


def _sample_bytes(
    features: Sequence[Feature], facts: TargetFacts, prompt: EncodedPrompt, settings: CaptureSettings
) -> int:
    """What the sample takes at most; of an answer that is not written yet, the most that it may take."""
    targets = sum(stop - start for start, stop in prompt.spans)
    more = 0 if prompt.is_whole else settings.max_answer_tokens
    return largest_sample_bytes(
        features, facts.hidden_size, num_tokens=len(prompt.token_ids) + more, num_targets=targets + more
    )


def _measured(
    target: TargetSection, prompts: Sequence[EncodedPrompt], encoding: Encoding, settings: CaptureSettings
) -> tuple[float, int]:
    """Seconds that the target takes for a group of samples spread over these, and their number.

    The answers of chats are written turn by turn, as in a run. Chats that cannot go on so are not measured.
    """
    engine = TransformersEngine(target.model, dtype=target.dtype, template=target.template)
    tokens = [feature for feature in settings.features if isinstance(feature.source, Tokens)]

    def ask(asked: Sequence[EncodedPrompt], turn: int) -> list[Ids]:  # noqa: ARG001 (a greedy answer needs no seed)
        captured = engine.capture([_request(prompt, settings) for prompt in asked], tokens)
        whole = [token_ids(sample, tokens) for sample in captured]
        return [ids[len(prompt.token_ids) :] for ids, prompt in zip(whole, asked, strict=True)]

    writer = TurnWriter(lambda: engine.chats, encoding.limits, ask, settings.too_long)
    chosen = list(prompts[:: max(1, len(prompts) // GROUP_SIZE)][:GROUP_SIZE])
    engine.capture([_request(chosen[0], settings)], settings.features)  # a process's first call is slower
    while chosen:
        began_at = monotonic()
        try:
            asked = writer.write(chosen)
        except TurnError as error:
            chosen = [prompt for prompt in chosen if prompt.task_id not in error.reasons]
            continue
        engine.capture([_request(prompt, settings) for prompt in asked], settings.features)
        return monotonic() - began_at, len(asked)
    return 0.0, 0


def _request(prompt: EncodedPrompt, settings: CaptureSettings) -> CaptureRequest:
    most = 0 if prompt.is_whole else settings.max_answer_tokens
    return CaptureRequest(prompt.task_id, prompt.token_ids, prompt.spans, max_new_tokens=most)


def main() -> int:
    return answer(lambda request: check(CheckRequest.model_validate_json(request)).model_dump_json())


if __name__ == "__main__":
    sys.exit(main())
