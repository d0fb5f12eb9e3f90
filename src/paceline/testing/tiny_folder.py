"""The demo's tiny random target as a folder, for tests."""

from __future__ import annotations

from paceline.demo.target import TEMPLATE, make_target, write_tokenizer

__all__ = ["TEMPLATE", "make_tiny_folder", "write_tokenizer"]

make_tiny_folder = make_target
