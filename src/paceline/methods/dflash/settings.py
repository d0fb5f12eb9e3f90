"""The sections of the block methods: one backbone (DFlash), and a head by the method's name. No torch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from paceline.errors import ConfigError
from paceline.methods.dflash.start_config import read_block_start
from paceline.methods.features import AuxLayers, Transfer, fused_states, readable_layers
from paceline.methods.losses.settings import LossSection, loss_bytes
from paceline.methods.settings import MicroBatch
from paceline.methods.start.section import StartSection
from paceline.section import Count, Fraction, Section, StartingValue
from paceline.target.facts import TargetFacts
from paceline.target.shape import LayerSizes, layer_parameters
from paceline.types import Feature

# How many guesses go through the output layer at a time: 300 MB of bfloat16 logits of 150,000 tokens.
GROUP_GUESSES = 1 << 10


class WeightingSection(Section):
    """`method.weighting: NAME`, or a mapping with `name`: how much each depth k = 1, 2, ... counts in the
    loss.

    - `decay`: exp(-(k - 1) / `gamma`) (arXiv 2602.06036).
    - `dpace`: the expected number of guesses that are kept from depth k on, where a guess is kept with the
      draft's probability q of the target's likeliest token, smoothed to (1 - `alpha`) q + `alpha`
      (arXiv 2605.18810). The weights follow the draft as it learns and carry no gradient.
    """

    name: Literal["decay", "dpace"] = "decay"
    gamma: Annotated[float, Field(gt=0.0)] = 4.0
    alpha: Fraction = 0.5

    @model_validator(mode="before")
    @classmethod
    def _named(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _what_is_set_is_read(self) -> WeightingSection:
        other, owner = ("alpha", "dpace") if self.name == "decay" else ("gamma", "decay")
        # A recorded run file names the defaults, too.
        if getattr(self, other) != type(self).model_fields[other].default:
            raise ValueError(f"{other} belongs to the weighting {owner}; {self.name} does not read it")
        return self


class BlockSection(StartSection):
    """What the block methods share; a subclass names its head as "module:class" in `head`.

    `block_size`: tokens of a block, the newest token of the text included. `layers` decoder layers read
    `target_states` of the target's states, spread over its depth, or instead those that `aux_layers` names,
    each as the number of the target's decoder blocks before it, in ascending order. `mask_token_id`: the
    token whose embedding stands for an unknown one, by default the vocabulary's last. `causal`: a place of a
    block attends to none after it. `anchors_max`: of a sample with more possible blocks this many are
    trained, others at every visit (visits.py).

    `init`: "regression" (closed form, from the run's first samples; see warm_start.py) or "random".

    `start_from` (see `StartSection`): weights and shape come from the folder. A setting of the shape that is
    given beside it must be the folder's.

    `feature_noise`: in training, the states that the draft reads carry Gaussian noise of this share of their
    size, new at every visit (visits.py).

    `transfer`: how the states that the draft reads go from producer to trainer: as the target computes them,
    or as float8 with a scale for each token and layer (docs/training.md).

    `recompute`: backward computes the logits again, to the same bits, instead of keeping them.

    `attention`: in training. "auto" takes one kernel on a GPU, which torch compiles in the first step, and
    tiles on processors. "tiles" takes tiles there, too: slower, but nothing is compiled, and every GPU has
    room for it.
    """

    component: ClassVar[str] = "paceline.methods.dflash.method:DFlashMethod"
    head: ClassVar[str]
    changeable: ClassVar[tuple[str, ...]] = ("recompute", "attention")
    block_size: Annotated[int, Field(ge=2, le=32)] = 8
    layers: Count = 2
    target_states: Count = 5
    aux_layers: AuxLayers | None = None
    mask_token_id: Annotated[int, Field(ge=0)] | None = None
    causal: bool = False
    anchors_max: Count = 64
    loss: LossSection = LossSection()
    weighting: WeightingSection = WeightingSection()
    init: Literal["regression", "random"] = "regression"
    feature_noise: Annotated[float, Field(ge=0.0)] = 0.0
    transfer: Transfer = "exact"
    recompute: bool = False
    attention: Literal["auto", "tiles"] = "auto"

    @property
    def compiles(self) -> bool:
        return self.attention == "auto"

    @classmethod
    def starting_values(cls, target: LayerSizes, *, large: bool) -> list[StartingValue]:
        states = min(5, max(1, target.num_hidden_layers - 3))
        return [
            ("block_size", 16 if large else 8, "tokens that one pass guesses"),
            ("layers", 5 if large else 2, ""),
            ("target_states", states, "of the target's layers, spread over its depth"),
        ]

    def refuse_start(self, folder: Path) -> None:
        read_block_start(folder, self.name).applied(self)

    def features(self, target: TargetFacts) -> tuple[Feature, ...]:
        return fused_states(self.layers_of(target.num_hidden_layers), target, self.transfer)

    def layers_of(self, num_hidden_layers: int) -> tuple[int, ...]:
        """The layers that are fused: those of `start_from`, the chosen ones, or the default ones.

        Raises ConfigError.
        """
        if self.start_from is not None:
            return read_block_start(self.start_from, self.name).layers_of(num_hidden_layers)
        if self.aux_layers is not None:
            return readable_layers(self.aux_layers, num_hidden_layers)
        return spread_layers(num_hidden_layers, self.target_states)

    @property
    def num_states(self) -> int:
        return self.target_states if self.aux_layers is None else len(self.aux_layers)

    @model_validator(mode="after")
    def _one_choice_of_states(self) -> BlockSection:
        if self.target_states not in (type(self).model_fields["target_states"].default, self.num_states):
            raise ValueError(f"target_states is {self.target_states}, and aux_layers names {self.num_states}")
        return self

    def num_parameters(self, target: LayerSizes) -> int | None:
        if self.start_from is not None:
            return None
        hidden = target.hidden_size
        layer = layer_parameters(target, hidden) + 2 * hidden + 2 * target.head_dim
        return (self.num_states * hidden + 2) * hidden + self.layers * layer + self.head_parameters(target)

    def rows_per_target(self, num_targets: float) -> float:
        return self.block_size * min(1.0, self.anchors_max / max(1.0, num_targets))

    def activation_bytes(self, target: LayerSizes, batch: MicroBatch) -> float:
        """Norms, and what is added up from layer to layer, are float32. Left out: what a head computes beside
        the layers, and `recompute`, which saves one group's logits."""
        hidden, inner = target.hidden_size, target.intermediate_size
        queries, keys = target.query_width, target.key_width
        anchors = min(batch.targets, self.anchors_max * batch.samples)
        place = (16 + self.convolved) * hidden + 8 * queries + 8 * keys
        place += batch.width * (5 * hidden + 4 * inner + 3 * queries + 4 * keys)
        row = 8 * hidden + batch.width * (self.num_states + 1) * hidden
        row += self.layers * (8 * keys + 4 * batch.width * keys)
        guesses = min(anchors * self.depths, GROUP_GUESSES)
        logits = loss_bytes(target.vocab_size, guesses, min(guesses, batch.targets), batch.width)
        return anchors * self.block_size * self.layers * place + batch.rows * row + logits

    @property
    def convolved(self) -> int:
        """Bytes that the head keeps of each number of a layer's states, at every place."""
        return 0

    def head_parameters(self, target: LayerSizes) -> int:  # noqa: ARG002
        """Of what the head adds to the backbone."""
        return 0

    @property
    def from_anchor(self) -> bool:
        """Whether the block's first place, which holds the newest token, guesses the token after it."""
        return False

    @property
    def depths(self) -> int:
        """How many tokens a block guesses."""
        return self.block_size if self.from_anchor else self.block_size - 1


class DFlashSection(BlockSection):
    """DFlash (arXiv 2602.06036): the guesses of a block do not depend on each other."""

    head: ClassVar[str] = "paceline.methods.dflash.heads.head:Head"
    name: Literal["dflash"] = "dflash"


class DSparkSection(BlockSection):
    """DSpark (arXiv 2607.05147): a guess knows the token before it. See heads/dspark.py.

    `confidence_weight`: of the confidence head's term in the loss; 0: the draft has no confidence head.
    """

    head: ClassVar[str] = "paceline.methods.dflash.heads.dspark:DSparkHead"
    name: Literal["dspark"] = "dspark"
    sample_from_anchor: bool = True
    markov_rank: Count = 64
    confidence_weight: Annotated[float, Field(ge=0.0)] = 1.0

    @property
    def from_anchor(self) -> bool:
        return self.sample_from_anchor

    def head_parameters(self, target: LayerSizes) -> int:
        confidence = target.hidden_size + self.markov_rank + 1 if self.confidence_weight > 0 else 0
        return 2 * target.vocab_size * self.markov_rank + confidence


class DominoSection(BlockSection):
    """Domino (arXiv 2605.29707): a recurrent layer reads the tokens before a guess. See heads/domino.py.

    `base_weight`: of the loss of the backbone's own logits, beside that of the corrected ones.
    """

    head: ClassVar[str] = "paceline.methods.dflash.heads.domino:DominoHead"
    name: Literal["domino"] = "domino"
    gru_hidden_dim: Count = 256
    emb_dim: Count = 64
    base_weight: Annotated[float, Field(ge=0.0)] = 0.5

    def head_parameters(self, target: LayerSizes) -> int:
        width = self.gru_hidden_dim
        recurrent = 3 * width * (target.hidden_size + width)
        return recurrent + (target.hidden_size + width + target.vocab_size) * self.emb_dim


class DFlash2Section(BlockSection):
    """DFlash 2: convolutions over a block, and a selector among likely tokens. See heads/dflash2.py.

    `selector_weight`: of the selector's term in the loss.
    """

    head: ClassVar[str] = "paceline.methods.dflash.heads.dflash2:DFlash2Head"
    name: Literal["dflash2"] = "dflash2"
    conv_kernel_size: Annotated[int, Field(ge=1, le=8)] = 2
    conv_group_size: Count = 16
    selector_rank: Count = 64
    selector_top_k: Annotated[int, Field(ge=2)] = 16
    selector_weight: Annotated[float, Field(gt=0.0)] = 1.0

    @property
    def convolved(self) -> int:
        return 20 * self.conv_kernel_size

    def head_parameters(self, target: LayerSizes) -> int:
        hidden, taps = target.hidden_size, self.conv_kernel_size
        convolution = 2 * taps * hidden + hidden * 2 * taps * (hidden // self.conv_group_size)
        selector = (2 * target.vocab_size + hidden) * self.selector_rank
        return 2 * self.layers * convolution + selector


def spread_layers(num_hidden_layers: int, count: int) -> tuple[int, ...]:
    """`count` states spread evenly from that after 2 decoder blocks to that after N - 2 (arXiv 2602.06036).

    Raises ConfigError for a target that has fewer states there.
    """
    first, last = 2, num_hidden_layers - 2
    if last - first + 1 < count:
        raise ConfigError(
            f"The target has {num_hidden_layers} decoder blocks, and method.target_states is {count}.",
            why=f"The states are distinct ones after {first} to {last} of its decoder blocks.",
            next=f"set method.target_states to at most {max(1, last - first + 1)}.",
        )
    steps = max(1, count - 1)
    return tuple(first + round(step * (last - first) / steps) for step in range(count))
