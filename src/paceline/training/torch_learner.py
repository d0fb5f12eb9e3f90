"""TorchLearner: the draft and its optimizer, as the learner that the trainer calls.

The draft is built on the CPU, where the first weights are a pure function of samples and seed, and trained
on the device of the settings. Training draws no random numbers on the device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import cached_property
from typing import Any

import torch
import xxhash
from torch import nn

from paceline.durable_files import FileContent
from paceline.errors import TrainingError
from paceline.features.float8 import widened
from paceline.methods.method import DraftMethod
from paceline.parts import part_name, parts_of
from paceline.precision import resolve_device
from paceline.target.agreement import refuse_disagreement
from paceline.target.head import TargetHead
from paceline.target.origin import origin_of
from paceline.target.version import model_version
from paceline.training import tensor_files
from paceline.training.average import WeightAverage
from paceline.training.group import Group
from paceline.training.learner import DRAFT
from paceline.training.optimizer import build_optimizer, optimizer_tensors, restore_optimizer
from paceline.training.reduction import AddedGradients, Reduction
from paceline.training.settings import TrainerSettings
from paceline.training.sharding import Sharding
from paceline.training.step import Whole, accumulate_gradients, train_step, visit_of

OPTIMIZER, RNG = "optimizer.safetensors", "rng.safetensors"
RNG_OF = "rng-{rank}.safetensors"  # of a rank other than 0
WEIGHTS = "weights.safetensors"  # that are trained, where the draft holds their average


class TorchLearner:
    def __init__(
        self,
        method: DraftMethod,
        head: TargetHead,
        settings: TrainerSettings,
        group: Group | None = None,
    ) -> None:
        """`group`: the ranks among which a step's samples are divided; None: there is one."""
        self.draft: nn.Module | None = None
        self.optimizer: torch.optim.Optimizer | None = None
        self._average: WeightAverage | None = None
        self._method = method
        self._head = head
        self._settings = settings
        self._buffers = tensor_files.FileBuffers()
        self._device = resolve_device(settings.training.device)
        self._rank = 0 if group is None else group.rank
        self._group = group
        self._reduction = None if group is None else Reduction(group, self._exchange, self._together)
        self._add_gradients = None if group is None else AddedGradients(group.add)
        self._sharding: Sharding | None = None  # once the draft is divided: not while rank 0 builds it

    @cached_property
    def _target_version(self) -> str:
        """By which a later run sees whether it may start from a checkpoint."""
        return model_version(self._head.folder) if self._head.folder else ""

    @property
    def ready(self) -> bool:
        return self.draft is not None

    @property
    def is_sharded(self) -> bool:
        return self._group is not None and self._settings.sharded

    def _exchange(self, parameters: Sequence[nn.Parameter]) -> None:
        exchange = self._add_gradients if self._sharding is None else self._sharding.reduce
        assert exchange is not None
        exchange(parameters)

    def _together(self, act: Callable[[], float]) -> float:
        return act() if self._sharding is None else self._sharding.together(act)

    @contextmanager
    def gathered(self) -> Iterator[None]:
        if self._sharding is None:
            yield
            return
        self._sharding.gather()
        try:
            yield
        finally:
            self._sharding.release()

    def opened(self, stored: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return widened(stored)

    def check_greedy(self, samples: Sequence[Mapping[str, torch.Tensor]]) -> None:
        refuse_disagreement(self._head, self._method.features(self._head.facts), samples)

    def build(self, samples: Sequence[Mapping[str, torch.Tensor]]) -> None:
        torch.manual_seed(self._settings.seed)
        draft = self._method.build(self._head, samples, self._settings.seed)
        if not all(bool(torch.isfinite(weight).all()) for weight in draft.parameters()):
            raise TrainingError(
                f"The first weights, built from {len(samples)} samples, are not finite.",
                why="Nothing can be trained from there.",
                next="look at the target: its hidden states on these prompts are NaN or infinite.",
            )
        self._adopt(draft)

    def _adopt(self, draft: nn.Module, *, divide: bool = False) -> None:
        self.draft = draft.to(self._device)
        self._sharding = None
        if divide:
            assert self._group is not None
            self._sharding = Sharding(self.draft, self._rank, self._group.size)
            self._buffers = tensor_files.FileBuffers()  # those of the whole, if rank 0 has built it
        method, training = self._method, self._settings.training
        scales, adamw_for = method.learning_rate_scales(), method.adamw_for()
        self.optimizer = build_optimizer(draft, training, scales, adamw_for)
        decay = self._settings.training.ema_decay
        self._average = None if decay is None else WeightAverage(draft, decay)

    def num_tokens(self, samples: Sequence[Mapping[str, torch.Tensor]]) -> int:
        return self._method.num_tokens(samples)

    def step(
        self,
        step: int,
        samples: Sequence[Mapping[str, torch.Tensor]],
        num_tokens: int | None = None,
        progress: float | None = None,
    ) -> dict[str, Any]:
        assert self.draft is not None
        assert self.optimizer is not None
        parts = self.draft, self._method, self.optimizer, self._settings
        with self.gathered():
            figures = train_step(step, samples, *parts, Whole(num_tokens, progress), self._reduction)
        if self._average is not None:
            self._average.update(step)
        return figures

    def attempt(self, samples: Sequence[Mapping[str, torch.Tensor]], step: int = 0) -> None:
        assert self.draft is not None
        before = torch.get_rng_state()
        try:
            what, visit = f"A trial of {len(samples)} samples", visit_of(step, self._settings)
            accumulate_gradients(samples, self.draft, self._method, self._settings, what=what, visit=visit)
        finally:
            self.draft.zero_grad(set_to_none=True)
            torch.set_rng_state(before)

    def probe(self, like: Mapping[str, torch.Tensor]) -> None:
        """See Learner. The harmless sample has token 0 throughout, and states of ordinary size."""
        if self.draft is None:
            return
        broken = [n for n, w in self.draft.named_parameters() if not bool(torch.isfinite(w).all())]
        if broken:
            raise TrainingError(
                f"The draft's weights are not finite ({broken[0]}).",
                why="Nothing can be trained from there.",
                next="start a new run with a lower training.learning_rate.",
            )
        generator = torch.Generator().manual_seed(0)
        self.attempt([{name: _harmless(tensor, generator) for name, tensor in like.items()}])

    def fingerprint(self) -> str:
        assert self.draft is not None
        digest = xxhash.xxh3_128()
        for weight in self.draft.parameters():
            digest.update(weight.detach().cpu().contiguous().view(torch.uint8).numpy().data)
        return digest.hexdigest()

    def files(self) -> dict[str, FileContent]:
        own_rng = rng_of(self._rank)
        rng = {own_rng: self._buffers.file(own_rng, {"torch": torch.get_rng_state()})}
        if self._sharding is not None:
            parts = {}
            for whole, tensors in self._tensors().items():
                name = part_name(whole, self._rank, self._sharding.ranks)
                parts[name] = self._buffers.file(name, *self._sharding.part(tensors))
            return {**parts, **rng}
        if self._rank:
            return {**rng}
        return {
            **{name: self._buffers.file(name, tensors) for name, tensors in self._tensors().items()},
            **rng,
        }

    def _tensors(self) -> dict[str, dict[str, torch.Tensor]]:
        """The state by file, but for the random one."""
        assert self.draft is not None
        assert self.optimizer is not None
        given = self.draft if self._average is None else self._average
        kept = {} if self._average is None else {WEIGHTS: self._average.trained()}
        return {
            DRAFT: given.state_dict(),
            **kept,
            OPTIMIZER: optimizer_tensors(self.draft, self.optimizer),
        }

    def load(self, files: Mapping[str, FileContent]) -> None:
        draft = restore_draft(self._method, self._head, files)
        self._adopt(draft, divide=self.is_sharded)
        assert self.optimizer is not None
        if self._average is not None:
            put = None if self._sharding is None else self._sharding.put
            self._average.restore_trained(tensor_files.read(WEIGHTS, files), put)
        if self._sharding is None:
            restore_optimizer(draft, self.optimizer, tensor_files.read(OPTIMIZER, files))
        else:
            names = parts_of(OPTIMIZER, files)
            if len(names) == self._sharding.ranks:  # the first part has what is not divided
                names = list(dict.fromkeys([names[0], names[self._rank]]))
            parts = (tensor_files.read_part(name, files[name]) for name in names)
            self._sharding.restore_optimizer(self.optimizer, parts)
        name = rng_of(self._rank)
        name = name if name in files else RNG  # there were fewer ranks
        torch.set_rng_state(tensor_files.from_bytes(name, files[name])["torch"])

    def describe(self) -> dict[str, Any]:
        assert self.draft is not None
        described = {"method": self._method.name, "draft_config": self._method.describe(self.draft)}
        if self._target_version:
            described["target_version"] = self._target_version
        origin = origin_of(self._head.folder) if self._head.folder else None
        # A local folder may lie elsewhere at the next start; a model of the hub is the same everywhere.
        return {**described, "target": asdict(origin)} if origin and origin.revision else described


def rng_of(rank: int) -> str:
    return RNG_OF.format(rank=rank) if rank else RNG


def restore_draft(method: DraftMethod, head: TargetHead, files: Mapping[str, FileContent]) -> nn.Module:
    """The draft from a checkpoint's files."""
    return method.restore(head, tensor_files.read(DRAFT, files))


def _harmless(tensor: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """A tensor of the same shape and dtype: noise for states, 0 for ids; a mask is kept."""
    if tensor.is_floating_point():
        return torch.randn(tensor.shape, generator=generator).to(tensor.dtype)
    return tensor if tensor.dtype in (torch.bool, torch.uint8) else torch.zeros_like(tensor)
