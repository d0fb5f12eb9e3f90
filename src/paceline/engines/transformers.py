"""The target in this process: Hugging Face transformers, answering and capturing in one pass.

The states of the prompt come from the prefill and those of the answer from the decode steps that
write it, so nothing is computed twice. A group is a left-padded batch that keeps its shape until
every row is done, and sampling noise is drawn per request, so the result is a pure function of the
group: captured again with the same thread count it has the same bits. Only local folders and
safetensors are read; no code of the model folder is run.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer
from transformers.utils import logging as transformers_logging

from paceline.engines.engine import CapturedSample, CaptureRequest, TargetFacts
from paceline.engines.prompt_encoder import PromptEncoder
from paceline.errors import CaptureMismatchError, EngineError
from paceline.precision import torch_dtype

PREFILL_ROWS = 8
PROBE_TEXT = "Riders in a paceline take turns at the front."


class TransformersEngine:
    def __init__(self, model_folder: Path, *, dtype: str = "auto", max_prompt_tokens: int = 192) -> None:
        """Raises EngineError, with advice, if the folder holds no model that can be captured from."""
        transformers_logging.disable_progress_bar()
        self._encoder = PromptEncoder(model_folder, max_prompt_tokens=max_prompt_tokens)
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._model = _load_model(model_folder, torch_dtype(dtype), self._device)
        self._layers = list(self._model.model.layers)
        self._facts = _facts(self._model, model_folder, self._encoder.version)
        self._captured_ids = (*self._facts.aux_layer_ids, self._facts.num_hidden_layers)

    @property
    def facts(self) -> TargetFacts:
        return self._facts

    def encode(self, prompt: str) -> tuple[int, ...]:
        return self._encoder.encode(prompt)

    # -- capture ---------------------------------------------------------------------------

    @torch.inference_mode()
    def capture(self, group: Sequence[CaptureRequest]) -> list[CapturedSample]:
        """See `TargetEngine`. Raises EngineError naming the samples whose states are not finite."""
        if not group:
            return []
        rows = _Rows(group, self._facts, self._model.dtype, self._device)
        cache = DynamicCache(config=self._model.config)
        cache.layers[:] = [PreallocatedLayer(len(group), rows.capacity) for _ in self._layers]
        with _Hooks(self._layers, self._captured_ids) as states:
            hidden = self._prefill(rows, cache, states)
            while rows.choose(self._model.lm_head(hidden)):
                positions = (rows.length - rows.padding)[:, None]
                mask = rows.mask[:, : rows.length + 1]
                hidden = self._forward(rows.last_ids, mask, positions, cache)
                rows.keep(states.taken)
        return rows.samples(self._facts.aux_layer_ids)

    def _prefill(self, rows: _Rows, cache: DynamicCache, states: _Hooks) -> torch.Tensor:
        """Read the prompts, rows of like length together so that little padding is computed.

        Returns the final hidden state of every row's last prompt token, [B, H].
        """
        hidden = torch.empty(
            rows.count, self._facts.hidden_size, dtype=self._model.dtype, device=self._device
        )
        for members, width in rows.by_length(PREFILL_ROWS):
            start = rows.length - width
            part = DynamicCache(config=self._model.config)
            positions = torch.arange(start, rows.length, device=self._device) - rows.padding[members, None]
            hidden[members] = self._forward(
                rows.prompt_ids[members, start:], rows.mask[members, start : rows.length], positions, part
            )
            rows.keep_prompts(members, start, states.taken)
            for whole, piece in zip(cache.layers, part.layers, strict=True):
                assert isinstance(whole, PreallocatedLayer)
                assert isinstance(piece, DynamicLayer)
                assert piece.keys is not None
                assert piece.values is not None
                whole.adopt(members, start, piece.keys, piece.values)
        return hidden

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
        with _Hooks(self._layers, self._captured_ids) as states:
            output = self._model(input_ids=ids, output_hidden_states=True, use_cache=False)
        taken = states.taken
        expected = [output.hidden_states[k] for k in self._facts.aux_layer_ids]
        same = all(torch.equal(a, b) for a, b in zip(taken, expected, strict=False))
        logits = self._model.lm_head(self._model.model.norm(taken[-1]))[0].float()
        agreed = _argmax_agrees(logits, output.logits[0].float())
        if not (same and agreed):
            raise CaptureMismatchError(
                f"States captured from layers {self._captured_ids} do not reproduce the model's own output "
                f"(layers {'as asked' if same else 'differ'}, argmax {'agrees' if agreed else 'differs'}).",
                why="A draft trained on them would imitate another model.",
                next="compare the installed transformers with constraints.txt, and check the model folder.",
            )


class PreallocatedLayer(DynamicLayer):
    """A cache layer that writes into place; the stock one copies the whole cache at every token."""

    def __init__(self, num_rows: int, capacity: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._num_rows, self._capacity, self._length = num_rows, capacity, 0

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        shape = (self._num_rows, key_states.shape[1], self._capacity, key_states.shape[3])
        # Zeros, because a masked position still meets its value, and zero times garbage may be NaN.
        self._key_room, self._value_room = key_states.new_zeros(shape), value_states.new_zeros(shape)
        self.is_initialized = True

    def adopt(
        self, members: torch.Tensor, start: int, key_states: torch.Tensor, value_states: torch.Tensor
    ) -> None:
        """Take the prompts of some rows, computed apart, from position `start` on."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self._length = start + key_states.shape[-2]
        self._key_room[members, :, start : self._length] = key_states
        self._value_room[members, :, start : self._length] = value_states
        self.keys, self.values = self._key_room[:, :, : self._length], self._value_room[:, :, : self._length]

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        *args: Any,  # noqa: ARG002 (the base class's signature)
        **kwargs: Any,  # noqa: ARG002
    ) -> tuple[torch.Tensor, torch.Tensor]:
        end = self._length + key_states.shape[-2]
        self._key_room[:, :, self._length : end] = key_states
        self._value_room[:, :, self._length : end] = value_states
        self._length = end
        self.keys, self.values = self._key_room[:, :, :end], self._value_room[:, :, :end]
        return self.keys, self.values


