"""EAGLE-3's section of the run file. No torch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from paceline.errors import ConfigError
from paceline.methods.eagle3.start_config import WINDOW_MIN, read_start_config
from paceline.methods.features import AuxLayers, Transfer, fused_states, readable_layers
from paceline.methods.losses.settings import LossSection, loss_bytes
from paceline.methods.settings import MicroBatch
from paceline.methods.start.folder import refuse_other_settings
from paceline.methods.start.section import StartSection
from paceline.section import Count, StartingValue
from paceline.target.facts import TargetFacts
from paceline.target.shape import LayerSizes, layer_parameters
from paceline.types import Feature

FUSED = 3  # states, by default
# How many logits of the draft vocabulary one group of anchors keeps for backward: 256 MiB of bfloat16.
GROUP_LOGITS = 1 << 27
TILE_ANCHORS = 128  # whose scores are there at a time


class Eagle3Section(StartSection):
    """`first_samples`: how many samples choose the draft vocabulary and, by regression, the first weights.

    `loss`: see `LossSection`.

    `init`: "regression" (closed form, from the run's first samples), "target" (weights of the target's
    last layer) or "random".

    `train_lm_head`: false keeps the target's rows (or the folder's), whose gradient is then not computed.

    `aux_layers`: the states that the draft reads, each as the number of the target's decoder blocks before
    it, in ascending order; None: those that servers take where a draft names none.

    `start_from` (see `StartSection`): weights, sizes, vocabulary maps, fused layers and EAGLE-3.1's choices
    come from the folder. A setting of these that is given beside it must be the folder's.

    `feature_noise`: in training, the states that the draft reads carry Gaussian noise of this share of their
    size, new at every visit (visits.py).

    `transfer`: how the states that the draft reads go from producer to trainer: as the target computes them,
    or as float8 with a scale for each token and layer (docs/training.md).

    EAGLE-3.1's choices, each off by default; servers read them under the same names (docs/exports.md):
    `norm_before_fc` norms the fused target states as one vector, `fc_norm` each of them alone; `norm_output`
    feeds a step the output of the step before after the final norm, not before it; with `sliding_window` a
    row attends to itself and the `sliding_window` - 1 rows before it.

    `recompute`: backward computes every unrolled step's layer and logits again, to the same bits. Without
    it, each further step keeps, between forward and backward, what autograd keeps of a decoder layer, and
    one number per token of the draft vocabulary (at most 256 MiB of these). With it, each keeps 3H + 2 N_kv d
    numbers per anchor (hidden size H, N_kv key-value heads of size d). Neither grows with a sample's length.
    With SmolLM2-135M's sizes, 8,192 draft tokens and two anchors per three tokens that is 32 KiB per token
    without, and 2 KiB with it (benchmarks/training_step.py).
    """

    component: ClassVar[str] = "paceline.methods.eagle3.method:Eagle3Method"
    changeable: ClassVar[tuple[str, ...]] = ("recompute",)
    name: Literal["eagle3"] = "eagle3"
    draft_vocab_size: Count = 8192
    ttt_steps: Annotated[int, Field(ge=1, le=16)] = 4
    step_decay: Annotated[float, Field(gt=0.0, le=1.0)] = 0.8
    loss: LossSection = LossSection()
    init: Literal["regression", "target", "random"] = "regression"
    train_lm_head: bool = True
    aux_layers: AuxLayers | None = None
    feature_noise: Annotated[float, Field(ge=0.0)] = 0.0
    transfer: Transfer = "exact"
    norm_before_fc: bool = False
    fc_norm: bool = False
    norm_output: bool = False
    sliding_window: Annotated[int, Field(ge=WINDOW_MIN)] | None = None
    recompute: bool = False

    @classmethod
    def starting_values(cls, target: LayerSizes, *, large: bool) -> list[StartingValue]:
        vocab = min(target.vocab_size, 32_000 if large else 6_144)
        return [
            ("draft_vocab_size", vocab, "the likeliest tokens of the first samples"),
            ("ttt_steps", 7 if large else 3, "guesses ahead that training unrolls"),
        ]

    @model_validator(mode="after")
    def _one_norm(self) -> Eagle3Section:
        if self.norm_before_fc and self.fc_norm:
            raise ValueError("norm_before_fc and fc_norm both norm what fc reads: choose one")
        return self

    def refuse_start(self, folder: Path) -> None:
        read_start_config(folder, self.name).refuse_other_settings(self)

    def features(self, target: TargetFacts) -> tuple[Feature, ...]:
        return fused_states(self.layers_of(target.num_hidden_layers), target, self.transfer)

    def layers_of(self, num_hidden_layers: int) -> tuple[int, ...]:
        """The layers that are fused: those of `start_from`, the chosen ones, or the default ones.

        Raises ConfigError.
        """
        if self.start_from is None and self.aux_layers is not None:
            return readable_layers(self.aux_layers, num_hidden_layers)
        if self.start_from is None:
            return aux_layer_ids(num_hidden_layers)
        start = read_start_config(self.start_from, self.name)
        layers = start.layers(num_hidden_layers) or aux_layer_ids(num_hidden_layers)
        refuse_other_settings(start.start, self, {"aux_layers": layers})
        return layers

    @property
    def _num_states(self) -> int:
        return FUSED if self.aux_layers is None else len(self.aux_layers)

    def num_parameters(self, target: LayerSizes) -> int | None:
        if self.start_from is not None:
            return None
        hidden, rows = target.hidden_size, min(self.draft_vocab_size, target.vocab_size)
        norms = 4 + self._num_states * (self.norm_before_fc or self.fc_norm)
        head = rows * hidden if self.train_lm_head else 0
        return (
            self._num_states * hidden * hidden + layer_parameters(target, 2 * hidden) + norms * hidden + head
        )

    def rows_per_target(self, num_targets: float) -> float:  # noqa: ARG002
        return float(self.ttt_steps)

    def activation_bytes(self, target: LayerSizes, batch: MicroBatch) -> float:
        """Norms, a tile's softmax and the gradients of keys are float32. Left out: judged anchors."""
        hidden, inner = target.hidden_size, target.intermediate_size
        queries, keys = target.query_width, target.key_width
        a_step = 20 * hidden + batch.width * (5 * hidden + 4 * inner + 2 * queries + 2 * keys)
        kept = batch.width * (3 * hidden + 2 * keys)
        steps = self.ttt_steps * kept + a_step if self.recompute else self.ttt_steps * a_step
        row = 12 * hidden + 16 * keys + batch.width * ((self._num_states + 3) * hidden + 4 * keys)
        vocab = min(self.draft_vocab_size, target.vocab_size)
        predictions = min(batch.targets * self.ttt_steps, GROUP_LOGITS / vocab)
        compared = predictions / self.ttt_steps
        logits = loss_bytes(vocab, predictions, compared, batch.width)
        tile = min(TILE_ANCHORS, batch.targets / batch.samples) * batch.rows / batch.samples
        scores = 12 * target.num_attention_heads * tile
        return batch.targets * steps + batch.rows * row + logits + scores


