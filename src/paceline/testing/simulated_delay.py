"""Simulated runs to which nothing happens but that one of three producers is held up, again and again."""

from __future__ import annotations

import random
from collections import Counter

from paceline.testing.simulated_run import Shape
from paceline.testing.simulation import Actor, Culprits, World, simulate_world


class HeldUpWorld(World):
    """The second producer rests, most of the time, between its lease and its reservation."""

    def _is_awake(self, actor: Actor) -> bool:
        is_held_up = actor.role == self._producers[1] and actor.at == "reserve" and self.rng.random() < 0.99
        return not is_held_up and super()._is_awake(actor)


def simulate_held_up(seed: int) -> Counter[str]:
    """A run in as little room as is allowed, with a producer that is held up. Raises ViolationError."""
    rng = random.Random(seed)
    shape = Shape(
        prompts=30,
        group=rng.choice((2, 3)),
        batch=rng.choice((1, 2, 3)),
        passes=rng.choice((1, 2)),
        interval=rng.choice((1, 2, 5)),
        spare=0,
        producers=3,
    )
    return simulate_world(seed, HeldUpWorld(shape, Culprits(), rng, []))
