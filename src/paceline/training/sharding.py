"""Sharding: a draft and its optimizer, divided by rows among the ranks with FSDP2 (`fully_shard`).

All ranks gather the weights before they touch a sample, and sum and divide the gradients once all have voted
that none failed. In between each rank calls the draft itself, and no rank waits for another one in there. So
a bad sample is an error on all ranks, as if nothing were sharded, and ranks need not have as many
micro-batches. What that costs: during a step every rank holds the whole weights and gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import distributed, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Shard

from paceline.errors import CheckpointError, RanksError
from paceline.training.link import lost

T = TypeVar("T")


class _Root(nn.Module):
    """What FSDP2 knows as the module, so that calls of the draft pass none of its hooks."""

    def __init__(self, draft: nn.Module) -> None:
        super().__init__()
        self.draft = draft


class Sharding:
    def __init__(self, draft: nn.Module, rank: int, ranks: int) -> None:
        """From here on the parameters of `draft`, equal on all ranks, are this rank's rows of them."""
        self.rank, self.ranks = rank, ranks
        self._draft = draft
        device = next(draft.parameters()).device
        everyone = distributed.group.WORLD  # a mesh may make a group of its own, which waits for half an hour
        assert everyone is not None
        self._mesh = DeviceMesh.from_group(everyone, device.type)
        self._root = fully_shard(_Root(draft), mesh=self._mesh, reshard_after_forward=False)
        self._is_gathered = False

    # -- a step ----------------------------------------------------------------------------

    def gather(self) -> None:
        """The draft has its whole weights until `release` or `reduce`. Raises RanksError."""
        self._draft.zero_grad(set_to_none=True)
        self.together(self._root.unshard)
        self._is_gathered = True

    def release(self) -> None:
        """The draft has this rank's rows alone, and no gradients of whole weights."""
        if self._is_gathered:
            self._draft.zero_grad(set_to_none=True)
            self._root.reshard()
            self._is_gathered = False

    def reduce(self, reached: Sequence[nn.Parameter]) -> None:
        """Each rank gets its rows of the sums of all ranks' gradients; releases the whole weights.

        `reached`: the gathered parameters that have a gradient on some rank, the same ones on each. Raises
        RanksError.
        """

        def act() -> None:
            names = {id(parameter): name for name, parameter in self._draft.named_parameters()}
            whole = {names[id(p)]: torch.zeros_like(p) if p.grad is None else p.grad for p in reached}
            self.release()
            divided = dict(self._draft.named_parameters())
            for name in list(whole):
                gradient = DTensor.from_local(whole.pop(name), self._mesh, (Partial(),), run_check=False)
                divided[name].grad = gradient.redistribute(placements=(Shard(0),))

        self.together(act)

    def together(self, act: Callable[[], T]) -> T:
        """What all ranks do at once, after they have voted. Raises RanksError, whatever this rank runs into.

        Also what it alone runs into, such as a want of memory, leaves the others in another call.
        """
        try:
            return act()
        except RanksError:
            raise
        except Exception as error:
            said = str(error).partition("\n")[0] or type(error).__name__
            raise lost(f"rank {self.rank} exchanged weights or gradients, and {said[:300]}") from error

    # -- parts of a checkpoint ---------------------------------------------------------------

    def part(self, tensors: Mapping[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], dict[str, int]]:
        """Of the draft's and the optimizer's tensors this rank's rows, and where each begins in the whole.

        What is not divided is in the part of rank 0.
        """
        found, begins = {}, {}
        for name, tensor in tensors.items():
            if isinstance(tensor, DTensor):
                start, stop = self._rows(tensor)
                if stop > start:
                    found[name], begins[name] = tensor.to_local().detach(), start
            elif self.rank == 0:
                found[name], begins[name] = tensor, 0
        return found, begins

    def put(self, divided: torch.Tensor, piece: torch.Tensor, begin: int = 0) -> int:
        """Copy into this rank's rows what a piece of the whole has of them; returns how many rows.

        `piece` [R, ...]: the rows of the whole from `begin` on.
        """
        assert isinstance(divided, DTensor)
        start, stop = self._rows(divided)
        first, last = max(start, begin), min(stop, begin + len(piece))
        if last > first:
            divided.to_local()[first - start : last - start].copy_(piece[first - begin : last - begin])
        return max(0, last - first)

    def restore_optimizer(
        self,
        optimizer: torch.optim.Optimizer,
        parts: Iterable[tuple[Mapping[str, torch.Tensor], Mapping[str, int]]],
    ) -> None:
        """From the tensors of `optimizer_tensors`, in one part or several of any number of ranks.

        Raises CheckpointError if rows are missing.
        """
        parameters, found = dict(self._draft.named_parameters()), dict[tuple[str, str], int]()
        for tensors, begins in parts:
            for name, tensor in tensors.items():
                parameter_name, _, key = name.rpartition(".")
                parameter = parameters[parameter_name]
                state: dict[str, Any] = optimizer.state[parameter]
                if tensor.shape[1:] != parameter.shape[1:] or tensor.ndim != parameter.ndim:
                    state[key] = tensor.to(parameter.device, copy=True)
                    continue
                if key not in state:
                    state[key] = torch.zeros_like(parameter, dtype=tensor.dtype)
                rows = self.put(state[key], tensor, begins.get(name, 0))
                found[parameter_name, key] = found.get((parameter_name, key), 0) + rows
        for (name, key), rows in found.items():
            start, stop = self._rows(parameters[name])
            if rows != stop - start:
                raise CheckpointError(
                    f"{name}.{key} of a checkpoint has {rows} of rank {self.rank}'s {stop - start} rows.",
                    why="Going on without the others would train other weights.",
                    next="restore the checkpoint from a backup.",
                )

    def _rows(self, tensor: torch.Tensor) -> tuple[int, int]:
        """The rows of the whole that this rank has: as many as every other one, but for the last ones."""
        rows = len(tensor)
        each = -(-rows // self.ranks)
        start = min(self.rank * each, rows)
        stop = min(start + each, rows)
        assert isinstance(tensor, DTensor)
        assert len(tensor.to_local()) == stop - start
        return start, stop
