"""Which tokens of a training sample's answer a draft guesses, by the sample's kept tokens."""

from __future__ import annotations

from paceline.config.run import RunConfig
from paceline.data.answers import AnswerFiles
from paceline.errors import ConfigError
from paceline.evaluation.curve import shape
from paceline.evaluation.marked import MarkedAnswer, MarkedSample, drafted_places
from paceline.evaluation.speculative import follow_answer
from paceline.roles.measured_draft import MeasuredDraft, draft_ways
from paceline.terminal import printable


def marked_sample(config: RunConfig, measured: MeasuredDraft, checkpoint: str, ordinal: int) -> MarkedSample:
    """By the run file's tree, or its chain. `checkpoint`: the name of the draft's.

    Raises ConfigError if the run keeps no tokens of the sample, or the target has too few positions for it.
    """
    kept = AnswerFiles(config.run.directory / "answers").get(ordinal)
    if kept is None or not kept.spans:
        raise ConfigError(
            f"The run keeps no answer of prompt {ordinal}.",
            why="What a draft guesses of a sample follows from the sample's tokens.",
            next="choose another sample: paceline inspect RUN --step N lists those of a step.",
        )
    way = draft_ways(config, measured)[0]
    drafted: list[tuple[int, int]] = []
    accepted: list[int] = []
    for start, stop in kept.spans:  # of a chat, every answer
        ids = kept.token_ids
        cycles = follow_answer(measured.target, way.drafter, ids[:start], ids[start:stop], way.drafting)
        drafted += drafted_places(cycles, start, stop)
        accepted += cycles
    return MarkedSample(
        ordinal=ordinal,
        step=measured.step,
        checkpoint=checkpoint,
        guesses=shape({"branching": way.drafting.branching, "num_draft_tokens": way.drafting.num_tokens}),
        answer=MarkedAnswer(
            prompt_id=printable(kept.task_id),
            token_ids=kept.token_ids,
            prompt_tokens=kept.spans[0][0],
            drafted=tuple(drafted),
            accepted=sum(accepted),
            cycles=len(accepted),
        ),
    )