class _Hooks:
    """Keeps the outputs of the asked layers of the latest forward, in the order of `ids`."""

    def __init__(self, layers: Sequence[torch.nn.Module], ids: Sequence[int]) -> None:
        self._layers = layers
        self._ids = ids
        self._states: dict[int, torch.Tensor] = {}

    @property
    def taken(self) -> list[torch.Tensor]:
        return [self._states[k] for k in self._ids]

    def __enter__(self) -> _Hooks:
        self._handles = [self._layers[k - 1].register_forward_hook(self._keep(k)) for k in set(self._ids)]
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _keep(self, layer_id: int) -> Callable[[torch.nn.Module, Any, Any], None]:
        def hook(_module: torch.nn.Module, _inputs: Any, output: Any) -> None:
            self._states[layer_id] = output[0] if isinstance(output, tuple) else output

        return hook


class _Rows:
    """The group while it is answered: what each row holds, and the states captured so far."""

    def __init__(
        self, group: Sequence[CaptureRequest], facts: TargetFacts, dtype: torch.dtype, device: torch.device
    ) -> None:
        lengths = [len(request.prompt_ids) for request in group]
        self._group, self._facts, self._lengths = group, facts, lengths
        longest, answer = max(lengths), max(request.max_new_tokens for request in group)
        self.count = len(group)
        self.capacity = longest + answer
        self.length = longest  # positions processed (or about to be, by the prefill), padding included
        self.padding = torch.tensor([longest - length for length in lengths], device=device)
        self.mask = (torch.arange(self.capacity, device=device) >= self.padding[:, None]).long()
        pad = facts.eos_token_ids[0] if facts.eos_token_ids else 0
        self.prompt_ids = torch.tensor(
            [[pad] * (longest - len(r.prompt_ids)) + list(r.prompt_ids) for r in group], device=device
        )
        self._answers: list[list[int]] = [[] for _ in group]
        self._done = [False] * len(group)
        shape = (len(group), self.capacity, (len(facts.aux_layer_ids) + 1) * facts.hidden_size)
        self._states = torch.empty(shape, dtype=dtype, device=device)
        self._noise = [torch.Generator().manual_seed(request.seed) for request in group]
        # Temperature 1 stands in for greedy rows, whose sample is not used.
        temperatures = [request.temperature or 1.0 for request in group]
        self._temperature = torch.tensor(temperatures, device=device)[:, None]
        self._sampled = [request.temperature > 0 for request in group]

    @property
    def last_ids(self) -> torch.Tensor:
        return torch.tensor([[answer[-1]] for answer in self._answers], device=self.mask.device)

    def by_length(self, size: int) -> list[tuple[torch.Tensor, int]]:
        """Rows in parts of `size`, shortest prompts first, each with its longest prompt's length."""
        order = sorted(range(self.count), key=lambda row: self._lengths[row])
        parts = [order[i : i + size] for i in range(0, self.count, size)]
        return [(torch.tensor(part, device=self.mask.device), self._lengths[part[-1]]) for part in parts]

    def keep_prompts(self, members: torch.Tensor, start: int, states: Sequence[torch.Tensor]) -> None:
        """Copy the states of some rows' prompts, which end at the current length."""
        width = self._facts.hidden_size
        for place, state in enumerate(states):
            self._states[members, start : self.length, place * width : (place + 1) * width] = state

    def keep(self, states: Sequence[torch.Tensor]) -> None:
        """Copy the latest forward's states behind those before it."""
        stop = self.length + states[0].shape[1]
        width = self._facts.hidden_size
        for place, state in enumerate(states):
            self._states[:, self.length : stop, place * width : (place + 1) * width] = state
        self.length = stop

    def choose(self, logits: torch.Tensor) -> bool:
        """Append every unfinished row's next token; whether any row needs another forward."""
        chosen = logits.argmax(-1).tolist()
        sampled = self._sample(logits) if any(self._sampled) else chosen
        for row, request in enumerate(self._group):
            if self._done[row]:
                # A finished row keeps its place, so that its neighbours' bits do not depend on it.
                self._answers[row].append(self._answers[row][-1])
                continue
            token = sampled[row] if self._sampled[row] else chosen[row]
            self._answers[row].append(token)
            ended = token in self._facts.eos_token_ids or len(self._answers[row]) == request.max_new_tokens
            if ended:
                self._done[row] = True
                self._lengths[row] += len(self._answers[row]) - 1  # the last token has no state
        return not all(self._done)

    def _sample(self, logits: torch.Tensor) -> list[int]:
        """Inverse of each row's cumulative distribution at the row's own next random number."""
        cumulative = (logits.float() / self._temperature).softmax(-1).cumsum(-1)
        points = torch.cat([torch.rand(1, generator=noise) for noise in self._noise])
        points = points.to(cumulative.device)[:, None] * cumulative[:, -1:]
        tokens = torch.searchsorted(cumulative, points, right=True)[:, 0]
        return [int(token) for token in tokens.clamp(max=logits.shape[-1] - 1)]

    def samples(self, aux_layer_ids: Sequence[int]) -> list[CapturedSample]:
        aux_width = len(aux_layer_ids) * self._facts.hidden_size
        captured, bad = [], []
        for row, request in enumerate(self._group):
            start, length = int(self.padding[row]), self._lengths[row]
            states = self._states[row, start : start + length].cpu()
            if not torch.isfinite(states).all():
                bad.append(request.sample_id)
            prompt = len(request.prompt_ids)
            tokens = list(request.prompt_ids) + self._answers[row][: length - prompt]
            captured.append(
                CapturedSample(
                    sample_id=request.sample_id,
                    input_ids=torch.tensor(tokens, dtype=torch.int32),
                    loss_mask=(torch.arange(length) >= prompt).to(torch.uint8),
                    aux_hidden_states=states[:, :aux_width].contiguous(),
                    last_hidden_states=states[:, aux_width:].contiguous(),
                )
            )
        if bad:
            raise EngineError(
                f"The target gave states that are not finite for {len(bad)} samples (first: {bad[0]}).",
                why="Training on them would destroy the draft's weights; nothing of the group was stored.",
                next="try target.dtype: float32, or remove the prompt.",
            )
        return captured


