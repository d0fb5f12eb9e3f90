"""How engines and draft formats number the target's states. No torch.

Paceline's own number k is the state after k decoder blocks: 0 is the first block's input, and N, the number
of blocks, is the last block's output before the final norm. A format either counts in the same way, or it
names the block that the state comes out of, from 0 on, which is one less. The two look alike and differ by
one block, and no server notices the wrong one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from paceline.errors import ConfigError


@dataclass(frozen=True)
class LayerIds:
    """One format's numbering.

    `field`: where the format keeps its ids, with dots between nested keys. `offset`: its id less Paceline's
    number. `least`: the smallest of Paceline's numbers that it can express. `short_of_last`: the largest one
    is N - `short_of_last`.
    """

    field: str
    offset: int = 0
    least: int = 0
    short_of_last: int = 0

    def written(self, layers: Sequence[int], num_hidden_layers: int) -> list[int]:
        """The format's ids of the states after `layers` blocks, in the same order.

        Raises ConfigError for layers that the format cannot express, or that do not ascend: servers sort and
        de-duplicate the ids, and a draft's columns would then belong to other layers.
        """
        most = num_hidden_layers - self.short_of_last
        wrong = [layer for layer in layers if not self.least <= layer <= most]
        if wrong:
            raise ConfigError(
                f"The state after {wrong[0]} of {num_hidden_layers} blocks cannot be named in {self.field}, "
                f"which reaches from {self.least} to {most}.",
                why="The server would leave it out, or take another state, and say nothing.",
                next=f"choose layers from {self.least} to {most}.",
            )
        if any(later <= earlier for earlier, later in pairwise(layers)):
            raise ConfigError(
                f"The layers {list(layers)} do not ascend.",
                why=f"Servers sort the ids in {self.field}, so the states would change places.",
                next="name each layer once, in ascending order.",
            )
        return [layer + self.offset for layer in layers]

    def read(self, ids: Sequence[int]) -> tuple[int, ...]:
        """Paceline's numbers of the format's `ids`."""
        return tuple(layer - self.offset for layer in ids)


EAGLE_IDS = "eagle_aux_hidden_state_layer_ids"

# By format. SGLang leaves out the last block's output, whatever method asks for it.
LAYER_IDS = {
    "vllm.extract_hidden_states": LayerIds(f"draft_model_config.hf_config.{EAGLE_IDS}"),
    "vllm.eagle3": LayerIds(EAGLE_IDS),
    "speculators.eagle3": LayerIds(EAGLE_IDS),
    "speculators.dflash": LayerIds("aux_hidden_state_layer_ids"),
    "speculators.dspark": LayerIds("aux_hidden_state_layer_ids"),
    "sglang.eagle3": LayerIds(f"eagle_config.{EAGLE_IDS}", offset=-1, least=1, short_of_last=1),
    "dflash": LayerIds("dflash_config.target_layer_ids", offset=-1, least=1, short_of_last=1),
    "dspark": LayerIds("target_layer_ids", offset=-1, least=1, short_of_last=1),
}
