"""Ridge regression over rows that come in pieces."""

from __future__ import annotations

import torch


class Regression:
    """Sums over the rows of `wanted` [R, O] and the `inputs` [R, I] that shall predict them."""

    def __init__(self, inputs: int, outputs: int) -> None:
        self.gram, self.moment = torch.zeros(inputs, inputs), torch.zeros(inputs, outputs)
        self.num_rows = 0

    def add(self, inputs: torch.Tensor, wanted: torch.Tensor) -> None:
        self.gram.addmm_(inputs.T, inputs)
        self.moment.addmm_(inputs.T, wanted)
        self.num_rows += inputs.shape[0]

    def solved(self, ridge: float) -> torch.Tensor:
        """The map [I, O]. Every input is scaled to unit size, so that one `ridge` suits them all."""
        scale = (self.gram.diagonal() / max(1, self.num_rows)).sqrt() + 1e-6
        scaled = self.gram / scale.unsqueeze(0) / scale.unsqueeze(1)
        scaled.diagonal().add_(ridge)
        solution: torch.Tensor = torch.linalg.solve(scaled, self.moment / scale.unsqueeze(1))
        return solution / scale.unsqueeze(1)
