"""Every draft method runs the one suite."""

from __future__ import annotations

from paceline.methods.eagle3.method import Eagle3Method
from paceline.methods.method import DraftMethod
from paceline.testing.method_suite import MethodSuite


class TestEagle3(MethodSuite):
    def make(self) -> DraftMethod:
        return Eagle3Method({"draft_vocab_size": 40, "ttt_steps": 3})


class TestEagle3FromTheTargetsLayer(MethodSuite):
    def make(self) -> DraftMethod:
        return Eagle3Method({"draft_vocab_size": 61, "ttt_steps": 2, "init": "target", "recompute": True})