def _load_model(model_folder: Path, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    try:
        model = AutoModelForCausalLM.from_pretrained(
            str(model_folder),
            dtype=dtype,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
        )
    except (OSError, ValueError) as error:
        raise EngineError(
            f"{model_folder} holds no model that can be loaded ({str(error).splitlines()[0]}).",
            why="The producer needs the target's weights, as safetensors, in a local folder.",
            next="run `make model`, or set target.model to a Hugging Face model folder.",
        ) from error
    loaded: PreTrainedModel = torch.nn.Module.to(model, device).eval()
    return loaded


def _facts(model: PreTrainedModel, model_folder: Path, tokenizer_version: str) -> TargetFacts:
    config = model.config
    layers = int(config.num_hidden_layers)
    aux = (2, layers // 2, layers - 3)
    if not 0 < aux[0] < aux[1] < aux[2] < layers:
        raise EngineError(
            f"The target has {layers} layers, so the aux layers {aux} are not three different ones.",
            why="EAGLE-3 reads an early, a middle and a late state.",
            next="choose a target with at least 7 layers.",
        )
    stop = getattr(model.generation_config, "eos_token_id", None)
    stop = config.eos_token_id if stop is None else stop
    return TargetFacts(
        hidden_size=int(config.hidden_size),
        num_hidden_layers=layers,
        vocab_size=int(config.vocab_size),
        dtype=str(model.dtype).removeprefix("torch."),
        aux_layer_ids=aux,
        eos_token_ids=() if stop is None else tuple(stop) if isinstance(stop, list) else (int(stop),),
        model_version=_model_version(model_folder),
        tokenizer_version=tokenizer_version,
    )


def _model_version(model_folder: Path) -> str:
    """Digest of config.json and of every weight file's safetensors header and size.

    The header names every tensor with its shape and place; reading all bytes of a large target at
    every start would cost minutes.
    """
    digest = hashlib.sha256((model_folder / "config.json").read_bytes())
    for path in sorted(model_folder.glob("*.safetensors")):
        with path.open("rb") as file:
            header = file.read(int.from_bytes(file.read(8), "little"))
        digest.update(json.dumps([path.name, path.stat().st_size]).encode() + header)
    return digest.hexdigest()[:16]


def _argmax_agrees(logits: torch.Tensor, own: torch.Tensor) -> bool:
    """Same argmax at every position, but for positions where the two best differ by rounding alone."""
    best = own.topk(2, dim=-1).values
    close = best[:, 0] - best[:, 1] <= 0.02 * best[:, 0].abs().clamp(min=1.0)
    return bool(((logits.argmax(-1) == own.argmax(-1)) | close).all())
