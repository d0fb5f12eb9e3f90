"""The target in this process: Hugging Face transformers, answering and capturing in one pass.

The states of the prompt come from the prefill and those of the answer from the decode steps that
write it, so nothing is computed twice. A group is a padded batch that keeps its shape until
every row is done, and sampling noise is drawn per request, so the result is a pure function of the
group: captured again with the same thread count it has the same bits. Only local folders and
safetensors are read; no code of the model folder is run.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel

from paceline.engines.attention import ATTENTION
from paceline.engines.cache import PreallocatedLayer, copy_cache
from paceline.engines.capture_rows import CaptureRows
from paceline.engines.engine import Captured, CaptureRequest
from paceline.engines.settings import TransformersSection
from paceline.errors import CaptureMismatchError, EngineError
from paceline.precision import resolve_device, torch_dtype
from paceline.target.facts import TargetFacts
from paceline.target.folder import eos_token_ids, read_config, read_generation_config
from paceline.target.model import load_whole, unusable
from paceline.target.settings import TargetSection
from paceline.target.tokenizer import PromptEncoder
from paceline.target.version import TargetVersion
from paceline.types import Feature, States

PREFILL_ROWS = 8
PROBE_TEXT = "Riders in a paceline take turns at the front."


class TransformersEngine:
    def __init__(
        self, model_folder: Path, *, dtype: str = "auto", device: str = "auto", date: str | None = None
    ) -> None:
        """Raises EngineError, with advice, if the folder holds no model that can be captured from.

        `date`: see `PromptEncoder`.
        """
        self._encoder = PromptEncoder(model_folder, date=date)
        self._device = resolve_device(device)
        self._model = load_whole(model_folder, torch_dtype(dtype, self._device), self._device, ATTENTION)
        _require_llama_layout(self._model, model_folder)
        self._layers = list(self._model.model.layers)
        self._facts = _facts(self._model, model_folder)

    @classmethod
    def of_run(
        cls, section: TransformersSection, target: TargetSection, *, date: str | None = None
    ) -> TransformersEngine:
        return cls(target.model, dtype=target.dtype, device=section.device, date=date)

    @property
    def facts(self) -> TargetFacts:
        return self._facts

    def encode(self, prompt: str) -> tuple[int, ...]:
        return self._encoder.encode(prompt)

    # -- capture ---------------------------------------------------------------------------

    @torch.inference_mode()
    def capture(self, group: Sequence[CaptureRequest], features: Sequence[Feature]) -> list[Captured]:
        """See `TargetEngine`. Raises EngineError naming the samples whose states are not finite."""
        if not group:
            return []
        rows = CaptureRows(group, features, self._facts, self._device)
        cache = self._empty_cache(len(group), rows.capacity)
        with _Hooks(self._layers, self._layers_of(features)) as states:
            hidden = self._prefill(rows, cache, states)
            while rows.are_open and (token_ids := rows.choose(self._model.lm_head(hidden))) is not None:
                positions = (rows.length - rows.padding)[:, None]
                mask = rows.mask[:, : rows.length + 1]
                hidden = self._forward(token_ids, mask, positions, cache)
                rows.keep(states.taken)
        return rows.samples()

    def _layers_of(self, features: Sequence[Feature]) -> set[int]:
        """Every layer whose state is asked for. Raises EngineError for one that the target has not."""
        asked = {
            k for feature in features if isinstance(feature.source, States) for k in feature.source.layers
        }
        wrong = sorted(k for k in asked if not 0 <= k <= self._facts.num_hidden_layers)
        if wrong:
            raise EngineError(
                f"The state after {wrong[0]} decoder blocks was asked for; the target has "
                f"{self._facts.num_hidden_layers}.",
                why="A method chooses its layers from the target's facts.",
                next="correct the layers in the method's features.",
            )
        return asked

    def _prefill(self, rows: CaptureRows, cache: DynamicCache, states: _Hooks) -> torch.Tensor:
        """Read what is known: what all rows begin with (the template's system prompt) once, then rows of
        like length together, so that little padding is computed.

        Returns the final hidden state of every row's last known token, [B, H].
        """
        shared, everyone = rows.shared, torch.arange(rows.count, device=self._device)
        first = self._empty_cache(1, shared)
        if shared:
            positions = torch.arange(shared, device=self._device)[None]
            self._forward(rows.known_ids[:1, :shared], rows.mask[:1, :shared], positions, first)
            rows.keep_shared(states.taken)
            copy_cache(first, cache, everyone, 0)
        hidden = torch.empty(
            rows.count, self._facts.hidden_size, dtype=self._model.dtype, device=self._device
        )
        for members, width in rows.by_length(PREFILL_ROWS):
            start = rows.length - width
            part = self._empty_cache(len(members), shared + width)
            if shared:
                copy_cache(first, part, torch.arange(len(members), device=self._device), 0)
            positions = torch.arange(start, rows.length, device=self._device) - rows.padding[members, None]
            mask = torch.cat([rows.mask[members, :shared], rows.mask[members, start : rows.length]], dim=1)
            own_ids = rows.known_ids[members, start : rows.length]
            hidden[members] = self._forward(own_ids, mask, positions, part)
            rows.keep_known(members, states.taken)
            copy_cache(part, cache, members, start, skip=shared)
        return hidden

    def _empty_cache(self, num_rows: int, capacity: int) -> DynamicCache:
        cache = DynamicCache(config=self._model.config)
        cache.layers[:] = [PreallocatedLayer(num_rows, capacity) for _ in self._layers]
        return cache

    def _forward(
        self, token_ids: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor, cache: DynamicCache
    ) -> torch.Tensor:
        """One forward of the decoder; the final hidden state of each row's last token, [B, H]."""
        output = self._model.model(
            input_ids=token_ids,
            attention_mask=mask,
            position_ids=positions.clamp(min=0),
            past_key_values=cache,
            use_cache=True,
        )
        hidden: torch.Tensor = output.last_hidden_state[:, -1]
        return hidden

    # -- probe -----------------------------------------------------------------------------

    @torch.inference_mode()
    def probe(self) -> None:
        ids = torch.tensor([self.encode(PROBE_TEXT)], device=self._device)
        last = self._facts.num_hidden_layers
        with _Hooks(self._layers, range(last + 1)) as states:
            output = self._model(input_ids=ids, output_hidden_states=True, use_cache=False)
        # The library's own last one is normed already; that one is judged by the logits it gives.
        same = all(torch.equal(states.taken[k], output.hidden_states[k]) for k in range(last))
        logits = self._model.lm_head(self._model.model.norm(states.taken[last]))[0].float()
        agreed = _argmax_agrees(logits, output.logits[0].float(), torch.finfo(self._model.dtype).eps)
        if not (same and agreed):
            raise CaptureMismatchError(
                "The captured states do not reproduce the model's own output "
                f"(layers {'as asked' if same else 'differ'}, argmax {'agrees' if agreed else 'differs'}).",
                why="A draft trained on them would imitate another model.",
                next="compare the installed transformers with constraints.txt, and check the model folder.",
            )


class _Hooks:
    """Keeps the states of the latest forward after each of `ids` blocks, [B, n, H] by layer id."""

    def __init__(self, layers: Sequence[torch.nn.Module], ids: Collection[int]) -> None:
        self._layers = layers
        self._ids = sorted(set(ids))
        self.taken: dict[int, torch.Tensor] = {}

    def __enter__(self) -> _Hooks:
        self._handles = [self._layers[k - 1].register_forward_hook(self._keep(k)) for k in self._ids if k]
        if 0 in self._ids:
            self._handles.append(self._layers[0].register_forward_pre_hook(self._keep_input))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _keep(self, layer_id: int) -> Callable[[torch.nn.Module, Any, Any], None]:
        def hook(_module: torch.nn.Module, _inputs: Any, output: Any) -> None:
            self.taken[layer_id] = output[0] if isinstance(output, tuple) else output

        return hook

    def _keep_input(self, _module: torch.nn.Module, inputs: Any) -> None:
        self.taken[0] = inputs[0]


def _require_llama_layout(model: PreTrainedModel, model_folder: Path) -> None:
    decoder = getattr(model, "model", None)
    if not (hasattr(model, "lm_head") and hasattr(decoder, "layers") and hasattr(decoder, "norm")):
        reason = f"{type(model).__name__} has no model.layers, model.norm and lm_head"
        raise unusable(model_folder, reason, "choose a decoder laid out as Llama is")


def _facts(model: PreTrainedModel, model_folder: Path) -> TargetFacts:
    config = model.config
    ends = eos_token_ids(read_config(model_folder), read_generation_config(model_folder))
    version = TargetVersion.of(model_folder)
    return TargetFacts(
        hidden_size=int(config.hidden_size),
        num_hidden_layers=int(config.num_hidden_layers),
        vocab_size=int(config.vocab_size),
        dtype=str(model.dtype).removeprefix("torch."),
        eos_token_ids=tuple(token for token in ends if token < int(config.vocab_size)),
        model_version=version.model,
        tokenizer_version=version.tokenizer,
        device=model.device.type,
        max_positions=getattr(config, "max_position_embeddings", None),
    )


def _argmax_agrees(logits: torch.Tensor, own: torch.Tensor, eps: float) -> bool:
    """Same argmax at every position, but for positions where the two best differ by rounding alone.

    `eps` is the relative rounding step of the type both were computed in.
    """
    best = own.topk(2, dim=-1).values
    close = best[:, 0] - best[:, 1] <= 3 * eps * best[:, 0].abs().clamp(min=1.0)
    return bool(((logits.argmax(-1) == own.argmax(-1)) | close).all())