class PEagleSection(Eagle3Section):
    """P-EAGLE (arXiv 2602.01469): an EAGLE-3 draft that guesses all its tokens in one pass.

    Its steps after the first read one learned row in place of the guesses before them: the token
    `mask_token_id` (by default the target's first end-of-text token) and `mask_hidden`, which stands for the
    target's states. vLLM serves it; SGLang does not. It feeds nothing back (`norm_output`), and servers know
    `norm_before_fc` of it alone.
    """

    component: ClassVar[str] = "paceline.methods.eagle3.parallel:PEagleMethod"
    name: Literal["p-eagle"] = "p-eagle"  # type: ignore[assignment]
    ttt_steps: Annotated[int, Field(ge=2, le=16)] = 4
    mask_token_id: Annotated[int, Field(ge=0)] | None = None

    @model_validator(mode="after")
    def _what_parallel_drafts_lack(self) -> PEagleSection:
        for name in ("fc_norm", "norm_output"):
            if getattr(self, name):
                raise ValueError(f"{name} does not go with p-eagle")
        return self

    def num_parameters(self, target: LayerSizes) -> int | None:
        rest = super().num_parameters(target)
        return None if rest is None else rest + self._num_states * target.hidden_size  # mask_hidden


def aux_layer_ids(num_hidden_layers: int) -> tuple[int, ...]:
    """The default of vLLM and SGLang: the states after 2, N // 2 and N - 3 decoder blocks.

    Raises ConfigError for a target that has too few layers.
    """
    ids = (2, num_hidden_layers // 2, num_hidden_layers - 3)
    if not 0 < ids[0] < ids[1] < ids[2] < num_hidden_layers:
        raise ConfigError(
            f"The target has {num_hidden_layers} layers, so the layer ids {ids} are not three distinct ones.",
            why="EAGLE-3 reads an early, a middle and a late state.",
            next="choose a target with at least 7 layers, or name the states in method.aux_layers.",
        )
    return ids
