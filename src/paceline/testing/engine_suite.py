"""Conformance suite for target engines. Subclass it, define `make`, and pytest runs the rest."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import replace

import torch

from paceline.engines.engine import Captured, CaptureRequest, TargetEngine
from paceline.types import Feature, Rows, States, Targets, Tokens


def requests(engine: TargetEngine, *, temperature: float = 0.0, seed: int = 0) -> list[CaptureRequest]:
    """Five prompts of different lengths."""
    prompts = ["a wheel", "the wind", "in line", "a", "one rider after another lets go"]
    return [
        CaptureRequest(
            f"s{i}", engine.encode(prompt), max_new_tokens=10, temperature=temperature, seed=seed + i
        )
        for i, prompt in enumerate(prompts)
    ]


def features(engine: TargetEngine) -> tuple[Feature, ...]:
    """Tokens, targets, two states side by side of all rows, and the last state where it predicts."""
    last, dtype = engine.facts.num_hidden_layers, engine.facts.dtype
    return (
        Feature("tokens", Tokens(), dtype="int32"),
        Feature("targets", Targets(), dtype="uint8"),
        Feature("early", States((1, last // 2)), dtype=dtype),
        Feature("last", States((last,)), Rows.PREDICTED, dtype=dtype),
    )


def capture(engine: TargetEngine, group: list[CaptureRequest]) -> list[Captured]:
    return engine.capture(group, features(engine))


def equal(one: Captured, other: Captured) -> bool:
    same = one.sample_id == other.sample_id and one.tensors.keys() == other.tensors.keys()
    return same and all(torch.equal(tensor, other.tensors[name]) for name, tensor in one.tensors.items())


def known(sample: Captured, request: CaptureRequest) -> CaptureRequest:
    """A request for the very tokens of an answered one, its answer given."""
    tokens = tuple(sample.tensors["tokens"].tolist())
    spans = (*request.spans, (len(request.token_ids), len(tokens)))
    return replace(request, token_ids=tokens, spans=spans, max_new_tokens=0)


class EngineSuite(ABC):
    @abstractmethod
    def make(self) -> TargetEngine:
        """An engine over a tiny target."""

    def test_the_same_group_gives_the_same_bits(self) -> None:
        """Capture is a pure function of its group, in this engine and in a new one."""
        engine = self.make()
        for temperature in (0.0, 0.9):
            group = requests(engine, temperature=temperature)
            first, again, other = capture(engine, group), capture(engine, group), capture(self.make(), group)
            assert all(equal(a, b) and equal(a, c) for a, b, c in zip(first, again, other, strict=True))

    def test_shapes_and_targets_are_exact(self) -> None:
        """All tokens, the last of which has no state; a token is a target exactly if the answer has it."""
        engine = self.make()
        facts, group = engine.facts, requests(engine)
        for request, sample in zip(group, capture(engine, group), strict=True):
            tokens, prompt = sample.tensors["tokens"].tolist(), len(request.token_ids)
            assert sample.sample_id == request.sample_id
            assert list(sample.tensors) == [feature.name for feature in features(engine)]
            assert prompt < len(tokens) <= prompt + request.max_new_tokens
            assert tokens[:prompt] == list(request.token_ids)
            assert sample.tensors["targets"].tolist() == [0] * prompt + [1] * (len(tokens) - prompt)
            assert sample.tensors["early"].shape == (len(tokens) - 1, 2 * facts.hidden_size)
            assert sample.tensors["last"].shape == (len(tokens) - prompt, facts.hidden_size)
            assert str(sample.tensors["last"].dtype) == f"torch.{facts.dtype}"
            assert torch.isfinite(sample.tensors["early"].float()).all()

    def test_a_state_is_the_same_whatever_is_asked_for_beside_it(self) -> None:
        """Layers apart or side by side, all rows or those that predict: bit for bit the same states."""
        engine = self.make()
        dtype, last = engine.facts.dtype, engine.facts.num_hidden_layers
        tokens, targets, early, _ = features(engine)
        apart = [Feature(f"after {k}", States((k,)), dtype=dtype) for k in (1, last // 2, last)]
        for temperature in (0.0, 0.9):
            group = requests(engine, temperature=temperature)
            fewer = engine.capture(group, (tokens, targets, replace(early, rows=Rows.PREDICTED)))
            for request, one, other, few in zip(
                group, capture(engine, group), engine.capture(group, (tokens, *apart)), fewer, strict=True
            ):
                states = [other.tensors[feature.name] for feature in apart]
                first = len(request.token_ids) - 1  # predicts the first token of the answer
                assert torch.equal(one.tensors["early"], torch.cat(states[:2], dim=-1))
                assert torch.equal(one.tensors["last"], states[2][first:])
                assert torch.equal(few.tensors["early"], one.tensors["early"][first:])

    def test_given_answers_are_targets_and_their_states_are_kept(self) -> None:
        """A chat of several turns: each given answer is learnt, and the one that the target writes, too."""
        engine = self.make()
        [chat, *others] = requests(engine)
        chat = replace(chat, token_ids=chat.token_ids + others[-1].token_ids, spans=((2, 4), (6, 9)))
        given = len(chat.token_ids)
        sample = capture(engine, [chat, *others])[0]
        length = len(sample.tensors["tokens"])
        targets = [2, 3, 6, 7, 8, *range(given, length)]
        assert sample.tensors["targets"].nonzero()[:, 0].tolist() == targets
        whole = Feature("last", States((engine.facts.num_hidden_layers,)), dtype=engine.facts.dtype)
        states = engine.capture([chat, *others], (whole,))[0].tensors["last"]
        assert torch.equal(sample.tensors["last"], states[[place - 1 for place in targets]])

    def test_known_tokens_are_read_as_if_they_had_been_written(self) -> None:
        """With nothing to write, tokens and targets are the same and the states equal up to rounding."""
        engine = self.make()
        group = requests(engine)
        for request, sample in zip(group, answered := capture(engine, group), strict=True):
            assert equal_but_for_rounding(capture(engine, [known(sample, request)])[0], sample)
        mixed = [known(answered[0], group[0]), group[1], known(answered[2], group[2]), *group[3:]]
        for one, other in zip(capture(engine, mixed), answered, strict=True):
            assert equal_but_for_rounding(one, other)

    def test_sampling_depends_on_the_requests_own_seed(self) -> None:
        """Other seeds give other answers; a neighbour's seed changes nothing in one's own tokens."""
        engine = self.make()
        group = requests(engine, temperature=1.0)
        reseeded = [group[0], *requests(engine, temperature=1.0, seed=100)[1:]]
        one, other = (
            [sample.tensors["tokens"] for sample in capture(engine, asked)] for asked in (group, reseeded)
        )
        assert torch.equal(one[0], other[0])
        assert any(not torch.equal(a, b) for a, b in zip(one[1:], other[1:], strict=True))

    def test_an_empty_group_is_nothing(self) -> None:
        """No request, no sample, no error."""
        assert capture(self.make(), []) == []

    def test_the_probe_passes_on_a_sound_engine(self) -> None:
        """It raises if captured states do not reproduce the model's own argmax."""
        self.make().probe()


def equal_but_for_rounding(one: Captured, other: Captured) -> bool:
    exact = all(torch.equal(one.tensors[name], other.tensors[name]) for name in ("tokens", "targets"))
    return exact and all(
        one.tensors[name].shape == other.tensors[name].shape
        and torch.allclose(one.tensors[name], other.tensors[name], atol=1e-4, rtol=1e-4)
        for name in ("early", "last")
    )
