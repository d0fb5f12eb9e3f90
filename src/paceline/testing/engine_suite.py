"""What every target engine must do. Subclass it, give `make`, and pytest runs the rest."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import replace

import torch

from paceline.engines.engine import CapturedSample, CaptureRequest, TargetEngine
from paceline.types import Rows


def requests(engine: TargetEngine, *, temperature: float = 0.0, seed: int = 0) -> list[CaptureRequest]:
    """Five prompts of different lengths."""
    prompts = ["a wheel", "the wind", "in line", "a", "one rider after another lets go"]
    return [
        CaptureRequest(f"s{i}", engine.encode(prompt), 10, temperature, seed=seed + i)
        for i, prompt in enumerate(prompts)
    ]


def equal(one: CapturedSample, other: CapturedSample) -> bool:
    return all(
        torch.equal(getattr(one, name), getattr(other, name))
        for name in ("input_ids", "loss_mask", "aux_hidden_states", "last_hidden_states")
    )


class EngineSuite(ABC):
    @abstractmethod
    def make(self) -> TargetEngine:
        """An engine over a tiny target."""

    def test_the_same_group_gives_the_same_bits(self) -> None:
        """Capture is a pure function of its group, in this engine and in a new one."""
        engine = self.make()
        for temperature in (0.0, 0.9):
            group = requests(engine, temperature=temperature)
            first, again, other = engine.capture(group), engine.capture(group), self.make().capture(group)
            assert all(equal(a, b) and equal(a, c) for a, b, c in zip(first, again, other, strict=True))

    def test_shapes_and_masks_are_exact(self) -> None:
        """Prompt plus answer less the last token; the mask is 1 exactly on processed answer tokens."""
        engine = self.make()
        facts, group = engine.facts, requests(engine)
        for request, sample in zip(group, engine.capture(group), strict=True):
            prompt, length = len(request.prompt_ids), sample.input_ids.shape[0]
            assert sample.sample_id == request.sample_id
            assert prompt <= length <= prompt + request.max_new_tokens - 1
            assert sample.input_ids[:prompt].tolist() == list(request.prompt_ids)
            assert sample.loss_mask.tolist() == [0] * prompt + [1] * (length - prompt)
            width = len(facts.aux_layer_ids) * facts.hidden_size
            assert sample.aux_hidden_states.shape == (length, width)
            assert sample.last_hidden_states.shape == (length, facts.hidden_size)
            assert str(sample.last_hidden_states.dtype) == f"torch.{facts.dtype}"
            assert torch.isfinite(sample.aux_hidden_states.float()).all()

    def test_only_the_rows_that_are_asked_for_are_kept(self) -> None:
        """Those that predict an answer token, bit for bit; nothing else changes."""
        engine = self.make()
        for name in ("last_hidden_states", "aux_hidden_states"):
            for temperature in (0.0, 0.9):
                group = requests(engine, temperature=temperature)
                fewer = [replace(request, rows={name: Rows.PREDICTED}) for request in group]
                # Requests of both kinds may be answered together.
                mixed = [*group[:2], *fewer[2:]]
                whole = engine.capture(group)
                for asked in (fewer, mixed):
                    for request, all_rows, got in zip(asked, whole, engine.capture(asked), strict=True):
                        wanted = getattr(all_rows, name)[request.first_row(name) :]
                        assert equal(got, replace(all_rows, **{name: wanted}))

    def test_sampling_depends_on_the_requests_own_seed(self) -> None:
        """Other seeds give other answers; a neighbour's seed changes nothing in one's own tokens."""
        engine = self.make()
        group = requests(engine, temperature=1.0)
        reseeded = [group[0], *requests(engine, temperature=1.0, seed=100)[1:]]
        one, other = engine.capture(group), engine.capture(reseeded)
        assert torch.equal(one[0].input_ids, other[0].input_ids)
        assert any(not torch.equal(a.input_ids, b.input_ids) for a, b in zip(one[1:], other[1:], strict=True))

    def test_an_empty_group_is_nothing(self) -> None:
        """No request, no sample, no error."""
        assert self.make().capture([]) == []

    def test_the_probe_passes_on_a_sound_engine(self) -> None:
        """It raises if captured states do not reproduce the model's own argmax."""
        self.make().probe()
