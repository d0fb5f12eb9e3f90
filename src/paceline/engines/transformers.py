"""The engine that runs the target in this process with Hugging Face transformers.

It answers and captures in one pass: the states of the prompt come from the prefill and those of the answer
from the decode steps that write it, so nothing is computed twice. A group is a padded batch that keeps its
shape until every row has finished, and sampling noise is drawn per request, so a second capture of the group
with the same thread count has the same bits. Only local folders and safetensors are read; no code of the
model folder is run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache

from paceline.engines.attention import ATTENTION
from paceline.engines.cache import PreallocatedLayer, copy_cache
from paceline.engines.capture_rows import CaptureRows
from paceline.engines.engine import Captured, CaptureRequest
from paceline.engines.families import Way, own_attention, way_of
from paceline.engines.hooks import Hooks
from paceline.engines.probe import TOKENS, Bounds, Plain, compare, compare_tokens
from paceline.engines.settings import EngineRun, TransformersSection
from paceline.errors import EngineError
from paceline.precision import resolve_device, torch_dtype
from paceline.target.chat_encoder import ChatEncoder
from paceline.target.decoder import Past, TextDecoder
from paceline.target.facts import TargetFacts
from paceline.target.folder import eos_token_ids, read_config, read_generation_config
from paceline.target.head import TargetHead
from paceline.target.model import text_config
from paceline.target.settings import TargetSection
from paceline.target.tokenizer import PromptEncoder
from paceline.target.version import TargetVersion
from paceline.types import Feature, States, Tokens, layers_of

# One common beginning, which capture may read once for all, and ends of different lengths.
PROBE_TEXTS = (
    "The wind turns.",
    "The wind turns a wheel, and every rider in line follows until one lets go.",
    "The wind turns at noon.",
)
PROBE_ANSWER = 8  # tokens
PROBE_BEYOND = 8  # tokens beyond a sliding window
PROBE_TOKENS_MAX = 2048  # a longer window is not probed, because it would take too long
EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")


class TransformersEngine:
    def __init__(
        self,
        model_folder: Path,
        *,
        dtype: str = "auto",
        device: str = "auto",
        date: str | None = None,
        template: Mapping[str, Any] | None = None,
    ) -> None:
        """Raises EngineError if the folder holds no model that this engine can capture from.

        `date` and `template` (its variables): see `PromptEncoder`.
        """
        self._encoder = PromptEncoder(model_folder, date=date, variables=template)
        self._folder, self._device = model_folder, resolve_device(device)
        attention = own_attention(read_config(model_folder))
        self._decoder = TextDecoder(model_folder, torch_dtype(dtype, self._device), self._device, attention)
        self._model, self._parts = self._decoder.model, self._decoder.parts
        self._way = way_of(self._decoder)
        self._facts = target_facts(
            self._decoder.config,
            model_folder,
            dtype=str(self._model.dtype).removeprefix("torch."),
            device=self._model.device.type,
        )

    @classmethod
    def of_run(
        cls, section: TransformersSection, target: TargetSection, run: EngineRun
    ) -> TransformersEngine:
        return cls(
            target.model, dtype=target.dtype, device=section.device, date=run.date, template=target.template
        )

    @property
    def facts(self) -> TargetFacts:
        return self._facts

    @property
    def chats(self) -> ChatEncoder:
        return ChatEncoder(self._encoder, self._folder)

    def encode(self, prompt: str) -> tuple[int, ...]:
        return self._encoder.encode(prompt)

    def close(self) -> None:
        """Nothing outlives this process."""

    # -- capture ---------------------------------------------------------------------------

    @torch.inference_mode()
    def capture(self, group: Sequence[CaptureRequest], features: Sequence[Feature]) -> list[Captured]:
        """See `TargetEngine`. Raises EngineError naming the samples whose states are not finite or zero."""
        if self._way == Way.ALONE:
            return [sample for request in group for sample in self._capture([request], features)]
        return self._capture(group, features) if group else []

    def _capture(self, group: Sequence[CaptureRequest], features: Sequence[Feature]) -> list[Captured]:
        own = self._way == Way.OWN
        rows = CaptureRows(group, features, self._facts, self._device, share_prefix=own)
        cache = self._empty_cache(len(group), rows.capacity, answers=True) if own else self._library_cache()
        with Hooks(self._parts.layers, self._layers_of(features)) as states:
            hidden = self._prefill(rows, cache, states) if own else self._prefill_whole(rows, cache, states)
            while rows.are_open and (token_ids := rows.choose(self._decoder.logits(hidden))) is not None:
                positions = (rows.length - rows.padding)[:, None]
                mask = rows.mask[:, : rows.length + 1]
                hidden = self._forward(token_ids, mask, positions, cache)
                rows.keep(states.taken)
        return rows.samples()

    def _layers_of(self, features: Sequence[Feature]) -> set[int]:
        """Every layer whose state is requested. Raises EngineError for a layer that the target lacks."""
        asked = layers_of(features)
        wrong = sorted(k for k in asked if not 0 <= k <= self._facts.num_hidden_layers)
        if wrong:
            raise EngineError(
                f"The state after {wrong[0]} decoder blocks was requested; the target has "
                f"{self._facts.num_hidden_layers}.",
                why="A method chooses its layers from the target's facts.",
                next="correct the layers in the method's features.",
            )
        return asked

    def _prefill(self, rows: CaptureRows, cache: DynamicCache, states: Hooks) -> torch.Tensor:
        """Prefill the known tokens: the shared prefix (the template's system prompt) once, then rows of
        similar length together, so that little padding is computed.

        Returns the final hidden state of every row's last known token, [B, H].
        """
        shared, first = rows.shared, self._empty_cache(1, rows.shared)
        if shared:
            own = slice(rows.parts[0][1], rows.parts[0][1] + shared)
            positions = torch.arange(shared, device=self._device)[None]
            self._forward(rows.known_ids[:1, own], rows.mask[:1, own], positions, first)
            rows.keep_shared(states.taken)
        hidden = torch.empty(
            rows.count, self._facts.hidden_size, dtype=self._model.dtype, device=self._device
        )
        for members, start in rows.parts:
            own, padding = slice(start + shared, rows.length), rows.padding[members, None]
            part = self._empty_cache(len(padding), rows.length - start)
            if shared:
                copy_cache(first, part, slice(None), 0)
            positions = torch.arange(own.start, own.stop, device=self._device) - padding
            mask = rows.mask[members, start : rows.length]
            hidden[members] = self._forward(rows.known_ids[members, own], mask, positions, part)
            rows.keep_known(members, states.taken)
            if rows.are_open:  # given answers are not gone on from
                copy_cache(part, cache, members, start)
        return hidden

    def _prefill_whole(self, rows: CaptureRows, cache: Any, states: Hooks) -> torch.Tensor:
        """As `_prefill`, but of all rows at once, with padding before each."""
        positions = torch.arange(rows.length, device=self._device) - rows.padding[:, None]
        hidden = self._forward(rows.known_ids, rows.mask[:, : rows.length], positions, cache)
        rows.keep_known(slice(None), states.taken)
        return hidden

    def _library_cache(self) -> Any:
        """An empty cache of the kind that the library uses for the family."""
        return self._decoder.past() if self._way == Way.ALONE else DynamicCache(config=self._decoder.config)

    def _empty_cache(self, num_rows: int, capacity: int, *, answers: bool = False) -> DynamicCache:
        """`answers`: it is read once for each token that the target writes."""
        cache, by_column = DynamicCache(config=self._decoder.config), answers and self._device.type == "cpu"
        cache.layers[:] = [
            PreallocatedLayer(num_rows, capacity, by_column=by_column) for _ in self._parts.layers
        ]
        return cache

    def _forward(
        self, token_ids: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor, cache: Any
    ) -> torch.Tensor:
        """One forward of the decoder; the final hidden state of each row's last token, [B, H]."""
        if isinstance(cache, Past):
            return self._decoder.read(token_ids, cache)[:, -1]
        output = self._parts.decoder(
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
        """See `TargetEngine`; probe.py says what is compared."""
        family, last = self._model.config.model_type, self._facts.num_hidden_layers
        head = TargetHead.load(self._folder)
        output = head.output().to(self._device)
        experts = any(getattr(self._decoder.config, name, None) for name in EXPERTS)
        bounds = Bounds.of(self._model.dtype, head.lm_head.dtype, experts=experts)
        dtype = self._facts.dtype
        features = [Feature(f"state {k}", States((k,)), dtype=dtype) for k in range(1, last + 1)]
        group = self._probe_group()
        try:
            samples = self.capture(group, (Feature(TOKENS, Tokens(), dtype="int32"), *features))
            compare(family, samples, self.plain, output, bounds)
        except (AttributeError, LookupError, TypeError, ValueError, RuntimeError) as error:
            raise EngineError(
                f"The target's family {family!r} cannot be captured from: {type(error).__name__}: {error}",
                why="The installed transformers does not run this target as capture needs it.",
                next="choose a target of another family (docs/targets.md lists those that are tested).",
            ) from error
        compare_tokens(family, samples, [len(request.token_ids) for request in group], output, last)

    def _probe_group(self) -> list[CaptureRequest]:
        """Prompts of different lengths, one longer than the sliding window if that is short enough."""
        answer, limit = PROBE_ANSWER, self._facts.max_positions or PROBE_TOKENS_MAX
        known = [self.encode(text) for text in PROBE_TEXTS]
        window = getattr(self._decoder.config, "sliding_window", None) or 0
        if 0 < window + PROBE_BEYOND <= min(limit - answer, PROBE_TOKENS_MAX):
            repeats = -(-(window + PROBE_BEYOND) // len(known[-1]))
            known.append((known[-1] * repeats)[: window + PROBE_BEYOND])
        known = [tokens[-(limit - answer) :] if len(tokens) + answer > limit else tokens for tokens in known]
        return [CaptureRequest(f"probe {i}", ids, max_new_tokens=answer) for i, ids in enumerate(known)]

    @torch.inference_mode()
    def plain(self, tokens: list[int]) -> Plain:
        """The model's own forward of these tokens alone, without a cache; another engine's reference.

        It uses the library's attention; for families on the engine's own attention, the library's eager one.
        """
        ids, layers = torch.tensor([tokens], device=self._device), self._parts.layers
        config, chosen = self._model.config, self._model.config._attn_implementation
        config._attn_implementation = "eager" if chosen == ATTENTION else chosen
        try:
            with Hooks(layers, range(len(layers) + 1)) as hooks:
                output = self._model(input_ids=ids, use_cache=False, output_hidden_states=True)
        finally:
            config._attn_implementation = chosen
        states, given = hooks.taken, output.hidden_states
        # Most families give the input of the first block, then the states between blocks, then a normed one.
        if given is not None and len(given) == len(states) and torch.equal(given[0], states[0]):
            states.update(enumerate(given[:-1]))
        del states[0]
        return Plain({k: state[0] for k, state in states.items()}, output.logits[0])


def target_facts(config: Any, model_folder: Path, *, dtype: str, device: str) -> TargetFacts:
    """The facts of the model in the folder. `config`: as the library reads it."""
    config = text_config(config)
    ends = eos_token_ids(read_config(model_folder), read_generation_config(model_folder))
    version = TargetVersion.of(model_folder)
    return TargetFacts(
        hidden_size=int(config.hidden_size),
        num_hidden_layers=int(config.num_hidden_layers),
        vocab_size=int(config.vocab_size),
        dtype=dtype,
        eos_token_ids=tuple(token for token in ends if token < int(config.vocab_size)),
        model_version=version.model,
        tokenizer_version=version.tokenizer,
        device=device,
        max_positions=getattr(config, "max_position_embeddings", None),
    )
